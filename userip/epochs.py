"""Training by epochs with early stopping; what it needs to go on is on disk after each epoch: a killed run
goes on with the same bits.
"""

import copy
import math
import time

import torch

from userip.artifacts import fail


def train_epochs(args, finished, key, model, epoch, rate_falls=False):
    """Train the model by AdamW until the valid loss does not fall for args.patience epochs -> the model with
    the weights of the best epoch, and how many epochs there were. rate_falls: the learning rate falls from
    epoch to epoch, linearly, to 0 after the last one

    finished: see userip.baseline; key: the names and seed that tell the training from others, the seed last;
    epoch(optimizer, generator) trains one and gives {name: loss}, valid loss.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=args.weight_decay)
    generator, named = torch.Generator().manual_seed(key[-1]), f"{key[0]} seed {key[-1]}"
    key = [*key, args.weight_decay, args.epochs, args.patience]
    state = finished.read(key) or {"number": 0, "seconds": 0.0, "loss": math.inf, "best": 0,
                                   "best_model": None}
    if state["number"]:
        print(f"{named}: {state['number']} epochs were finished before")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
    while state["number"] < args.epochs and state["number"] - state["best"] < args.patience:
        started = time.time()
        for group in optimizer.param_groups:
            group["lr"] = args.lr * (1 - rate_falls * state["number"] / args.epochs)
        losses, valid = epoch(optimizer, generator)
        state["number"] += 1
        if valid < state["loss"]:
            state |= {"loss": valid, "best": state["number"], "best_model": copy.deepcopy(model.state_dict())}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                  "generator": generator.get_state(), "seconds": state["seconds"] + time.time() - started}
        finished.write(key, state)
        print(f"{named} epoch {state['number']:02d}/{args.epochs} | "
              + " ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
              + f" | valid {valid:.4f} | {time.time() - started:.1f}s", flush=True)
    if state["best_model"] is None:
        fail(f"{named} diverged with --lr {args.lr:g}: no finite loss on valid rows; lower it")
    finished.seconds += state["seconds"]
    model.load_state_dict(state["best_model"])
    return model.eval(), state["number"]
