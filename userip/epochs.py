"""Training by epochs with early stopping, each epoch a finished piece on disk: a killed run goes on with the
same bits.
"""

import math
import time

import torch

from userip.artifacts import fail


def train_epochs(args, finished, key, model, weight_decay, epoch):
    """Train the model by AdamW until the valid loss does not fall for args.patience epochs -> the model with
    the weights of the best epoch, and how many epochs there were. finished: see userip.baseline; key: the names and seed that tell the training
    from others, the seed last; epoch(optimizer, generator) trains one and gives {name: loss}, valid loss
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=weight_decay)
    generator, best = torch.Generator().manual_seed(key[-1]), (math.inf, 0, None)

    def state_of_epoch():
        losses, valid = epoch(optimizer, generator)
        return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "losses": losses,
                "generator": generator.get_state(), "valid": valid}

    for number in range(1, args.epochs + 1):
        started = time.time()
        state = finished.compute([*key, weight_decay, number], state_of_epoch)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        losses = " ".join(f"{name} {loss:.4f}" for name, loss in state["losses"].items())
        print(f"{key[0]} seed {key[-1]} epoch {number:02d}/{args.epochs} | {losses} | valid "
              f"{state['valid']:.4f} | {time.time() - started:.1f}s", flush=True)
        if state["valid"] < best[0]:
            best = state["valid"], number, state["model"]
        if number - best[1] >= args.patience:
            break
    if best[2] is None:
        fail(f"{key[0]} diverged with --lr {args.lr:g}: no finite loss on valid rows; lower it")
    model.load_state_dict(best[2])
    return model.eval(), number
