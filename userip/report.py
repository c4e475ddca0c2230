"""The text of report.html: what each chapter says and shows."""

import json

import pandas as pd

from common import with_interval
from userip.page import code_cards_as_html, markdown_tables, page, paragraph, table


def read_curves(run):
    """Losses by step: the tiny LLM and the shared start of stage 2, eq. 5 of stage 3. {title: list}"""
    curves, path = {}, run.run_dir / "tiny_llm" / "curve.json"
    if run.stored["llm"] == "tiny" and path.exists():
        curves["tiny LLM: nats per token, by step"] = json.loads(path.read_text())
    if curve := run.sidecars["profiles.pt"].get("curve"):
        curves["shared θ: nats per row, by step"] = curve
    for key, values in pd.DataFrame(run.sidecars["codebook.pt"].get("curve") or []).items():
        curves[f"stage 3: {key.replace('_', ' ')}, by epoch"] = list(values)
    return curves


def headline(sidecars):
    """Table: what was inferred, how much of the truth was found, and did it help?"""
    nll, quantized = sidecars["profiles.pt"]["heldout_nll"], sidecars["feature_bank.parquet"]
    answer = "held-out NLL per token: "
    answer += ", ".join(f"{key} {nll[key]:.4f}" for key in ("none", "shared", "shuffled", "own"))
    shared, shuffled = nll["own_minus_shared"], nll["own_minus_shuffled"]
    answer += f"; own - shared {shared[0]:+.4f} ± {shared[1]:.4f}"
    answer += f", own - shuffled {shuffled[0]:+.4f} ± {shuffled[1]:.4f} (95%)"
    rows = [("Do profiles predict the items of their users?", answer)]
    for name, num_codes in zip(quantized["names"], quantized["codes"]):
        answer = (f"perplexity {quantized[f'{name}_perplexity']:.2f} of {num_codes}, "
                  f"smallest share {quantized[f'{name}_smallest_share']:.3f}")
        if f"{name}_share_of_bayes" in quantized:
            answer += (f"; ARI with the truth {quantized[f'{name}_vs_true_{name}']:.3f}, "
                       f"{quantized[f'{name}_share_of_bayes']:.0%} of the Bayes-optimal")
        rows.append((f"How good are the codes of {name}?", answer))
    for model, gain in sidecars["results.parquet"]["gains"].items():
        answer = f"AUC of codes - random {with_interval(gain['auc_gain'], gain['auc_half_interval'])}"
        if "share_of_oracle" in gain:
            answer += (f", {gain['share_of_oracle']:.0%} of what the truth itself gains "
                       f"({gain['oracle_auc_gain']:+.4f})")
        rows.append((f"Do they help {model}?", answer))
    return table(("question", "answer"), rows)


def report_page(run, cards, pages, pictures, facts):
    """report.html. cards: CodeCards by profile; pages: HTML by user shown; pictures: lists of <img> of codes,
    attention and mask; facts: rows of words, attention and agreement, as in the sidecar
    """
    agreement = [
        paragraph("Agreement with what is known of users: adjusted mutual information (0: chance, 1: the "
                  "same), p of the chi-squared test."),
        table(("profile", "fact", "agreement", "p"), facts["agreement"])]
    opening = "<h1>User inherent profiles: what was inferred, and is it true?</h1>"
    return page("User inherent profiles", [opening], [
        ("Summary", [headline(run.sidecars), paragraph(
            f"{len(run.users):,} users, {len(run.items):,} items, {len(run.split['train']):,} train rows; "
            f"LLM: {run.stored['llm']}.")]),
        ("The codes", pictures["codes"]),
        ("What each code stands for", [
            paragraph(
                "What the users of a code have more often than all others: odds ratio ×, 95% interval; only "
                "names that are surely more frequent (one-sided 2.5% for each list as a whole). "
                f"{facts['names_found'][0]:,} such names; {facts['names_found'][1]:,} with the codes "
                "shuffled among users. Ratings: mean over users ± half of the 95% interval. Train rows."),
            *(code_cards_as_html(name, profile.cards) for name, profile in zip(run.names, cards)),
            *(agreement if facts["agreement"] else [])]),
        ("Do words of profiles mean anything?", [
            paragraph(
                "Share of users whose own words occur more often in their held-out (valid) items than "
                "another user's words do, ties counted half, ± half of the 95% interval; 0.5 is chance."),
            table(("profile", "method", "AUC", "users"), facts["words"])]),
        ("A few users", [
            paragraph(
                "Words of a soft prompt mean little alone; where the control reads as well, trust neither. "
                "Nearest: to the profile less the mean profile. Lens: what the LLM expects more after it."),
            *pages]),
        ("Where the LLM looks", [
            paragraph(
                "Share of the attention to the soft token that content words pay, against words such as “The "
                "user likes”, before (a random soft token) and after tuning; ± half of the 95% interval over "
                "users."),
            table(("profile", "before", "after", "after - before", "users"), facts["attention"]),
            *pictures["attention"]]),
        ("Does it help click models?", [markdown_tables(run.results_text)]),
        ("How profiles are kept apart", pictures["mask"])])
