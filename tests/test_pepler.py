import copy
import importlib
import shutil
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from baseline_cases import kill_at_call, poisoned, trained_states
from conftest import dies, read_raw, run_process, write_amazon
from userip.evidence import own_space
from userip.explanations import generate, text_nll, text_tokens

pepler = importlib.import_module("baselines.pepler")
SMALL = ["--llm", "tiny", "--tiny-steps", 4, "--epochs", 2, "--seeds", 1]
TEXTS = ["--text-rows", 20, "--max-texts", 4]


def run_pepler(run_dir, *options):
    pepler.main(pepler.parse_args(list(map(str, ["--run-dir", run_dir, *SMALL, *(options or TEXTS)]))))
    return pd.read_parquet(run_dir / "baseline-pepler.parquet")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A run of stage 1 with reviews, and PEPLER's beside it: (run of stage 1, run, rows); read only"""
    folder = tmp_path_factory.mktemp("pepler")
    write_amazon(folder / "raw", 2023)
    read_raw(folder, "amazon", "--split", "cold-item")
    shutil.copytree(folder / "run", folder / "prepared")
    return folder / "prepared", folder / "run", run_pepler(folder / "run")


def model_of(head, num_users=5, num_items=4):
    torch.manual_seed(0)
    known = torch.arange(num_users) < 4, torch.arange(num_items) < 3  # the last ones have no train row
    return pepler.PEPLER(head, known, 6, 0.1, [8])


def test_the_rating_head_is_matrix_factorization_when_asked():
    model, user, item = model_of("mf"), torch.tensor([0, 3, 1]), torch.tensor([2, 0, 1])
    expected = [0.1 * sum(model.user[u, d] * model.item[i, d] for d in range(6)) for u, i in zip(user, item)]
    assert model(user, item).tolist() == pytest.approx(torch.stack(expected).tolist())
    assert {name for name, _ in model.named_parameters()} == {"user", "item", "bias"}


def test_tokens_per_user_are_those_of_the_text_rows_of_all_epochs(prepared, llm):
    """Each text behind BOS, u, i and a space; its EOS is not read"""
    model, tokenizer = llm
    run = SimpleNamespace(llm=SimpleNamespace(model=model, tokenizer=tokenizer, device="cpu"),
                          texts=["red racer", "iron"], is_known=[torch.ones(5) > 0, torch.ones(4) > 0])
    shift = own_space(tokenizer)
    num_tokens = sum(len(tokenizer(f" {text}"[shift:], add_special_tokens=False).input_ids)
                     for text in run.texts)
    run.bos, num_tokens = torch.zeros(1, 6), num_tokens + 2 * 3
    per_user = lambda args: pepler.costs(args, run, model_of("mf"), 3)["tokens_per_user"]
    assert per_user(SimpleNamespace(text_rows=9, text_weight=0.1)) == pytest.approx(3 * num_tokens / 5)
    assert per_user(SimpleNamespace(text_rows=1, text_weight=0.1)) == pytest.approx(1.5 * num_tokens / 5)
    assert per_user(SimpleNamespace(text_rows=9, text_weight=0)) == 0
    assert (prepared[2][["tokens_per_user", "milliseconds", "bytes", "seconds"]] > 0).all(axis=None)


def test_the_mlp_reads_both_vectors():
    model, pair = model_of("mlp"), (torch.tensor([0, 1]), torch.tensor([2, 2]))
    before = model(*pair)
    with torch.no_grad():
        model.user[1] += 1.0
    moved = model(*pair)
    assert moved[0] == before[0] and moved[1] != before[1]


def test_who_has_no_train_row_has_the_mean_of_the_others():
    model = model_of("mf")
    model.fill()
    u, i = model.vectors(torch.tensor([4]), torch.tensor([3]))
    assert torch.allclose(u[0], 0.1 * model.user[:4].mean(0))
    assert torch.allclose(i[0], 0.1 * model.item[:3].mean(0))


def llm_of(llm):
    return SimpleNamespace(model=llm[0], tokenizer=llm[1], device=llm[0].device)


def test_the_prompt_is_user_and_item_and_the_loss_that_of_the_llm(llm):
    """The NLL of each token equals the LLM's own logits, whatever text is padded beside it"""
    model, llm = model_of("mf"), llm_of(llm)
    embed = llm.model.get_input_embeddings()
    model = pepler.PEPLER("mf", (torch.ones(5).bool(), torch.ones(4).bool()), embed.embedding_dim, 0.1, [8])
    bos, user, item = embed(torch.tensor([0])), torch.tensor([0, 1]), torch.tensor([2, 3])
    prefix = model.prefix(bos, user, item)
    assert torch.equal(prefix[1, 1:], torch.cat(model.vectors(user[1:], item[1:])))
    ids, is_scored = text_tokens(llm, ["red racer", "iron skillet, a job or a sport"])
    nll = text_nll(llm, prefix, ids, is_scored).split(is_scored.sum(1).tolist())
    for row in range(2):
        text = ids[row, is_scored[row]]
        assert text[-1] == llm.tokenizer.eos_token_id
        logits = llm.model(inputs_embeds=torch.cat([prefix[row], embed(text)])[None]).logits[0]
        expected = -logits.log_softmax(1)[2:-1].gather(1, text[:, None])[:, 0]
        assert torch.allclose(nll[row], expected, atol=1e-4)


def test_a_llm_in_bfloat16_reads_vectors_in_float32(llm):
    """As on CUDA: the likelihood is nearly the same, and texts can be generated"""
    half = SimpleNamespace(model=copy.deepcopy(llm[0]).bfloat16(), tokenizer=llm[1], device="cpu")
    embed, texts = llm[0].get_input_embeddings(), text_tokens(half, ["red racer", "iron skillet, a job"])
    prefix = embed(torch.tensor([[5, 9, 2], [7, 7, 3]])).detach().requires_grad_()
    in_half, in_full = (text_nll(one, prefix, *texts).mean() for one in (half, llm_of(llm)))
    assert in_half.item() == pytest.approx(in_full.item(), rel=0.02)
    in_half.backward()
    assert prefix.grad.dtype == torch.float32 and len(generate(half, prefix)) == 2


def test_a_tokenizer_without_an_end_is_refused(llm, capsys):
    tokenizer = copy.deepcopy(llm[1])
    tokenizer.eos_token = None
    assert "EOS" in dies(capsys, text_tokens, SimpleNamespace(tokenizer=tokenizer), ["red racer"])


def test_generation_takes_the_likeliest_token_each_time(llm):
    llm = llm_of(llm)
    embed = llm.model.get_input_embeddings()
    prefix = embed(torch.tensor([[5, 9, 2], [7, 7, 3]]))
    ids = prefix.new_zeros(2, 0, dtype=torch.long)
    for _ in range(20):
        logits = llm.model(inputs_embeds=torch.cat([prefix, embed(ids)], 1)).logits[:, -1]
        ids = torch.cat([ids, logits.argmax(1, keepdim=True)], 1)
    eos = llm.tokenizer.eos_token_id
    cut = [row[:row.index(eos)] if eos in row else row for row in ids.tolist()]
    texts = [llm.tokenizer.decode(row, skip_special_tokens=True).strip() for row in cut]
    assert generate(llm, prefix) == texts


@pytest.mark.parametrize("batch_size", [1, 7, 512])
def test_an_epoch_reads_exactly_so_many_texts(monkeypatch, batch_size):
    numbers = []
    monkeypatch.setattr(pepler, "batch_loss", lambda args, model, run, rows, num_texts: (
        numbers.append(num_texts) or (model.bias * 0, torch.tensor([1.0, num_texts > 0]))))
    run, model = SimpleNamespace(labels={"train": range(50)}, texts=["a"] * 50), model_of("mf")
    args = SimpleNamespace(text_rows=9, text_weight=0.1, batch_size=batch_size)
    losses = pepler.train_epoch(args, model, run, torch.optim.SGD(model.parameters(), lr=0.1),
                                torch.Generator().manual_seed(0))
    assert sum(numbers) == 9 and losses == pytest.approx({"recommendation": 1.0, "text": 1.0})


def test_both_losses_move_the_vectors_and_the_llm_stays(prepared):
    _, run_dir, rows = prepared
    assert rows["features"].tolist() == ["mlp", "mf"] and rows["auc"].between(0, 1).all()
    assert rows[["bleu4", "rouge1", "distinct1", "usr"]].apply(lambda one: one.between(0, 1)).all(axis=None)
    texts = pd.read_csv(run_dir / "pepler.csv")
    assert texts.columns.tolist() == ["user", "item", "written", "generated"] and len(texts) == 4


def test_without_text_nothing_is_read_and_the_loss_is_another(prepared, tmp_path, monkeypatch):
    monkeypatch.setattr(pepler, "text_nll", None)  # whoever calls it fails
    source, run_dir, rows = prepared
    shutil.copytree(source, tmp_path / "run")
    control = run_pepler(tmp_path / "run", "--text-weight", 0)
    assert control["features"].tolist() == ["mlp without text", "mf without text"] and "bleu4" not in control
    assert not trained_states(run_dir) & trained_states(tmp_path / "run")


def test_poisoned_test_rows_change_nothing_that_is_trained(prepared, tmp_path):
    source, run_dir, _ = prepared
    poisoned(source, tmp_path / "run")
    run_pepler(tmp_path / "run")
    assert trained_states(run_dir) == trained_states(tmp_path / "run") and len(trained_states(run_dir)) == 2


def test_a_killed_run_goes_on_with_the_same_bits(prepared, tmp_path, monkeypatch):
    source, run_dir, rows = prepared
    shutil.copytree(source, tmp_path / "run")
    kill_at_call(monkeypatch, pepler, "train_epoch", 2)
    with pytest.raises(KeyboardInterrupt):
        run_pepler(tmp_path / "run")
    again = run_pepler(tmp_path / "run")
    assert trained_states(run_dir) == trained_states(tmp_path / "run")
    columns = ["auc", "logloss", "valid_auc", "bleu4", "rougeL"]
    assert again[columns].equals(rows[columns])


def test_a_process_of_its_own_writes_the_table(prepared, tmp_path):
    shutil.copytree(prepared[0], tmp_path / "run")
    options = [*SMALL, *TEXTS, "--head", "mf"]
    printed = run_process("baselines/pepler.py", "--run-dir", tmp_path / "run", *options)
    assert "baseline-pepler.parquet: 1 rows" in printed
