"""Small data in the published formats, small LLMs of both architectures, a way to run a stage as users do."""

import contextlib
import gzip
import importlib
import io
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

# both are read at the imports below; with small tensors a second thread waits more than it works
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import numpy as np  # noqa: E402
import pandas as pd  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

NAMES = {"prepare": "01_prepare", "infer": "02_infer_profiles", "quantize": "03_quantize",
         "ctr": "04_train_ctr", "case_study": "05_case_study"}


class Stages(Mapping):
    """File name of a stage -> its module, imported at first use: a broken stage fails its own tests only."""

    def __getitem__(self, script):
        return importlib.import_module(script.removesuffix(".py").replace("/", "."))  # or baselines/NAME.py

    def __iter__(self):
        return (f"{name}.py" for name in NAMES.values())

    def __len__(self):
        return len(NAMES)


STAGES = Stages()


def __getattr__(name):
    """`from conftest import prepare` gives the module of stage 1, and so on."""
    if name in NAMES:
        return importlib.import_module(NAMES[name])
    raise AttributeError(name)


NAME_TEXTS = ["This user's hobby is", "his background is"]
TASK_TEXT = "The user has bought"


def run_stage(script, *options, ok=True):
    """Run a stage in this process; what it prints. With ok=False expect exit code 2, its complaint."""
    printed, complaint, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
        try:
            STAGES[script].main(STAGES[script].parse_args(list(map(str, options))))
        except SystemExit as stop:
            code = stop.code
    assert code == (0 if ok else 2), (code, printed.getvalue(), complaint.getvalue())
    return printed.getvalue() if ok else complaint.getvalue().strip().splitlines()[-1]


def run_process(script, *options, ok=True):
    """The same in a process of its own, as users run it."""
    command = [sys.executable, ROOT / script, *map(str, options)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "Traceback" not in done.stderr, done.stderr
    assert done.returncode == (0 if ok else 2), (done.returncode, done.stdout, done.stderr)
    return done.stdout if ok else done.stderr.strip().splitlines()[-1]


def dies(capsys, function, *arguments):
    """The one line with which a function refuses: exit code 2, no traceback."""
    with pytest.raises(SystemExit) as stop:
        function(*arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def read_raw(folder, dataset, *options, ok=True):
    """Run stage 1 on folder/raw: interactions (with user_id, item_id), items by item_id, users, its prints.

    With ok=False expect exit code 2 and nothing written; the complaint.
    """
    run = folder / ("run" if ok else "refused")
    printed = run_stage("01_prepare.py", "--dataset", dataset, "--raw", folder / "raw", "--run-dir", run,
                        *options, ok=ok)
    if not ok:
        assert not list(run.glob("*")) if run.exists() else True
        return printed
    table, items, users = (pd.read_parquet(run / f"{name}.parquet")
                           for name in ("interactions", "items", "users"))
    table = table.assign(user_id=users["user_id"].to_numpy()[table["user"]],
                         item_id=items["item_id"].to_numpy()[table["item"]])
    return table, items.set_index("item_id"), users.set_index("user_id"), printed


def write_table(folder, num_users=60, num_items=40, seed=0, suffix=".csv.gz"):
    """A data set in the table format: two groups of users who each prefer their half of the items."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    half = np.arange(num_items) < num_items // 2
    rows = []
    for user in range(num_users):
        weight = np.where(half == (user % 2 == 0), 6.0, 1.0)
        for item in rng.choice(num_items, 14, replace=False, p=weight / weight.sum()):
            liked = half[item] == (user % 2 == 0)
            rating = int(rng.integers(4, 6) if liked else rng.integers(1, 5))
            rows.append((f"u{user:03d}", f"i{item:03d}", rating, 1_500_000_000 + len(rows)))
    interactions = pd.DataFrame(rows, columns=["user_id", "item_id", "rating", "timestamp"])
    words = "red blue green gold iron wood glass stone paper cloth".split()
    nouns = ["racer" if first else "skillet" for first in half]
    items = pd.DataFrame({
        "item_id": [f"i{item:03d}" for item in range(num_items)],
        "title": [f"{words[item % 10]} {nouns[item]} {item}" for item in range(num_items)],
        "category": ["Games" if first else "Kitchen" for first in half],
        "brand": [("Acme", "Bolt", None)[item % 3] for item in range(num_items)],
        "price": [round(5 + 3.1 * item, 2) for item in range(num_items)],
    })
    for name, frame in (("interactions", interactions), ("items", items)):
        path = folder / f"{name}{suffix}"
        separator = "\t" if ".tsv" in suffix else ","
        frame.to_parquet(path) if suffix == ".parquet" else frame.to_csv(path, index=False, sep=separator)
    return interactions, items


HELDOUT = {name: 1.0 for name in ("none", "shared", "shuffled", "own")} | {
    f"own_minus_{name}": [0.0, 0.0] for name in ("shared", "shuffled")}  # as in the sidecar of profiles.pt


def write_interactions(options, table):
    """Other interactions for a run, and its items and users again, which name the run that they belong to"""
    from userip.artifacts import write_artifact

    frames = {f"{name}.parquet": pd.read_parquet(Path(options.run_dir) / f"{name}.parquet")
              for name in ("items", "users")}
    for name, frame in {"interactions.parquet": table, **frames}.items():
        write_artifact(options, name, frame)


SMALL = {  # the same code path as ever, with small numbers
    "02_infer_profiles.py": ["--llm", "tiny", "--tiny-steps", 6, "--shared-steps", 4, "--map-steps", 4,
                             "--heldout", 60],
    "03_quantize.py": ["--codes", 2, 2, "--epochs", 2],
    "04_train_ctr.py": ["--models", "dcn", "pnn", "--seeds", 2, "--epochs", 3],
    "05_case_study.py": ["--num-users", 2],
}


RATINGS = {"02_infer_profiles.py": ["--ratings", "--folds", 2], "03_quantize.py": ["--codes", 2, 2, 2]}


def run_pipeline(run_dir, raw, stages=5, run=run_stage, split=("random",), ratings=False):
    run("01_prepare.py", "--dataset", "table", "--raw", raw, "--run-dir", run_dir, "--split", *split)
    for script in list(SMALL)[:stages - 1]:
        run(script, "--run-dir", run_dir, *SMALL[script], *(RATINGS.get(script, []) if ratings else []))


@pytest.fixture(scope="session")
def small_run(tmp_path_factory):
    """A run of all five stages on a small table: (raw data, run directory). Read only."""
    folder = tmp_path_factory.mktemp("small")
    write_table(folder / "raw")
    run_pipeline(folder / "run", folder / "raw")
    return folder / "raw", folder / "run"


CORPUS = [f"{name} {TASK_TEXT} Games: red racer {i} by Acme or Bolt for ${i}. "
          f"Kitchen: iron skillet {i}, a job or a sport, café"
          for i in range(50) for name in (*NAME_TEXTS, "her job is", "This user's sport is")]


def bpe_tokenizer(kind):
    """A byte-level tokenizer of GPT-2's kind, or one of Llama's kind (BOS, ▁ for space), trained on CORPUS.

    USERIP_TOKENIZERS may name a folder with the real gpt2/ and llama2/ tokenizers; then these are used.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if real := os.environ.get("USERIP_TOKENIZERS"):
        return AutoTokenizer.from_pretrained(Path(real) / {"gpt2": "gpt2", "llama": "llama2"}[kind])
    special = ["<s>", "</s>", "<unk>"] if kind == "llama" else ["<|endoftext|>"]
    bpe = Tokenizer(models.BPE(unk_token=special[-1] if kind == "llama" else None))
    if kind == "llama":
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    else:
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
    alphabet = [] if kind == "llama" else sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet,
                                  show_progress=False)
    bpe.train_from_iterator(CORPUS, trainer)
    if kind == "llama":
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
        names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    else:
        names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def save_llm(folder, kind):
    """A small LLM built from a config, with random weights, saved with its tokenizer by save_pretrained."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    tokenizer = bpe_tokenizer(kind)
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=256, n_embd=32, n_layer=2, n_head=4)
        model = GPT2LMHeadModel(config)
    else:
        config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=256, hidden_size=32,
                             intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                             num_key_value_heads=2)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", params=["gpt2", "llama"])
def llm_folder(request, tmp_path_factory):
    return save_llm(tmp_path_factory.mktemp(request.param) / "llm", request.param)


@pytest.fixture(scope="session")
def llm(llm_folder):
    """(model, tokenizer) of either architecture"""
    from argparse import Namespace

    from userip.llm import load_llm

    return load_llm(Namespace(run_dir="unused"), str(llm_folder))


def write_ml_100k(folder, num_users=30, num_items=25, seed=0):
    """MovieLens-100k's published format: tabs, pipes, Latin-1, genre flags."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    genres = ["unknown", "Action", "Comedy", "Film-Noir"]
    genre_lines = [f"{genre}|{index}\n" for index, genre in enumerate(genres)]
    (folder / "u.genre").write_text("".join(genre_lines) + "\n")
    items = [f"{item + 1}|Café Nº{item} (1995)|01-Jan-1995||http://x/?{item}|0|{item % 2}|{1 - item % 2}|0"
             for item in range(num_items)]
    (folder / "u.item").write_bytes("\n".join(items).encode("latin-1") + b"\n")
    users = [f"{user + 1}|{20 + user}|{'MF'[user % 2]}|writer|{10000 + user}\n" for user in range(num_users)]
    (folder / "u.user").write_text("".join(users))
    with open(folder / "u.data", "w") as file:
        for user in range(num_users):
            for item in rng.choice(num_items, 12, replace=False):
                rating, timestamp = rng.integers(1, 6), 880000000 + rng.integers(1000)
                file.write(f"{user + 1}\t{item + 1}\t{rating}\t{timestamp}\n")
    return folder


# --- data sets in the formats in which they are published ------------------------------------------------


def write_lines(path, records, literal=False):
    """One record a line, as JSON or (Amazon's metadata of 2014) as Python literals; gzip by the name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, (str, bytes)) else str(record) if literal
             else json.dumps(record, ensure_ascii=False) for record in records]
    content = b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n"
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def review_pairs(num_users=12, num_items=9, seed=0):
    """(user, item, rating, seconds): most pairs, each once."""
    rng = np.random.default_rng(seed)
    pairs = [(user, item) for user in range(num_users) for item in range(num_items) if rng.random() < 0.9]
    return [(user, item, int(rng.integers(1, 6)), 1_400_000_000 + 1000 * int(place))
            for place, (user, item) in zip(rng.permutation(len(pairs)), pairs)]


def write_amazon(folder, year, suffix=".gz", category="Video_Games", oddities=True):
    """Amazon's reviews and metadata in the format of a year, with the oddities of the real ones."""
    reviews = []
    for user, item, rating, seconds in review_pairs():
        text = f'She said "it\'s naïve" {user}'
        if year == 2023:
            reviews.append({"rating": float(rating), "title": "t", "text": text, "images": [],
                            "asin": f"V{item}", "parent_asin": f"B{item:03d}", "user_id": f"A{user:03d}",
                            "timestamp": 1000 * seconds + 7, "helpful_vote": 0, "verified_purchase": True})
        else:
            reviews.append({"reviewerID": f"A{user:03d}", "asin": f"B{item:03d}", "helpful": [0, 0],
                            "reviewText": text, "overall": float(rating), "summary": "s",
                            "unixReviewTime": seconds, "reviewTime": "09 12, 2014"})
    if oddities and year != 2023:
        reviews.append({**reviews[0], "overall": 1.0, "unixReviewTime": 1_500_000_000})  # a duplicate, later
        del reviews[1]["reviewText"]
    titles = ["Tom &amp; Jerry&#39;s  <b>Game</b>", "Pokémon \"Gold\"", "  ", '<span class="a-size-medium',
              "I <3 Tetris", "var aPageStart = (new Date()).getTime();"] + [f"Quest {i}" for i in range(6, 9)]
    prices = ["$12.99", "$5.99 - $12.49", "", "Too low to display", "$1,012.50", ".a-box-inner{color:#fff}"]
    paths = [["Games", "PC", "Strategy"], [], ["Games"], ["Games", "PC &amp; Mac", "More"],
             ["Games", "Toys", "100% fun, no regrets.", "Imported"], ["Games", "All Titles"]]
    items = []
    for item in range(9):
        record = {"asin": f"B{item:03d}", "title": titles[item], "brand": "Åcme" if item % 2 else "",
                  "price": prices[item] if item < 6 else 9.5,
                  "category": paths[item] if item < 6 else ["Games"]}
        if year == 2014:
            record["categories"] = [record.pop("category"), ["Home"]]
            record["related"] = {"also_bought": ["B999"]}
        if year == 2023:
            record = {"main_category": "Games", "parent_asin": record["asin"], "title": record["title"],
                      "store": record["brand"] or None, "price": record["price"] or None,
                      "categories": record["category"], "details": {}, "average_rating": 4.5}
        items.append(record)
    items.append({**items[1], "title": "listed again"})
    ending = f".json{suffix}" if year != 2023 else f".jsonl{suffix}"
    names = {2014: (f"reviews_{category}_5", f"meta_{category}"), 2018: (f"{category}_5", f"meta_{category}"),
             2023: (category, f"meta_{category}")}[year]
    write_lines(folder / f"{names[0]}{ending}", reviews)
    write_lines(folder / f"{names[1]}{ending}", items, literal=year == 2014)
    return reviews


def write_yelp(folder, with_time=True, users=True):
    """Yelp's open data set: reviews, businesses, users."""
    day = "2018-07-%02d"
    write_lines(folder / "yelp_academic_dataset_review.json", [
        {"review_id": f"r{seconds}", "user_id": f"u{user}", "business_id": f"b{item}", "stars": float(rating),
         "useful": 0, "text": "Délicieux!\nagain",
         "date": day % (1 + user) + (" 22:09:11" if with_time else "")}
        for user, item, rating, seconds in review_pairs()])
    categories = (["Restaurants, Food, Bubble Tea, Coffee & Tea", None, "Restaurants", "Shopping"]
                  + ["Pubs, Food"] * 5)
    write_lines(folder / "yelp_academic_dataset_business.json", [
        {"business_id": f"b{item}", "name": f"Café &amp; Co {item}", "stars": 4.5,
         "categories": categories[item],
         "attributes": {"RestaurantsPriceRange2": str(1 + item % 4)} if item % 3 else None}
        for item in range(9)])
    if users:
        write_lines(folder / "yelp_academic_dataset_user.json", [
            {"user_id": f"u{user}", "name": "N", "review_count": 10 * user,
             "yelping_since": "2010-01-01 00:00:00", "fans": user, "average_stars": 3.3}
            for user in range(14)])


def write_nete(folder, num_users=15, num_items=10, seed=0):
    """A dump of the structure of NETE's: reviews.pickle, item.json, two published splits. Returns the
    reviews.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    reviews = [{"user": f"u{user}", "item": f"i{item}", "rating": int(rng.integers(1, 6)),
                "template": ("plot", "great", f"the plot is great {user} {item}", 1), "predicted": "plot"}
               for user in range(num_users) for item in range(num_items) if rng.random() < 0.5]
    reviews.append({"user": "rare", "item": "i0", "rating": 5, "template": ("a", "b", "c", 1)})
    reviews.append(dict(reviews[0]))  # a pair that stands there twice
    (folder / "reviews.pickle").write_bytes(pickle.dumps(reviews))
    (folder / "item.json").write_text(json.dumps([
        {"item": f"i{item}", "title": f"Film &amp; {item}", "categories": [["Movies & TV", "Drama"]]}
        for item in range(num_items)]))
    for fold in (1, 2):
        order = rng.permutation(len(reviews))
        tenth = len(order) // 10
        parts = {"test": order[:tenth], "validation": order[tenth:2 * tenth], "train": order[2 * tenth:]}
        (folder / str(fold)).mkdir(exist_ok=True)
        for name, part in parts.items():
            (folder / str(fold) / f"{name}.index").write_text(" ".join(map(str, sorted(part))))
    return reviews


def write_ml_1m(folder, num_users=20, num_items=12, seed=0):
    """MovieLens-1M's published format: "::" between columns, Latin-1, codes for age and occupation."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    movies = [f"{item + 1}::Amélie: Part {item} (2001)::Comedy|Film-Noir\n" for item in range(num_items)]
    (folder / "movies.dat").write_bytes("".join(movies).encode("latin-1"))
    users = [f"{user + 1}::{'MF'[user % 2]}::{(1, 18, 25)[user % 3]}::{user % 21}::{48067 + user}\n"
             for user in range(num_users)]
    (folder / "users.dat").write_text("".join(users))
    ratings = [f"{user + 1}::{item + 1}::{rng.integers(1, 6)}::{978300760 + user}\n"
               for user in range(num_users) for item in rng.choice(num_items, 8, replace=False)]
    (folder / "ratings.dat").write_text("".join(ratings))
    return folder
