"""Fields beside the codes: controls that need no LLM, from the train and support rows of `split`, frames by
name with columns user, item, rating; and the profiles as vectors.
"""

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import TruncatedSVD
from sklearn.preprocessing import normalize


def cf_codes(run, seed, rank=8):
    """k-means of users' factors, one field per size: int64 [N, P]. Factors: truncated SVD of train rows; the
    support rows of cold users are folded in. A user with neither has the code K.
    """
    train, support = (sparse.csr_matrix((np.ones(len(rows)), (rows["user"], rows["item"])),
                                        shape=(len(run.users), run.num_items))
                      for rows in (run.split["train"], run.split["support"]))
    svd = TruncatedSVD(min(rank, run.num_items - 1), random_state=seed).fit(train)
    factors = normalize(svd.transform(train + support))  # the direction of taste, not the number of items
    is_warm, has_rows = train.getnnz(1) > 0, (train + support).getnnz(1) > 0
    codes = [KMeans(size, n_init=4, random_state=seed).fit(factors[is_warm]).predict(factors)
             for size in run.code_sizes]
    codes = [np.where(has_rows, code, size) for code, size in zip(codes, run.code_sizes)]
    return np.stack(codes, 1).astype(np.int64)


def leniency_codes(split, seed, num_folds=5):
    """Quartile of a user's mean residual, rating less the item's mean: {name: int64 [n, 1]}; 4 is unknown. A
    train row's code leaves out its own fold of the rows, or it would contain its own label.
    """
    train = split["train"]
    rated = pd.concat([train, split["support"]])
    fold = np.random.default_rng([seed, 3]).integers(num_folds, size=len(rated))
    fold[len(train):] = num_folds  # support rows are in no fold: they are no train rows

    def user_means(left_out):
        rows = rated[fold != left_out]
        residual = rows["rating"] - rows["item"].map(rows.groupby("item")["rating"].mean())
        return residual.groupby(rows["user"]).mean()

    all_means = user_means(left_out=-1)  # no fold
    edges = all_means[all_means.index.isin(train["user"])].quantile([0.25, 0.5, 0.75])

    def quartile(means, user):
        mean = means.reindex(user)
        return np.where(mean.isna(), 4, np.searchsorted(edges, mean))[:, None].astype(np.int64)

    codes = {name: quartile(all_means, frame["user"]) for name, frame in split.items()}
    for left_out in range(num_folds):
        is_left_out = fold[:len(train)] == left_out
        codes["train"][is_left_out] = quartile(user_means(left_out), train["user"][is_left_out])
    return codes


def profile_vectors(run, device):
    """Table 3, w/o VQ: the profiles in the codebook's coordinates as the last fields of Rows. A train row
    reads those without its own fold, the others the last ones, with all evidence.
    """
    profiles = run.stored["profiles"].reshape(-1, len(run.users), *run.stored["profiles"].shape[-2:])
    vectors = [(profiles[:, :, k] - run.codebook[name]["mean"]) @ run.codebook[name]["transform"]
               for k, name in enumerate(run.names)]  # of [F + 1, N, C]
    fold = dict.fromkeys(run.labels, len(profiles) - 1) | {"train": run.stored.get("fold", 0)}
    users = {name: (torch.tensor(run.split[name]["user"].to_numpy()) + len(run.users) * index).to(device)
             for name, index in fold.items()}
    return {"vectors": torch.cat(vectors, 2).flatten(0, 1).to(device),  # [(F + 1) N, ΣC]
            "dims": tuple(z.shape[2] for z in vectors), "users": users}
