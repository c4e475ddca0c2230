"""Do our click-through models learn as well as a well-kept library's?

    python tests/compare_ctr.py --run-dir DIR

Trains seven models on the split of DIR (stage 1's artifacts; features `none`), ours and those of
DeepCTR-Torch (no requirement: install deepctr-torch 0.3.0 and tensorflow-cpu into an environment of its own),
with the same widths, batch size, patience and budget: eight candidates on all seeds, of which the one of
least mean valid logloss counts; best epoch by valid logloss restored, test scored once. Prints a row per
model; the standard error is that of one AUC on these test rows (Hanley and McNeil, 1982). The last line
is one JSON object.
"""

import argparse
import contextlib
import copy
import importlib
import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
ctr = importlib.import_module("04_train_ctr")

# penalty of the library: on a batch's summed loss and all rows of the tables; 1e-5 is its default
LIBRARY_GRID = {"lr": (0.001, 0.003), "l2": (1e-5, 1e-2, 1e-1, 1.0)}
NAMES = ("dcn", "dcnv2", "pnn", "deepfm", "autoint", "afm", "fibinet")


def library_model(name, sizes, l2, seed):
    """The library's model of that name, E = 8, 3 layers, MLP (16, 16), dropout .2"""
    from deepctr_torch.inputs import SparseFeat
    from deepctr_torch.models import AFM, DCN, PNN, AutoInt, DeepFM, FiBiNET

    columns = [SparseFeat(field, size, 8) for field, size in zip(("user", "item"), sizes)]
    deep = dict(dnn_hidden_units=(16, 16), dnn_dropout=0.2)
    penalties = dict(l2_reg_embedding=l2, seed=seed, device="cpu")
    linear = penalties | dict(l2_reg_linear=l2)
    makers = {
        "dcn": lambda: DCN(columns, columns, cross_num=3, **deep, **linear),
        "dcnv2": lambda: DCN(columns, columns, cross_num=3, cross_parameterization="matrix", **deep,
                             **linear),
        "pnn": lambda: PNN(columns, **deep, **penalties),
        "deepfm": lambda: DeepFM(columns, columns, **deep, **linear),
        # the library's default adds an MLP and first-order weights, which the formula, and ours, lacks
        "autoint": lambda: AutoInt([], columns, att_layer_num=3, att_head_num=2, dnn_hidden_units=(),
                                   **penalties),
        "afm": lambda: AFM(columns, columns, attention_factor=8, afm_dropout=0.2, **linear),
        "fibinet": lambda: FiBiNET(columns, columns, **deep, **linear)}
    with contextlib.redirect_stdout(io.StringIO()):
        return makers[name]()


def train_library(args, name, run, sizes, lr, l2, seed):
    """One of the library's models -> (valid logloss, probabilities of test rows), both of its best epoch"""
    torch.manual_seed(seed)
    model = library_model(name, sizes, l2, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    table = lambda split: torch.tensor(run.split[split][["user", "item"]].to_numpy(), dtype=torch.float32)
    rows, valid = table("train"), table("valid")
    label = torch.tensor(run.labels["train"], dtype=torch.float32)
    best, since, state = float("inf"), 0, None
    for _ in range(args.epochs):
        model.train()
        for batch in torch.randperm(len(rows)).split(args.batch_size):
            probability = model(rows[batch]).squeeze(1)
            loss = torch.nn.functional.binary_cross_entropy(probability, label[batch], reduction="sum")
            optimizer.zero_grad()
            (loss + model.get_regularization_loss().sum()).backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            found = ctr.logloss(run.labels["valid"], model(valid).squeeze(1).double().numpy())
        since += 1
        if found < best:
            best, since, state = found, 0, copy.deepcopy(model.state_dict())
        if since >= args.patience:
            break
    model.load_state_dict(state)
    with torch.no_grad():
        return best, model(table("test")).squeeze(1).double().numpy()


def compare_library(args, name, run, seeds):
    """The candidate of least mean valid logloss over the seeds -> test AUC [S], the options chosen"""
    sizes, best = (len(run.users), run.num_items), float("inf")
    for options in itertools.product(*LIBRARY_GRID.values()):
        found = [train_library(args, name, run, sizes, *options, seed) for seed in seeds]
        mean = np.mean([valid for valid, _ in found])
        if mean < best:
            best, chosen, kept = mean, options, found
    return [roc_auc_score(run.labels["test"], probabilities) for _, probabilities in kept], chosen


def compare_ours(args, name, run, seeds):
    """The same of ours, as stage 4 does it with --tune"""
    rows = list(ctr.train_group(args, name, run, ["none"], seeds).values())
    return [row["auc"] for row in rows], tuple(rows[0][key] for key in ctr.CHOICES)


def standard_error(auc, labels):
    """Of one AUC on these rows (Hanley and McNeil, 1982)"""
    positive, negative = int(np.sum(labels == 1)), int(np.sum(labels == 0))
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    variance = auc * (1 - auc) + (positive - 1) * (q1 - auc**2) + (negative - 1) * (q2 - auc**2)
    return float(np.sqrt(variance / (positive * negative)))


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw, allow_abbrev=False)
    parser.add_argument("--run-dir", required=True, help="a run with stages 1 to 3")
    parser.add_argument("--models", nargs="+", choices=NAMES, default=NAMES, help="which of them")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of start and batches")
    own = parser.parse_args()
    args = ctr.parse_args(["--run-dir", own.run_dir, "--batch-size", "1024", "--patience", "4", "--tune"])
    run, seeds, told = ctr.read_run(args.run_dir, ["none"]), list(range(own.seeds)), {}
    print("| model | ours | rate, penalties | DeepCTR-Torch | rate, penalty | difference | standard error |\n"
          "|---|---|---|---|---|---|---|")
    for name in own.models:
        (ours, options), (library, others) = (way(args, name, run, seeds)
                                              for way in (compare_ours, compare_library))
        error = standard_error(np.mean(library), run.labels["test"])
        spread = lambda values: f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
        plain = lambda values: " ".join(f"{value:g}" for value in values)
        told[name] = round(float(np.mean(ours) - np.mean(library)), 4)
        print(f"| {name} | {spread(ours)} | {plain(options)} | {spread(library)} | {plain(others)} | "
              f"{told[name]:+.4f} | {error:.4f} |", flush=True)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
