"""The item bank: codes of items by what a frozen LLM reads in their texts.

An item's vector is the LLM's hidden states at θ̄. A kernel ridge regression of other items' mean ratings on
their vectors foretells the item's own, and the nearest codeword of this number is the item's code. No rating
of an item's own fold of the items is in its code, so also items that nobody has rated have one.
# differs from the paper: it has codes of users only.
"""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from torch.nn import functional as F

from common import VectorQuantizer, usage_of
from userip.artifacts import fail, read_artifacts, read_sidecar, write_artifact
from userip.cleaning import clean_items
from userip.evidence import item_texts
from userip.new_users import LIMITS
from userip.rating_means import foretold_means, residual_means
from userip.score import BLOCK
from userip.tables import read_frame

DEPTHS = (1 / 15, 1 / 4, 1 / 2, 4 / 5)  # of the LLM's layers: words alone, in context, what they mean
STEEPNESS, RIDGE = 2.0, 2.0  # of the kernel; noise of a mean of many ratings, by the kernel's variance
MOST_LANDMARKS = 4096  # items that the regression is fitted to: it costs their number cubed
NUM_FOLDS = 10  # of the items


# ----------------------------------------------------------------------------------------------------------
# stage 2: vectors
# ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def hidden_states(prompt, texts, soft, index, max_tokens):
    """The mean hidden state of each text's tokens after some of the LLM's layers, with soft [P, S D] in the
    prompt: index [R] -> float32 [R, len(DEPTHS) · D]
    """
    num_layers = prompt.model.config.num_hidden_layers
    layers = [int(depth * num_layers) for depth in DEPTHS]  # 0: the embeddings
    may_read = torch.ones(prompt.num_profiles, dtype=torch.bool, device=prompt.device)
    keys = prompt.soft_keys(soft[None].to(prompt.device), may_read)
    vectors = torch.empty(len(index), len(layers) * prompt.embedding.shape[1])
    for batch in prompt.batches(texts, index, max_tokens):
        chosen = texts.select(index[batch])
        prompt.num_tokens[prompt.purpose] += int(chosen.length.sum())
        owner = torch.zeros(len(batch), dtype=torch.long, device=prompt.device)
        # a state predicts the next token: one more token, and the last one's own state is there, too
        ids = F.pad(chosen.ids, (0, 1)).to(prompt.device)
        states = prompt.hidden_cached(ids, owner, keys, all_layers=True)
        length = chosen.length[:, None].to(prompt.device)
        is_token = torch.arange(chosen.ids.shape[1], device=prompt.device) < length  # [B, T]
        weight = (is_token / length.clamp(min=1))[:, :, None]
        means = [(states[layer][:, 1:].float() * weight).sum(1) for layer in layers]  # of [B, D]
        vectors[batch] = torch.cat(means, 1).cpu()
    return vectors


def infer_items(run, soft):
    """The vectors of the whole catalogue, in blocks that are on disk when they are done: float32 [M, V]"""
    texts, run.prompt.purpose = item_texts(run.prompt, run.evidence[-1].tokenizer, run.items), "item bank"
    # not in one batch: the length of a text that only test rows have would round the states of others
    is_warm = torch.zeros(len(run.items), dtype=torch.bool)
    is_warm[run.observed.train.item] = True
    blocks = [block for mask in (is_warm, ~is_warm) for block in mask.nonzero()[:, 0].split(BLOCK)]
    run.progress.compute_blocks("items", blocks, "item", lambda block: hidden_states(
        run.prompt, texts, soft, block, run.args.tokens_per_batch))
    vectors = torch.cat([run.progress.read(f"items-{number}") for number in range(len(blocks))])
    return vectors[torch.cat(blocks).argsort()]


def infer_new_items(args):
    """Write the vectors of the items of --only-items' table as new_item_vectors.pt."""
    from userip.setup import load_again  # here: the LLM's libraries load for seconds, and stage 3 needs none

    options = read_sidecar(args, "profiles.pt")["options"]
    if not options.get("items"):
        fail(f"--only-items: {args.run_dir}/profiles.pt was made without --items: run stages 2 and 3 with it")
    stored, _ = read_artifacts(args, "profiles.pt", "item_vectors.pt")
    items, _ = clean_items(read_frame(args.only_items, ["item_id", "title"], LIMITS))  # as stage 1 does
    if items["item_id"].duplicated().any():
        item = items.loc[items["item_id"].duplicated(), "item_id"].iloc[0]
        fail(f"{args.only_items} has the item_id {item!r} twice: give each item one row")
    known = read_artifacts(args, "items.parquet")[0]["item_id"]
    if num_known := int(items["item_id"].isin(known).sum()):
        print(f"{num_known} of {len(items)} items are in the run already: here they are read as new ones")
    tokenizer, prompt = load_again(args, stored, options)
    texts = item_texts(prompt, tokenizer, items)
    vectors = hidden_states(prompt, texts, stored["shared"], torch.arange(len(items)),
                            options.get("tokens_per_batch") or 4096)
    tensors = {"vectors": vectors, "item_id": items["item_id"].tolist()}
    path = write_artifact(args, "new_item_vectors.pt", tensors, ["profiles.pt", "item_vectors.pt"],
                          items=len(items))
    print(f"wrote {path}: {len(items):,} new items x {vectors.shape[1]}")


# ----------------------------------------------------------------------------------------------------------
# stage 3: the regression and the codes
# ----------------------------------------------------------------------------------------------------------


def landmarks_of(vectors, train):
    """The items with the most train rows, int64 [L], and the mean and deviation of their vectors [V]; a
    deviation of 1e30 where they are all alike, which says nothing
    """
    count = np.bincount(train["item"], minlength=len(vectors))
    order = torch.from_numpy(np.argsort(-count, kind="stable"))[:int((count > 0).sum())]
    landmarks = order[:MOST_LANDMARKS].sort().values
    scale, mean = torch.std_mean(vectors[landmarks], 0, correction=0)
    return landmarks, mean, torch.where(scale > 1e-6 * scale.max(), scale, 1e30)


def similarity(vectors, landmarks, mean, scale):
    """exp(STEEPNESS (cos - 1)) of standardized vectors [R, V] and [L, V] -> float32 [R, L]; 1 of equals"""
    one, two = (F.normalize((part - mean) / scale, dim=1) for part in (vectors, landmarks))
    return (STEEPNESS * (one @ two.T - 1)).exp()


def fit_ridge(kernel, target, weight):
    """Weighted kernel ridge regression: kernel [L, L], target [L], weight [L] (above 0) -> coefficients
    float64 [L] and the intercept: a mean's prediction is kernel · coefficients + intercept
    """
    weight = weight / weight.mean()
    intercept = (weight * target).sum() / weight.sum()
    factor = torch.linalg.cholesky(kernel.double() + torch.diag(RIDGE / weight))
    return torch.cholesky_solve((target - intercept)[:, None], factor)[:, 0], intercept


def predict(vectors, fitted):
    """What a regression foretells of items: vectors [R, V] -> float64 [R]. In blocks: no [R, L] is held."""
    kernel_parts = [fitted[name] for name in ("landmarks", "mean", "scale")]
    return torch.cat([similarity(block, *kernel_parts).double() @ fitted["coefficients"] + fitted["intercept"]
                      for block in vectors.split(BLOCK)])


def codewords(values, num_codes):
    """The middle quantiles of values [R]: float32 [K, 1], from the worst to the best items"""
    values = values if len(values) else torch.zeros(1, dtype=torch.float64)
    return values.quantile((torch.arange(num_codes, dtype=torch.float64) + 0.5) / num_codes)[:, None].float()


def nearest(values, codebook):
    """Eq. 6: values [R], codebook [K, 1] -> codes int64 [R]"""
    return VectorQuantizer(codebook)(values.float()[:, None])[1]


def foretell(vectors, train, seed, num_codes):
    """What other items' ratings say of each item, by its vector: vectors [M, V], train: frame of rows with
    user, item, rating -> namespace of values float64 [M], codes int64 [M], both without the item's own fold,
    and `fitted` for items that come later

    The standardization and the landmarks are of items that have train rows: their texts, in any fold, are no
    labels. Codewords are those of the own fold's values, which have read no rating of it.
    """
    num_items = len(vectors)
    fold = torch.from_numpy(np.random.default_rng([seed, 4]).permutation(num_items) % NUM_FOLDS)
    is_warm = torch.from_numpy(np.bincount(train["item"], minlength=num_items) > 0)
    landmarks, mean, scale = landmarks_of(vectors, train)
    kernel = similarity(vectors[landmarks], vectors[landmarks], mean, scale)  # [L, L]

    def fit(left_out):
        rows, is_known = train[fold.numpy()[train["item"]] != left_out], fold[landmarks] != left_out
        known = landmarks[is_known]
        target, weight = (torch.from_numpy(part)[known] for part in residual_means(rows, num_items))
        coefficients, intercept = fit_ridge(kernel[is_known][:, is_known], target, weight)
        return {"mean": mean, "scale": scale, "landmarks": vectors[known], "coefficients": coefficients,
                "intercept": intercept[None]}

    values, codes = torch.zeros(num_items, dtype=torch.float64), torch.zeros(num_items, dtype=torch.long)
    for left_out in fold.unique().tolist():
        own = fold == left_out
        if (is_warm & ~own).any():
            values[own] = predict(vectors[own], fit(left_out))
        codes[own] = nearest(values[own], codewords(values[own & is_warm], num_codes))
    fitted = fit(-1) | {"codebook": codewords(values[is_warm], num_codes)}
    return SimpleNamespace(values=values, codes=codes, fitted=fitted, is_warm=is_warm)


def weighted_correlation(one, two, weight):
    one, two = (values - np.average(values, weights=weight) for values in (one, two))
    product = lambda first, second: (weight * first * second).sum()
    return float(product(one, two) / np.sqrt(max(product(one, one) * product(two, two), 1e-30)))


def write_item_bank(args, interactions, num_codes):
    """Code all items -> item_bank.parquet, item_codebook.pt. Prints how well other items' ratings foretell
    an item's, by the LLM's vectors and by words alone (the control `tfidf` of stage 4).
    """
    stored, items = read_artifacts(args, "item_vectors.pt", "items.parquet")
    train = interactions[interactions["split"] == "train"]
    found = foretell(stored["vectors"], train, args.seed, num_codes)
    target, weight = residual_means(train, len(items))
    by_words, _ = foretold_means(items, train, args.seed)
    correlation, of_words = (weighted_correlation(values, target, weight)
                             for values in (found.values.numpy(), by_words))
    bank = items[["item", "item_id"]].assign(code=found.codes.numpy())
    _, perplexity = usage_of(bank["code"].to_numpy(), num_codes)
    facts = {"codes": num_codes, "items": len(bank), "correlation": correlation,
             "correlation_of_words": of_words, "perplexity": perplexity}
    inputs = ["profiles.pt", "item_vectors.pt", "interactions.parquet", "items.parquet"]
    write_artifact(args, "item_codebook.pt", found.fitted, inputs, **facts)
    path = write_artifact(args, "item_bank.parquet", bank, [*inputs, "item_codebook.pt"], **facts)
    print(f"wrote {path}: {len(bank):,} items, {int((~found.is_warm).sum()):,} of them without train rows | "
          f"correlation with items' mean ratings, out of fold: {correlation:.3f}, by words alone "
          f"{of_words:.3f} | perplexity {perplexity:.2f} of {num_codes}"
          + "  <- below K/2: items hardly differ" * (perplexity < num_codes / 2))


def apply_to_items(args):
    """Codes for the new items of `02 --only-items`"""
    new, fitted = read_artifacts(args, "new_item_vectors.pt", "item_codebook.pt")
    codes = nearest(predict(new["vectors"], fitted), fitted["codebook"]).numpy()
    path = write_artifact(args, "new_item_codes.parquet",
                          pd.DataFrame({"item_id": new["item_id"], "code": codes}),
                          ["new_item_vectors.pt", "item_codebook.pt"], items=len(codes))
    print(f"wrote {path}: {len(codes):,} new items")
