"""One self-contained HTML page that compares finished runs: losses over steps, figures, samples."""

import csv
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from causal_lm import extras
from causal_lm.report.sweep import read_summaries
from causal_lm.report.table import number, percent, verdict

Curve = list[tuple[int, float]]

COLUMNS = {
    "status": "status", "train/loss": "reported, nats", "val/loss": "true, nats",
    "val/ppl_over_floor": "× floor's perplexity", "val/bpb": "bits per byte",
    "sample/legal_rate": "legal transitions", "sample/pad_eos_share": "PAD or EOS generated",
    "train/pad_share": "padding", "train/tokens_per_second": "targets/s",
    "preflight/faults": "preflight", "seconds/total": "seconds",
}  # fmt: skip
"""Key of ``summary.json`` -> heading in the table."""

PERCENT = ("sample/legal_rate", "sample/pad_eos_share", "train/pad_share")
PATHS = ("hydra.", "ckpt_path")
"""Configuration keys whose values differ between any two runs, and say nothing."""

STYLE = """
:root{color-scheme:light dark;--line:#8886;--reported:#c4532d;--true:#2f7fc1}
body{font:16px/1.5 system-ui,sans-serif;max-width:75rem;margin:1.5rem auto;padding:0 1rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25rem .6rem;border-bottom:1px solid var(--line);text-align:right}
th:first-child,td:first-child,.left td{text-align:left}
.runs{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(22rem,100%),1fr));gap:1rem}
figure{margin:0}svg{width:100%;height:auto;fill:currentColor}pre{white-space:pre-wrap;overflow-wrap:anywhere}
@media print{figure,tr{break-inside:avoid}}
"""


@dataclass(frozen=True)
class Run:
    """What the files of one run say.

    reported, true: training and validation loss in nats per token, by optimizer step.
    config: its configuration, by dotted key.
    """

    name: str
    summary: dict[str, Any]
    reported: Curve
    true: Curve
    config: dict[str, Any]
    samples: str


def read_run(summary: Path) -> Run:
    """The run that wrote this ``summary.json``; files that it did not write count as empty."""
    folder = summary.parent
    config, samples = folder / "config.yaml", folder / "samples.txt"
    (figures,) = read_summaries([summary])
    last_step = figures.get("steps") or 0
    return Run(
        name=folder.name,
        summary=figures,
        reported=read_curve(folder / "metrics.csv", "train/loss", last_step),
        true=read_curve(folder / "metrics.csv", "val/loss", last_step),
        config=dict(_leaves(OmegaConf.load(config))) if config.is_file() else {},
        samples=samples.read_text(encoding="utf-8") if samples.is_file() else "",
    )


def read_curve(metrics: Path, key: str, last_step: int) -> Curve:
    """A column of ``metrics.csv`` where it has values, by optimizer steps taken.

    Rows count from 0. The validation after the fit is in a row after the last step.
    """
    if not metrics.is_file():
        return []
    with metrics.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get(key)]
    return list({min(int(row["step"]) + 1, last_step): float(row[key]) for row in rows}.items())


def _leaves(node: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not OmegaConf.is_dict(node):
        return [(prefix, node)]
    children = [(f"{prefix}.{key}" if prefix else str(key), node[key]) for key in node]
    return [leaf for key, child in children for leaf in _leaves(child, key)]


def page(runs: Sequence[Run]) -> str:
    """The HTML page: it loads nothing, follows the light or dark setting, and fits a phone.

    Every figure of ``summary.json`` stands in a ``<data value="…">`` element in full precision.

    Raises:
        ModuleNotFoundError: the extra ``report`` is not installed.
    """
    parts = [
        "<h1>Runs compared</h1>",
        "<p>Reported is the loss of training. True is the canonical validation loss: right label "
        "shift, PAD left out, causal mask. Both are in nats per token.</p>",
        '<div class="runs">', *map(_figure, runs, itertools.count()), "</div>",
        "<h2>Figures</h2>", _table(["run", *COLUMNS.values()], map(_row, runs)),
        "<h2>Configuration that differs</h2>", _differences(runs),
        "<h2>Samples</h2>", '<div class="runs">', *map(_samples, runs), "</div>",
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Runs compared</title><style>{STYLE}</style></head>\n"
        f"<body>{chr(10).join(parts)}</body></html>\n"
    )


def _figure(run: Run, index: int) -> str:
    """The losses of one run over steps, with its verdict as caption."""
    s = run.summary
    said = verdict(s).sentence if s.get("val/loss") is not None else str(s.get("error"))
    label = f"{run.name}: reported {number(s['train/loss'])}, true {number(s['val/loss'])} nats"
    picture = draw(run, f"run{index}-")
    return (
        f'<figure><h2>{escape(run.name)}</h2><div role="img" aria-label="{escape(label)}">'
        f"{picture}</div><figcaption>{escape(said)}</figcaption></figure>"
    )


def draw(run: Run, prefix: str) -> str:
    """An SVG of both losses over steps, with the entropy floor as a line, in the page's colors.

    ``prefix`` makes the identifiers in it unique on a page of several pictures.
    """
    extras.load("matplotlib", "report")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.add_subplot(xlabel="optimizer step", ylabel="nats per token")
    black, colors = "#000000", {"reported": "#c4532d", "true": "#2f7fc1"}
    for name, color in colors.items():
        if curve := getattr(run, name):
            axes.plot(
                *zip(*curve, strict=True),
                color=color,
                label=name,
                marker="." if len(curve) < 60 else "",
            )
    if (floor := run.summary.get("floor/loss")) is not None:
        axes.axhline(floor, color=black, linestyle="--", linewidth=1, label="entropy floor")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.patch.set_visible(False)
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()[buffer.getvalue().index("<svg") :]
    svg = re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}", svg)
    for color, value in {"reported": "var(--reported)", "true": "var(--true)"}.items():
        svg = svg.replace(colors[color], value)
    return svg.replace(black, "currentColor")


def _row(run: Run) -> list[str]:
    return [escape(run.name), *(_data(key, run.summary.get(key)) for key in COLUMNS)]


def _data(key: str, value: Any) -> str:
    """A figure for people, with its exact value for machines."""
    if isinstance(value, list):
        return escape(", ".join(value)) or "clean"
    if not isinstance(value, int | float):
        return escape("–" if value is None else str(value))
    return f'<data value="{value!r}">{(percent if key in PERCENT else number)(value)}</data>'


def _differences(runs: Sequence[Run]) -> str:
    keys = sorted({key for run in runs for key in run.config if not key.startswith(PATHS)})
    rows = [[key, *(str(run.config.get(key, "–")) for run in runs)] for key in keys]
    rows = [list(map(escape, row)) for row in rows if len(set(row[1:])) > 1]
    heads = ["key", *(escape(run.name) for run in runs)]
    return _table(heads, rows) if rows else "<p>None.</p>"


def _samples(run: Run) -> str:
    return f"<section><h3>{escape(run.name)}</h3><pre>{escape(run.samples[:1500])}</pre></section>"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{cell}</th>' for cell in heads)
    body = "".join(
        f'<tr><th scope="row">{row[0]}</th>{"".join(f"<td>{cell}</td>" for cell in row[1:])}</tr>'
        for row in rows
    )
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
