"""What stage 3 reads: interactions, and for each profile name the θ that stage 2 inferred for all users."""

from typing import NamedTuple

import torch

from userip.artifacts import fail, read_sidecar
from userip.options import option_name


class Rows(NamedTuple):
    """Interactions: user, item, fold int64 [R], label float32 [R]"""

    user: torch.Tensor
    item: torch.Tensor
    label: torch.Tensor
    fold: torch.Tensor  # index of the profiles that were inferred without this row
    num_items: int  # in the catalogue


def read_rows(interactions, split, fold=None):
    """The rows of a split; fold [R] is zero without folds"""
    frame = interactions[interactions["split"] == split]
    user, item, label = (torch.tensor(frame[name].to_numpy()) for name in ("user", "item", "label"))
    fold = torch.zeros_like(user) if fold is None else fold
    return Rows(user, item, label.float(), fold, int(interactions["item"].max()) + 1)


class Profile:
    """Profile name k of profiles.pt: θ of all users without each of the F folds and, last, with all evidence

    options: those of stage 2. is_warm [N]: has train rows. Only warm users with evidence move a codeword.
    """

    def __init__(self, stored, k, options, is_warm):
        self.name = stored["names"][k]
        self.theta = stored["profiles"][:, :, k]  # [F + 1, N, D]
        self.num_evidence = stored["num_evidence"][:, :, k]  # [F + 1, N]
        self.gain, self.noise = stored["gain"][:, k], stored["noise"][k]  # [N], [D, D], see `whiten`
        self.is_fitted = is_warm & (self.num_evidence[-1] > 0)  # [N]
        self.mean = self.theta[-1, self.is_fitted].mean(0)  # [D]
        self.deviation = self.theta - self.mean  # [F + 1, N, D]
        self.has_noise_level = options.get("method", "score") == "score"
        route = "rating" if options.get("route", ["none"]) == ["none"] else options["route"][k]
        self.reads_ratings = bool(options.get("ratings")) and "rating" in route.split("+")
        self.num_codes = 8 if self.reads_ratings else 3 if k == 1 else 4  # K, unless --codes says otherwise


def read_profiles(args, stored, rows, defaults):
    """profiles.pt -> a Profile per name; sets args.codes; exit code 2 when the options do not fit

    defaults: of all options of stage 3. After `02 --prior`, none of them may be changed.
    """
    if "fold" not in stored:
        stored |= {key: stored[key][None] for key in ("profiles", "num_evidence")}  # [1, N, P, D], [1, N, P]
    is_warm = torch.zeros(stored["profiles"].shape[1], dtype=torch.bool)
    is_warm[rows.user] = True
    options, names = read_sidecar(args, "profiles.pt")["options"], stored["names"]
    profiles = [Profile(stored, k, options, is_warm) for k in range(len(names))]
    sizes = args.codes or [profile.num_codes for profile in profiles]
    if "prior" in stored:
        sizes = [len(part["codebook"]) for part in stored["prior"].values()]
        allowed = defaults | {"run_dir": args.run_dir, "seed": args.seed}
        for name, value in vars(args).items():
            if value != allowed[name] and (name, value) != ("codes", sizes):
                fail(f"{option_name(name)}: the profiles have a codebook of {sizes} codes as prior, which "
                     f"only moves to its users' means now; leave it out, or run stage 2 without --prior")
    if len(sizes) != len(names):
        fail(f"--codes gives {len(sizes)} size(s) ({' '.join(map(str, sizes))}), but profiles.pt holds "
             f"{len(names)} profiles ({', '.join(names)}): give one size for each")
    num_fitted = int((stored["has_evidence"] & is_warm).sum())
    if num_fitted < max(sizes):
        fail(f"only {num_fitted} users have evidence and train rows, fewer than the {max(sizes)} codes asked "
             f"for: lower --codes")
    args.codes = sizes
    for profile, num_codes in zip(profiles, sizes):
        profile.num_codes = num_codes
    return profiles
