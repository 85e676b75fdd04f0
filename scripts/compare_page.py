"""One self-contained HTML page, and PNGs, of finished runs, with matplotlib."""

import io
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from causal_lm.report.files import write_text
from causal_lm.report.seeds import Group, differences, rows_of
from causal_lm.report.table import number, percent

TICKS = (0, 1, 2, 5, 10, 20, 50, 100)  # of losses, in nats
REPORTED, TRUE, FLOOR, INK = "#d9822b", "#3b7dd8", "#7a8791", "#010203"  # INK becomes the page's


# ---- pictures ----


@contextmanager
def _style() -> Iterator[Any]:
    """matplotlib without a display, in colors that are legible on white and on black."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install -e '.[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color")
    options: Any = dict.fromkeys(colors, INK) | {
        "svg.fonttype": "none", "svg.hashsalt": "", "font.size": 10, "axes.spines.top": False,
        "axes.spines.right": False, "savefig.transparent": True, "legend.frameon": False,
        "figure.constrained_layout.use": True,
    }  # fmt: skip
    with matplotlib.rc_context(options):
        yield pyplot


def loss_picture(pyplot: Any, groups: Sequence[Group]) -> Any:
    """Reported and true loss over the steps, a panel per configuration, with the floor."""
    columns = min(3, len(groups))
    rows = -(-len(groups) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(3.4 * columns, 2.6 * rows), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(groups) :]:
        axis.remove()
    for g, axis in zip(groups, axes.flat, strict=False):
        for i, run in enumerate(g.runs):
            label = [{"label": text} if i == 0 else {} for text in ("reported", "true")]
            axis.plot(*run.curve("train/loss"), color=REPORTED, lw=1, **label[0])
            axis.plot(*run.curve("val/loss"), color=TRUE, lw=2, marker="o", ms=3, **label[1])
        if (floor := g.first["floor/loss"]) is not None:
            axis.axhline(floor, color=FLOOR, ls="--", lw=1, label="entropy floor")
        axis.set(title=g.name, xlabel="step", yscale="symlog")
    _label_losses(axes[0, 0], "nats per token")
    found = [a.get_legend_handles_labels() for a in figure.axes]
    lines = {text: line for each in found for line, text in zip(*each, strict=True)}
    figure.legend(lines.values(), lines, loc="outside upper center", ncols=3)
    return figure


def bins_picture(pyplot: Any, groups: Sequence[Group]) -> Any:
    """Loss by position in the window and by its length, a line per configuration."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), sharey=True)
    for axis, name in zip(axes, ("position", "length"), strict=True):
        for g in groups:
            if bins := g.first.losses.get(name):
                axis.plot(range(len(bins)), list(bins.values()), marker="o", ms=3, label=g.name)
                axis.set_xticks(range(len(bins)), [f"{edge}" for edge in bins])
        where = {"position": "in", "length": "of"}[name]
        axis.set(xlabel=f"{name} {where} the window, from … tokens on", yscale="symlog")
    _label_losses(axes[0], "true nats per token")
    if axes[0].lines:
        axes[0].legend()
    return figure


def _label_losses(axis: Any, label: str) -> None:
    """Label a scale that shows losses near 0 beside those of 20 nats: a logarithm from 2 on."""
    axis.set_ylabel(label)
    low, high = axis.get_ylim()
    ticks = [tick for tick in TICKS if low <= tick <= high]
    axis.set_yticks(ticks, [str(tick) for tick in ticks])
    axis.set_yticks([], minor=True)


def map_picture(pyplot: Any, groups: Sequence[Group]) -> Any:
    """What each logit was measured to see, a panel per configuration; gray: not tried."""
    figure, axes = pyplot.subplots(1, len(groups), figsize=(2.4 * len(groups), 2.7), squeeze=False)
    for g, axis in zip(groups, axes.flat, strict=True):
        axis.set(title=g.name, xlabel="input token", ylabel="logit", xticks=[], yticks=[])
        seen = g.first.pictures.get("visibility")
        if not seen:
            axis.text(0.5, 0.5, "no preflight", ha="center", transform=axis.transAxes)
            continue
        cells = [[c**0.25 if tried else math.nan
                  for c, tried in zip(line, seen["swapped"], strict=True)]
                 for line in seen["cells"]]  # fmt: skip
        colors = pyplot.get_cmap("viridis").copy()
        colors.set_bad(FLOOR)
        axis.imshow(cells, cmap=colors, vmin=0, vmax=1)
        axis.plot([-0.5, len(cells) - 0.5], [-0.5, len(cells) - 0.5], color="white", lw=0.8)
    return figure


def to_svg(figure: Any, words: str) -> str:
    """The figure as an SVG element that scales, in the text color of the page."""
    body = _svg_text(figure).partition("<svg")[2].replace(INK, "currentColor")
    head, _, rest = body.partition(">")
    view = head.partition('viewBox="')[2].partition('"')[0]
    more = f'style="max-width:{1.6 * float(view.split()[2]):.0f}px" role="img"'
    svg = f'<svg viewBox="{view}" {more} aria-label="{escape(words)}">{rest}'
    return f"<figure>{svg}<figcaption>{escape(words)}</figcaption></figure>"


def _svg_text(figure: Any) -> str:
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", metadata=nothing)
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())


# ---- the page ----

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "train/loss": ("reported, nats", number),
    "val/loss": ("true, nats", number),
    "val/ppl_over_floor": ("perplexity ÷ that of the floor", number),
    "sample/legal_rate": ("legal transitions", percent),
    "sample/pad_eos_share": ("PAD or EOS generated", percent),
    "train/pad_share": ("slots that are PAD", percent),
    "train/tokens_per_second": ("targets a second", number),
}


def page(groups: Sequence[Group], folder: Path | None = None, left_out: str = "") -> str:
    """The HTML page of the runs; with a folder, each picture is written there as PNG and SVG.
    ``left_out`` says which runs are not shown."""
    pictures = {
        "losses": (loss_picture, "Reported and true loss over the optimizer steps. Where the two "
                   "part, the reported one is wrong."),
        "visibility": (map_picture, "Which logit moves with which input token, as the preflight "
                       "measured. Above the white diagonal is the future. Gray was not tried."),
        "bins": (bins_picture, "True loss by the position of a token in its window, and by the "
                 "length of the window. A document longer than data.max_length is several."),
    }  # fmt: skip
    svgs = {}
    with _style() as pyplot:
        for name, (draw, words) in pictures.items():
            figure = draw(pyplot, groups)
            svgs[name] = to_svg(figure, words)
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
                figure.savefig(folder / f"{name}.png", dpi=150, transparent=False)
                # As a file, an SVG has no page whose color it could take.
                write_text(folder / f"{name}.svg", _svg_text(figure).replace(INK, FLOOR))
            pyplot.close(figure)
    everything = [g.settings for g in groups]
    settings = [["", *(g.name for g in groups)]] + [
        [key, *(str(each.get(key, "–")) for each in everything)]
        for key in differences(everything, everything[0])
    ]
    template = Path(__file__).with_name("compare_page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        svgs, n=sum(len(g.runs) for g in groups), left_out=escape(left_out),
        runs=_table("runs", _runs(groups)), seeds=_table("seeds", rows_of(groups)),
        alignment="".join(map(_alignment, groups)), settings=_table("settings", settings),
        samples="".join(f"<h3>{escape(g.name)}</h3><pre>{escape(g.first.samples)}</pre>"
                        for g in groups),
    )  # fmt: skip


def _table(name: str, rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows[1:]
    )  # fmt: skip
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wrap" role="region" aria-label="{escape(name)}" tabindex="0">{table}</div>'


def _runs(groups: Sequence[Group]) -> list[list[str]]:
    rows = [["run", "seed", *(title for title, _ in COLUMNS.values()), "preflight"]]
    for g in groups:
        for s in g.runs:
            faults = ", ".join(s["preflight/faults"] or []) or (
                "clean" if s["preflight/audited"] else "not audited"
            )
            cells = (show(s[key]) for key, (_, show) in COLUMNS.items())
            rows.append([g.name, str(s["seed"]), *cells, faults])
    return rows


def _alignment(g: Group) -> str:
    """The first pairs of input and target that the loss trained, of the first row."""
    cells = (g.first.pictures.get("alignment") or [[]])[0][:12]
    if not cells:
        return ""
    rows = [
        [f"{g.name}: input", *(str(c["input"]) for c in cells)],
        ["trained on", *("·" if c["target"] is None else str(c["target"]) for c in cells)],
    ]
    return _table(g.name, rows)
