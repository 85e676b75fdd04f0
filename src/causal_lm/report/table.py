"""Tables and the verdict of finished runs, from their summaries."""

from collections.abc import Sequence
from typing import Any, NamedTuple

LEAKS_BELOW = 0.98  # of the perplexity of the entropy floor: the evaluation leaks its targets
AT_FLOOR = 1.03  # up to this multiple of the floor's perplexity, a model is close to the floor
MISLEADING_BELOW = 0.75  # of the true loss: the reported one is misleading
WORTHLESS_BEYOND = 3.0  # nats per token from a misleading loss to the true one: a worthless model


def table(rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns of text, the first to the left; the first row is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    head, *body = ("  ".join(row).rstrip() for row in cells)
    return "\n".join([head, "-" * sum(widths, 2 * (len(widths) - 1)), *body])


def number(value: float | None) -> str:
    """A figure with three decimals, or four digits from 1000 on; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.4g}"


def percent(value: float | None) -> str:
    """A fraction as a percentage; a dash for None."""
    return "–" if value is None else f"{100 * value:.1f} %"


def run_table(summary: dict[str, Any]) -> str:
    """What is printed at the end of one run: losses, samples and the verdict."""
    s = summary
    rows = [
        ["", "nats/token", "perplexity"],
        ["training loss, as reported", number(s["train/loss"]), "–"],
        ["validation loss, by the training objective", number(s["val/loss_as_trained"]), "–"],
        ["true validation loss", number(s["val/loss"]), number(s["val/ppl"])],
    ]
    if s.get("test/loss") is not None:
        step = f"true test loss, of the weights at step {s['test/step']}"
        rows.append([step, number(s["test/loss"]), number(s["test/ppl"])])
    if s["floor/loss"] is not None:
        rows.append(["entropy floor of the data", number(s["floor/loss"]), number(s["floor/ppl"])])
    samples = [f"PAD or EOS {percent(s['sample/pad_eos_share'])}",
               f"repeated tokens {percent(s['sample/repeat_share'])}"]  # fmt: skip
    if s["sample/legal_rate"] is not None:
        samples.append(f"legal transitions {percent(s['sample/legal_rate'])}")
    if s["val/bpb"] is not None:
        samples.append(f"{s['val/bpb']:.3f} bits per byte")
    return f"{table(rows)}\n\nsamples: {', '.join(samples)}\nverdict: {verdict(s).sentence}"


class Verdict(NamedTuple):
    """A judgment of a run, as a word and as a sentence."""

    kind: str
    sentence: str


def verdict(summary: dict[str, Any]) -> Verdict:
    """Whether the reported loss of a run is right, and how good its model is."""
    s = summary
    true, over_floor = s["val/loss"], s["val/ppl_over_floor"]
    trained, reported = s["train/loss"], s["val/loss_as_trained"]  # the latter on the same data
    if over_floor is not None and over_floor < LEAKS_BELOW:
        sentence = f"below the entropy floor ({over_floor:.3f}×): the evaluation leaks targets."
        return Verdict("leaking", sentence)
    if true is None:
        return Verdict("unmeasured", "nothing was measured: there was no validation.")
    if trained is None:
        return Verdict("untrained", f"nothing was trained; the loss is {true:.3f} nats per token.")
    times_floor = "" if over_floor is None else f", {over_floor:,.4g}× the floor's perplexity"
    loss = f"{true:.3f} nats per token{times_floor}"
    # Other reductions weight tokens differently: there, a lower loss alone is no fault.
    own_reduction = s.get("loss/reduction", "token") != "token"
    if reported < MISLEADING_BELOW * true and (s["preflight/faults"] or not own_reduction):
        sentence = f"the reported loss, {reported:.3f}, is wrong: the true loss is {loss}"
        faults = ", ".join(s["preflight/faults"])
        found = f" (preflight: {faults})" if faults else ""
        if true - reported > WORTHLESS_BEYOND:
            return Verdict("worthless", f"{sentence}; the model is worthless{found}.")
        return Verdict("misleading", f"{sentence}{found}.")
    validated = reported if own_reduction else true
    if trained < MISLEADING_BELOW * validated:
        losses = f"{trained:.3f} on the training data, {validated:.3f} on the validation data"
        return Verdict("overfitted", f"overfitted: {losses}{times_floor}.")
    if over_floor is not None and over_floor <= AT_FLOOR:
        floor = f"{over_floor:.3f}× the floor's perplexity"
        return Verdict("at_floor", f"correct, and close to the entropy floor: {floor}.")
    return Verdict("correct", f"correct: reported {trained:.3f}, true {loss}.")


def common_cells(s: dict[str, Any]) -> list[str]:
    """Reported loss, true loss, × floor, legal transitions, PAD or EOS, preflight."""
    audited = "clean" if s.get("preflight/audited") else "not audited"
    return [
        *(number(s[key]) for key in ("train/loss", "val/loss", "val/ppl_over_floor")),
        *(percent(s[key]) for key in ("sample/legal_rate", "sample/pad_eos_share")),
        ", ".join(s["preflight/faults"]) or audited,
    ]


def sweep_table(summaries: Sequence[dict[str, Any]]) -> str:
    """One row per run, for a terminal: the overrides in which not all are alike, if they are known,
    and the figures, or the status of a run that has none."""
    words = [[w.lstrip("+").partition("=") for w in s.get("overrides") or []] for s in summaries]
    given = [{key: value for key, _, value in each} for each in words]
    keys = dict.fromkeys(key for each in given for key in each)
    swept = [key for key in keys if len({each.get(key) for each in given}) > 1]
    rows = [["run", *swept, "train/loss", "val/loss", "over floor", "legal", "PAD+EOS", "preflight",
             "seconds"]]  # fmt: skip
    for s, overrides in zip(summaries, given, strict=True):
        values = [f"{overrides.get(key, '–'):.30}" for key in swept]
        if s.get("val/loss") is None or s.get("status") in ("failed", "interrupted", "running"):
            cells = [s.get("status", "no summary"), *["–"] * (len(rows[0]) - len(values) - 2)]
        else:
            cells = [*common_cells(s), f"{s['seconds/total']:.0f}"]
        rows.append([s["name"], *values, *cells])
    return table(rows)
