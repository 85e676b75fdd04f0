"""What the run reported, the truth, the floor, and the verdict in a sentence."""

from collections.abc import Sequence
from typing import Any

LEAKS_BELOW = 0.98
"""A perplexity under this share of the floor cannot be honest: the evaluation sees its answers."""

WORTHLESS_BEYOND = 3.0
"""Nats per token by which a report may flatter: e³, twenty times the perplexity."""


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first to the left, the others to the right; the first row is a head."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * sum(widths, 2 * (len(widths) - 1)), *lines[1:]])


def number(value: float | None, form: str = ",.4g") -> str:
    """A figure for people: four digits; a dash where it does not apply."""
    if value is None:
        return "–"
    return f"{value:,.3f}" if form == ",.4g" and 0 <= abs(value) < 1000 else f"{value:{form}}"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def run_table(s: dict[str, Any]) -> str:
    """The table at the end of one run, from its summary."""
    rows = [
        ["", "nats/token", "perplexity"],
        ["reported while training", number(s["train/loss"]), "–"],
        ["reported on validation data", number(s["val/loss_as_trained"]), "–"],
        ["the truth (shift, PAD and mask right)", number(s["val/loss"]), number(s["val/ppl"])],
    ]
    if s["floor/loss"] is not None:
        rows.append(["the floor of this language", number(s["floor/loss"]), number(s["floor/ppl"])])
    samples = [f"PAD or EOS {percent(s['sample/pad_eos_share'])}"]
    samples.append(f"repeats {percent(s['sample/repeat_share'])}")
    if s["sample/legal_rate"] is not None:
        samples.append(f"legal transitions {percent(s['sample/legal_rate'])}")
    if s["val/bpb"] is not None:
        samples.append(f"{s['val/bpb']:.3f} bits per byte")
    return f"{table(rows)}\n\nsamples: {', '.join(samples)}\nverdict: {verdict(s)}"


def verdict(s: dict[str, Any]) -> str:
    """One sentence on how far the reported loss can be trusted, and how good the model is."""
    truth, over = s["val/loss"], s["val/ppl_over_floor"]
    trained, reported = s["train/loss"], s["val/loss_as_trained"]  # of the same data as the truth
    if over is not None and over < LEAKS_BELOW:
        return f"below the floor ({over:.3f}×): the evaluation sees what it should predict."
    if trained is None:
        return f"nothing was trained; the model is at {truth:.3f} nats per token."
    against = "" if over is None else f", {over:,.4g}× the floor's perplexity"
    other = s.get("loss/reduction", "token") != "token"  # the objective weighs tokens by its own
    if reported < 0.75 * truth and (s["preflight/faults"] or not other):
        worth = (
            "the model is worthless"
            if truth - reported > WORTHLESS_BEYOND
            else ("the figure is wrong, whatever the model is worth")
        )
        named = ", ".join(s["preflight/faults"])
        why = f" (preflight: {named})" if named else ""
        return (
            f"do not trust {reported:.3f}: the truth is {truth:.3f} nats per token{against}; "
            f"{worth}{why}."
        )
    unseen = reported if other else truth
    if trained < 0.75 * unseen:
        return (
            f"overfitted: {trained:.3f} on what it was trained on, {unseen:.3f} on what it was not"
            f"{against}."
        )
    if over is not None and over <= 1.03:
        return f"honest, and as good as this language allows: {over:.3f}× the floor's perplexity."
    return f"honest: reported {trained:.3f}, true {truth:.3f} nats per token{against}."


def _findings(s: dict[str, Any]) -> list[str]:
    """What a run said, what was true, what it wrote, and what the preflight said."""
    return [
        number(s["train/loss"]),
        number(s["val/loss"]),
        number(s["val/ppl_over_floor"]),
        percent(s["sample/legal_rate"]),
        percent(s["sample/pad_eos_share"]),
        ", ".join(s["preflight/faults"]) or "clean",
    ]


def sweep_table(summaries: Sequence[dict[str, Any]]) -> str:
    """One row per run."""
    rows = [["run", "train/loss", "val/loss", "over floor", "legal", "PAD+EOS", "preflight",
             "seconds"]]  # fmt: skip
    for s in summaries:
        if s.get("val/loss") is None:
            figures = [s.get("status", "no summary"), *["–"] * (len(rows[0]) - 2)]
        else:
            figures = [*_findings(s), number(s["seconds/total"], ".0f")]
        rows.append([s["name"], *figures])
    return table(rows)


def markdown_table(summaries: Sequence[dict[str, Any]]) -> str:
    """One row per run, for a page."""
    head = ["preset", "reported, nats", "the truth, nats", "× floor's perplexity",
            "legal transitions", "PAD or EOS written", "preflight"]  # fmt: skip
    rows = [[f"`{s['experiment']}`", *_findings(s)] for s in summaries]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
