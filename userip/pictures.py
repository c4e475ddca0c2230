"""The report's pictures: each as an <img> with a description, as PNG, and as csv."""

import base64
import html
import io
import json

import matplotlib
import numpy as np
import pandas as pd
import torch

from common import VectorQuantizer, fig4_mask, usage_of
from userip.artifacts import whole_file

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402  (after the backend is chosen)


def picture(folder, name, figure, data, description):
    """The picture as <img>; also as folder/name.png, and what it shows as folder/name.csv"""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    for suffix, content in ((".png", buffer.getvalue()), (".csv", data.to_csv(index=False).encode())):
        with whole_file(folder / f"{name}{suffix}") as file:
            file.write(content)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{encoded}">'


def draw_usage(folder, run):
    """Users per code"""
    rows = []
    figure, axes = plt.subplots(1, len(run.names), figsize=(3.2 * len(run.names), 2.6), squeeze=False)
    for axis, name, codes, num_codes in zip(axes[0], run.names, run.codes.T, run.sizes):
        counts, perplexity = usage_of(codes, num_codes)
        rows += [(name, code, count) for code, count in enumerate(counts)]
        axis.bar(range(num_codes), counts, color=[plt.cm.tab10(code % 10) for code in range(num_codes)])
        axis.set(title=f"{name}: perplexity {perplexity:.2f} of {num_codes}", xlabel="code", ylabel="users",
                 xticks=range(num_codes)[:20])
    figure.tight_layout()
    data = pd.DataFrame(rows, columns=["profile", "code", "users"])
    return picture(folder, "usage", figure, data, "Bars: users per code, for each profile")


def draw_map(folder, plane, colour, title, labels, marked):
    """plane [N, 2], colour [N] int -> scatter plot; marked: {user id: row} of those to be ringed"""
    figure, axis = plt.subplots(figsize=(4.2, 3.6))
    for value, label in enumerate(labels):
        mask = colour == value
        axis.scatter(*plane[mask].T, s=5, alpha=0.6, color=plt.cm.tab10(value % 10), label=str(label))
    for user, row in marked.items():
        axis.scatter(*plane[row], s=60, facecolors="none", edgecolors="black")
        axis.annotate(user, plane[row], fontsize=6, xytext=(5, 5), textcoords="offset points",
                      bbox={"facecolor": "white", "alpha": 0.7, "linewidth": 0, "pad": 0.5})
    axis.set(title=title, xticks=[], yticks=[])
    axis.legend(markerscale=3, fontsize=7, loc="best")
    data = pd.DataFrame({"x": plane[:, 0], "y": plane[:, 1], "group": [
        labels[value] if value < len(labels) else "unknown" for value in colour]})
    return picture(folder, f"map-{title.replace(' ', '-')}", figure, data,
                   f"Scatter plot of users' profiles in two dimensions: {title}; the users shown are ringed")


def draw_maps(folder, run, chosen, rng):
    """Profiles in two dimensions, by code and by truth: {profile: pictures}, typical users by code"""
    maps, typical = {}, {}
    user_ids = run.bank["user_id"].astype(str)
    for k, (name, num_codes) in enumerate(zip(run.names, run.sizes)):
        part, has_evidence = run.codebook[name], run.stored["num_evidence"][:, k] > 0
        z = (run.stored["profiles"][:, k] - part["mean"]) @ part["transform"]  # [N, C]
        codewords, codes, _ = VectorQuantizer(part["codebook"])(z)
        distance = (z - codewords.detach()).norm(dim=1).masked_fill(~has_evidence, float("inf"))
        nearest_first = distance.argsort(stable=True)[:int(has_evidence.sum())]
        closest = lambda code: nearest_first[codes[nearest_first] == code][:3].tolist()
        typical[name] = [user_ids.iloc[closest(code)].tolist() for code in range(num_codes)]

        centred = z[has_evidence] - z[has_evidence].mean(0)
        directions = torch.linalg.svd(centred, full_matrices=False).Vh[:2]
        plane = (centred @ directions.T).numpy()  # [N', 2], or 1 for C = 1
        if plane.shape[1] == 1:  # one direction: spread over the height, so that users do not hide each other
            plane = np.column_stack([plane, rng.random(len(plane))])
        row_of = np.cumsum(has_evidence.numpy()) - 1
        marked = {user_ids.iat[user]: row_of[user] for user in chosen if has_evidence[user]}
        codes = run.codes[has_evidence.numpy(), k]
        maps[name] = [draw_map(folder, plane, codes, f"{name} by code", range(num_codes), marked)]
        if f"true_{name}" in run.users:
            truth, labels = pd.factorize(run.users[f"true_{name}"][has_evidence.numpy()], sort=True)
            maps[name].append(draw_map(folder, plane, truth, f"{name} by truth", labels, marked))
    return maps, typical


def draw_attention(folder, name, before, after):
    """Figure 7: a row per user, a column per word of the sentence; each user's weights from 0 to 1"""
    width = max(len(words) for words, _, _ in after)
    figure, axes = plt.subplots(1, 2, figsize=(10, 0.5 * len(after) + 1.4), squeeze=False)
    rows = []
    for axis, when, attention in zip(axes[0], ("before", "after"), (before, after)):
        grid = np.full((len(attention), width), np.nan)
        for row, (words, is_content, weights) in enumerate(attention):
            span = np.ptp(weights) or 1.0
            grid[row, :len(words)] = (weights - weights.min()) / span
            for column, word in enumerate(words):
                axis.text(column, row, word, ha="center", va="center", fontsize=6,
                          color="white" if grid[row, column] > 0.6 else "black")
                rows.append((row, when, word, bool(is_content[column]), weights[column]))
        axis.imshow(grid, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set(title=f"{name}: {when} tuning", xticks=[], yticks=range(len(attention)), ylabel="user")
    data = pd.DataFrame(rows, columns=["user", "when", "word", "is_content", "attention"])
    return picture(folder, f"attention-{name}", figure, data, f"Heat maps of the attention from the words of "
                   f"a sentence to the soft token of {name}, before and after tuning, scaled per user")


def draw_curves(folder, run):
    """Loss curves by step: the tiny LLM and the shared start of stage 2, the losses of stage 3"""
    curves, path = {}, folder.parent / "tiny_llm" / "curve.json"
    if run.stored["llm"] == "tiny" and path.exists():
        curves["tiny LLM: nats per token, by step"] = json.loads(path.read_text())
    if curve := run.sidecars["profiles.pt"].get("curve"):
        curves["shared θ: nats per row, by step"] = curve
    for key, values in pd.DataFrame(run.sidecars["codebook.pt"].get("curve") or []).items():
        curves[f"stage 3: {key.replace('_', ' ')}, by epoch"] = list(values)
    if not curves:
        return []
    figure, axes = plt.subplots(1, len(curves), figsize=(3.2 * len(curves), 2.4), squeeze=False)
    for axis, (title, values) in zip(axes[0], curves.items()):
        axis.plot(range(1, len(values) + 1), values)
        axis.set_title(title, fontsize=8)
    figure.tight_layout()
    data = pd.DataFrame([(title, step, value) for title, values in curves.items()
                         for step, value in enumerate(values, 1)], columns=["curve", "step", "value"])
    return [picture(folder, "curves", figure, data, "Lines: " + "; ".join(curves))]


def draw_mask(folder, names):
    """Fig. 4, for names and task text of three tokens and evidence of four"""
    num_profiles = len(names)
    blocks = [k for k in range(num_profiles) for _ in range(3)]
    segment = torch.tensor(blocks + 3 * [num_profiles] + 4 * [num_profiles + 1])
    is_soft = torch.zeros(len(segment), dtype=torch.bool)
    is_soft[[3 * k + 2 for k in range(num_profiles)]] = True
    mask = fig4_mask(segment, is_soft, torch.ones(1, num_profiles, dtype=torch.bool))[0, 0]
    labels = [text for name in names for text in (name, "…", f"θ {name}")]
    labels += ["task", "…", "text"] + [f"h{t}" for t in range(1, 5)]
    figure, axis = plt.subplots(figsize=(4.2, 4.2))
    axis.imshow(mask.numpy(), cmap="Blues", vmax=1.6)
    axis.set(xticks=range(len(labels)), yticks=range(len(labels)), ylabel="reads", xlabel="is read",
             title="attention mask (Fig. 4)")
    axis.set_xticklabels(labels, rotation=90, fontsize=7)
    axis.set_yticklabels(labels, fontsize=7)
    data = pd.DataFrame(mask.int().numpy(), columns=labels).assign(reads=labels)
    return picture(folder, "mask", figure, data, "Attention mask: name and soft tokens of one profile see "
                   "only each other; evidence sees all before it")
