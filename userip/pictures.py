"""The report's pictures. Each function returns an <img>, and writes the picture and its data to a folder."""

import base64
import html
import io
import json

import matplotlib
import numpy as np
import pandas as pd
import torch

from common import usage_of
from userip.artifacts import whole_file

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)


def save(folder, name, figure, data, description):
    """The figure as <img> with an alternative text, and as folder/name.png, its data frame as folder/name.csv"""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    for suffix, content in ((".png", buffer.getvalue()), (".csv", data.to_csv(index=False).encode())):
        with whole_file(folder / f"{name}{suffix}") as file:
            file.write(content)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{encoded}">'


def draw_usage(folder, run):
    """Users per code of each profile"""
    rows = []
    figure, axes = plt.subplots(1, len(run.names), figsize=(3.2 * len(run.names), 2.6), squeeze=False)
    for axis, name, column, num_codes in zip(axes[0], run.names, run.codes.T, run.sizes):
        counts, perplexity = usage_of(column, num_codes)
        rows += [(name, code, count) for code, count in enumerate(counts)]
        axis.bar(range(num_codes), counts, color=[plt.cm.tab10(code % 10) for code in range(num_codes)])
        axis.set(title=f"{name}: perplexity {perplexity:.2f} of {num_codes}", xlabel="code", ylabel="users",
                 xticks=range(num_codes)[:20])
    figure.tight_layout()
    data = pd.DataFrame(rows, columns=["profile", "code", "users"])
    return save(folder, "usage", figure, data, "Bars: users per code, for each profile")


def draw_map(folder, title, plane, groups, labels, marked):
    """Scatter plot of users: plane [N, 2], groups [N], each one of the labels; marked: {user id: index}"""
    figure, axis = plt.subplots(figsize=(4.2, 3.6))
    for index, label in enumerate(labels):
        axis.scatter(*plane[groups == label].T, s=5, alpha=0.6, color=plt.cm.tab10(index % 10), label=label)
    for user_id, index in marked.items():
        axis.scatter(*plane[index], s=60, facecolors="none", edgecolors="black")
        axis.annotate(user_id, plane[index], fontsize=6, xytext=(5, 5), textcoords="offset points",
                      bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5})
    axis.set(title=title, xticks=[], yticks=[])
    axis.legend(markerscale=3, fontsize=7, loc="best")
    data = pd.DataFrame({"x": plane[:, 0], "y": plane[:, 1], "group": groups})
    return save(folder, f"map-{title.replace(' ', '-')}", figure, data,
                f"Scatter plot of users' profiles in two dimensions: {title}; the users shown are ringed")


def draw_maps(folder, run, chosen):
    """Profiles in two dimensions, by code and by truth; the users in `chosen` are ringed -> list of <img>"""
    pictures, rng = [], np.random.default_rng(0)
    for k, name in enumerate(run.names):
        users = np.flatnonzero(run.has_evidence[:, k])
        z = run.z[k][users] - run.z[k][users].mean(0)  # [N', C]
        plane = (z @ torch.linalg.svd(z, full_matrices=False).Vh[:2].T).numpy()  # [N', 2]
        if plane.shape[1] == 1:  # C = 1: a random height, so that users do not hide each other
            plane = np.column_stack([plane, rng.random(len(plane))])
        marked = {run.user_ids[user]: index for index, user in enumerate(users) if user in chosen}
        pictures.append(draw_map(folder, f"{name} by code", plane, run.codes[users, k], range(run.sizes[k]),
                                 marked))
        if f"true_{name}" in run.users:
            truth = run.users[f"true_{name}"].to_numpy()[users]
            pictures.append(draw_map(folder, f"{name} by truth", plane, truth, np.unique(truth), marked))
    return pictures


def draw_attention(folder, name, num_noise, sentences, attention):
    """Figure 7: a row per user, a column per word of the sentence, colours from a user's least to most
    attention. sentences: lists of words, the content behind num_noise; attention: {"before": a list of
    arrays [words], "after": the same}
    """
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.5 * len(sentences) + 1.4), squeeze=False)
    rows = []
    for axis, (when, by_user) in zip(axes[0], attention.items()):
        grid = np.full((len(sentences), max(map(len, sentences))), np.nan)
        for user, (words, weights) in enumerate(zip(sentences, by_user)):
            grid[user, :len(words)] = (weights - weights.min()) / (np.ptp(weights) or 1.0)
            for column, word in enumerate(words):
                axis.text(column, user, word, ha="center", va="center", fontsize=6,
                          color="white" if grid[user, column] > 0.6 else "black")
                rows.append((user, when, word, column >= num_noise, weights[column]))
        axis.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set(title=f"{name}: {when} tuning", xticks=[], yticks=range(len(sentences)), ylabel="user")
    data = pd.DataFrame(rows, columns=["user", "when", "word", "is_content", "attention"])
    return save(folder, f"attention-{name}", figure, data, f"Heat maps of the attention from the words of "
                f"a sentence to the soft token of {name}, before and after tuning, scaled per user")


def draw_curves(folder, run):
    """Losses by step: the tiny LLM, the shared start of stage 2, eq. 5 of stage 3"""
    curves = {}
    if run.stored["llm"] == "tiny":
        path = folder.parent / "tiny_llm" / "curve.json"
        curves["tiny LLM: nats per token, by step"] = json.loads(path.read_text())
    curves["shared θ: nats per row, by step"] = run.sidecars["profiles.pt"]["curve"]
    for key, values in pd.DataFrame(run.sidecars["codebook.pt"].get("curve")).items():
        curves[f"stage 3: {key.replace('_', ' ')}, by epoch"] = list(values)
    figure, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 2.4), squeeze=False)
    for axis, (title, values) in zip(axes[0], curves.items()):
        axis.plot(range(1, len(values) + 1), values)
        axis.set_title(title, fontsize=8)
    figure.tight_layout()
    data = pd.DataFrame([(title, step, value) for title, values in curves.items()
                         for step, value in enumerate(values, 1)], columns=["curve", "step", "value"])
    return save(folder, "curves", figure, data, "Lines: " + "; ".join(curves))
