"""The report's pictures. Each function returns an <img>, and writes the picture and its data to a folder."""

import io

import matplotlib
import numpy as np
import pandas as pd
import torch

from common import fig4_mask, usage_of
from userip.artifacts import whole_file
from userip.page import image

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)


def save(folder, name, figure, data, description):
    """The figure as <img> and as folder/name.png, its data frame as folder/name.csv"""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    for suffix, content in ((".png", buffer.getvalue()), (".csv", data.to_csv(index=False).encode())):
        with whole_file(folder / f"{name}{suffix}") as file:
            file.write(content)
    return image(buffer.getvalue(), description)


def draw_usage(folder, names, codes, sizes):
    """Users per code: codes int [N, P], sizes K by profile"""
    rows = []
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 2.6), squeeze=False)
    for axis, name, column, num_codes in zip(axes[0], names, codes.T, sizes):
        counts, perplexity = usage_of(column, num_codes)
        rows += [(name, code, count) for code, count in enumerate(counts)]
        axis.bar(range(num_codes), counts, color=[plt.cm.tab10(code % 10) for code in range(num_codes)])
        axis.set(title=f"{name}: perplexity {perplexity:.2f} of {num_codes}", xlabel="code", ylabel="users",
                 xticks=range(num_codes)[:20])
    figure.tight_layout()
    data = pd.DataFrame(rows, columns=["profile", "code", "users"])
    return save(folder, "usage", figure, data, "Bars: users per code, for each profile")


def draw_map(folder, title, plane, group, labels, marked):
    """Scatter plot of users: plane [N, 2], group int [N] (an index into labels); marked: {user id: index}"""
    figure, axis = plt.subplots(figsize=(4.2, 3.6))
    for index, label in enumerate(labels):
        axis.scatter(*plane[group == index].T, s=5, alpha=0.6, color=plt.cm.tab10(index % 10),
                     label=str(label))
    for user_id, index in marked.items():
        axis.scatter(*plane[index], s=60, facecolors="none", edgecolors="black")
        axis.annotate(user_id, plane[index], fontsize=6, xytext=(5, 5), textcoords="offset points",
                      bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5})
    axis.set(title=title, xticks=[], yticks=[])
    axis.legend(markerscale=3, fontsize=7, loc="best")
    names = [labels[index] if index < len(labels) else "unknown" for index in group]
    data = pd.DataFrame({"x": plane[:, 0], "y": plane[:, 1], "group": names})
    return save(folder, f"map-{title.replace(' ', '-')}", figure, data,
                f"Scatter plot of users' profiles in two dimensions: {title}; the users shown are ringed")


def draw_maps(folder, run, chosen, rng):
    """Profiles in two dimensions, by code and by truth; the users in `chosen` are ringed -> list of <img>"""
    pictures = []
    for k, name in enumerate(run.names):
        mask, codes = run.has_evidence[:, k], run.codes[run.has_evidence[:, k].numpy(), k]
        z = run.z[k][mask] - run.z[k][mask].mean(0)  # [N', C]
        plane = (z @ torch.linalg.svd(z, full_matrices=False).Vh[:2].T).numpy()  # [N', 2]
        if plane.shape[1] == 1:  # C = 1: a random height, so that users do not hide each other
            plane = np.column_stack([plane, rng.random(len(plane))])
        row = np.cumsum(mask.numpy()) - 1  # of each user in the plane
        marked = {run.user_ids[user]: row[user] for user in chosen if mask[user]}
        pictures.append(draw_map(folder, f"{name} by code", plane, codes, range(run.sizes[k]), marked))
        if f"true_{name}" in run.users:
            truth, labels = pd.factorize(run.users[f"true_{name}"][mask.numpy()], sort=True)
            pictures.append(draw_map(folder, f"{name} by truth", plane, truth, labels, marked))
    return pictures


def draw_attention(folder, name, before, after):
    """Figure 7: a row per user, a column per word of the sentence, colours from a user's least to most
    attention. before, after: by user (words, is_content, weights)
    """
    width = max(len(words) for words, _, _ in after)
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.5 * len(after) + 1.4), squeeze=False)
    rows = []
    for axis, when, sentences in zip(axes[0], ("before", "after"), (before, after)):
        grid = np.full((len(sentences), width), np.nan)
        for user, (words, is_content, weights) in enumerate(sentences):
            grid[user, :len(words)] = (weights - weights.min()) / (np.ptp(weights) or 1.0)
            for column, word in enumerate(words):
                axis.text(column, user, word, ha="center", va="center", fontsize=6,
                          color="white" if grid[user, column] > 0.6 else "black")
                rows.append((user, when, word, bool(is_content[column]), weights[column]))
        axis.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set(title=f"{name}: {when} tuning", xticks=[], yticks=range(len(sentences)), ylabel="user")
    data = pd.DataFrame(rows, columns=["user", "when", "word", "is_content", "attention"])
    return save(folder, f"attention-{name}", figure, data, f"Heat maps of the attention from the words of "
                f"a sentence to the soft token of {name}, before and after tuning, scaled per user")


def draw_curves(folder, curves):
    """Losses by step: {title: list of numbers}"""
    figure, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 2.4), squeeze=False)
    for axis, (title, values) in zip(axes[0], curves.items()):
        axis.plot(range(1, len(values) + 1), values)
        axis.set_title(title, fontsize=8)
    figure.tight_layout()
    data = pd.DataFrame([(title, step, value) for title, values in curves.items()
                         for step, value in enumerate(values, 1)], columns=["curve", "step", "value"])
    return save(folder, "curves", figure, data, "Lines: " + "; ".join(curves))


def draw_mask(folder, names):
    """Fig. 4: which position attends to which, with three tokens per name and task text, four of evidence"""
    num_profiles = len(names)
    segment = torch.tensor([*np.repeat(range(num_profiles + 1), 3), *4 * [num_profiles + 1]])
    is_soft = torch.zeros(len(segment), dtype=torch.bool)
    is_soft[2:3 * num_profiles:3] = True
    mask = fig4_mask(segment, is_soft, torch.ones(1, num_profiles, dtype=torch.bool))[0, 0]
    labels = [text for name in names for text in (name, "…", f"θ {name}")]
    labels += ["task", "…", "text", "h1", "h2", "h3", "h4"]
    figure, axis = plt.subplots(figsize=(4.2, 4.2))
    axis.imshow(mask.numpy(), cmap="Blues", vmax=1.6)
    axis.set(ylabel="reads", xlabel="is read", title="attention mask (Fig. 4)")
    axis.set_xticks(range(len(labels)), labels, rotation=90, fontsize=7)
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    data = pd.DataFrame(mask.int().numpy(), columns=labels).assign(reads=labels)
    return save(folder, "mask", figure, data, "Attention mask: name and soft tokens of one profile see "
                "only each other; evidence sees everything before it")
