"""One self-contained HTML page, and PNGs, of finished runs, with matplotlib."""

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from causal_lm.config import leaves
from causal_lm.report.files import read_summary, write_text
from causal_lm.report.table import number, percent

REPORTED, TRUE, FLOOR, INK = "#d9822b", "#3b7dd8", "#7a8791", "#010203"  # INK becomes the page's
EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # of the bins of positions and lengths
MAX_BATCHES = 20  # of the validation data, for the losses by position and length
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for a two-sided interval of 95 %, by degrees of freedom from 1 on."""
NOT_SETTINGS = ("seed", "ckpt_path", "hydra")


@dataclass
class Run:
    """What a finished run has left in its directory."""

    path: Path
    summary: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)  # by dotted key

    @classmethod
    def read(cls, path: Path) -> "Run":
        """Read a ``summary.json`` and the ``config.yaml`` beside it."""
        from omegaconf import OmegaConf

        config: Any = OmegaConf.to_container(OmegaConf.load(path.with_name("config.yaml")))
        kept = {k: v for k, v in leaves(config)
                if k.split(".")[0] not in NOT_SETTINGS and not k.endswith(".seed")}  # fmt: skip
        return cls(path.parent, read_summary(path), kept)

    @property
    def key(self) -> str:
        """Equal for runs that differ in nothing but their seed."""
        return json.dumps(self.settings, sort_keys=True, default=str)

    def curve(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and values of one column of ``metrics.csv``."""
        with (self.path / "metrics.csv").open(encoding="utf-8", newline="") as file:
            rows = [(int(r["step"]), float(r[name])) for r in csv.DictReader(file) if r.get(name)]
        return [step for step, _ in rows], [value for _, value in rows]

    @property
    def pictures(self) -> dict[str, Any]:
        """What the preflight saw, ``alignment`` and ``visibility``; empty without a preflight."""
        path = self.path / "preflight.json"
        return json.loads(path.read_text("utf-8")).get("pictures", {}) if path.is_file() else {}

    @property
    def samples(self) -> str:
        """The first texts that the trained model wrote."""
        path = self.path / "samples.txt"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return "\n".join(text.partition("--- 1\n")[2].splitlines()[:5])


@dataclass
class Group:
    """Runs of one configuration, which differ in their seeds."""

    name: str
    runs: list[Run]

    @property
    def first(self) -> Run:
        return self.runs[0]

    def interval(self, key: str) -> tuple[float, float]:
        """Mean over the seeds, and half of its interval of 95 % (NaN for a single seed)."""
        values = [r.summary[key] for r in self.runs if r.summary[key] is not None]
        if not values:
            return math.nan, math.nan
        if len(values) < 2:
            return values[0], math.nan
        t = T_95[len(values) - 2] if len(values) - 2 < len(T_95) else 2.0
        return statistics.fmean(values), t * statistics.stdev(values) / len(values) ** 0.5

    @cached_property
    def losses(self) -> dict[str, dict[int, float]]:
        """Nats per token by position in the document and by its length, in bins, of the model of
        the first seed on the validation data; empty without a checkpoint."""
        path = self.first.path / "checkpoints/last.ckpt"
        return _losses(path) if path.is_file() else {}


def group(runs: Iterable[Run]) -> list[Group]:
    """Runs by configuration; each group is named by its preset, and by what else tells it apart."""
    by_key: dict[str, list[Run]] = {}
    for run in runs:
        by_key.setdefault(run.key, []).append(run)
    groups = [Group(run[0].summary["experiment"] or run[0].path.name, run)
              for run in by_key.values()]  # fmt: skip
    presets: dict[str, list[Group]] = {}
    for g in groups:
        presets.setdefault(g.name, []).append(g)
    for alike in presets.values():
        every = [g.first.settings for g in alike]
        for g in alike:
            g.name += "".join(f", {k}={v}" for k, v in differences(every, g.first.settings).items())
    return groups


def differences(settings: Sequence[dict[str, Any]], own: dict[str, Any]) -> dict[str, Any]:
    """The settings in which not all are alike, with the values of ``own``."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return {k: own.get(k) for k in keys if len({str(each.get(k)) for each in settings}) > 1}


def is_better(a: Group, b: Group, key: str = "val/loss") -> bool:
    """Whether ``a`` has a lower figure, and the intervals of the two do not touch."""
    (mean_a, half_a), (mean_b, half_b) = a.interval(key), b.interval(key)
    return mean_a + half_a < mean_b - half_b  # False for a NaN, as of one seed


def _losses(checkpoint: Path) -> dict[str, dict[int, float]]:
    import torch
    from omegaconf import OmegaConf

    from causal_lm.build import instantiate, restore

    try:
        module, tokenizer, config = restore(checkpoint)
        own = {"tokenizer": tokenizer} if "tokenizer" in config["data"] else {}
        data = instantiate(OmegaConf.create(config["data"]), shuffle=False, layout="padded", **own)
        batches = [batch for batch, _ in zip(_loader(data), range(MAX_BATCHES), strict=False)]
    except (ValueError, OSError):  # another model class, or data that are gone
        return {}
    edges = torch.tensor(EDGES)
    sums = {name: torch.zeros(2, len(EDGES) + 1) for name in ("position", "length")}
    with torch.inference_mode():
        for batch in batches:
            nll, on = module.token_nll(batch), batch.labels >= 0
            lengths = batch.lengths[:, None].expand_as(on)
            for name, x in (("position", batch.position_ids), ("length", lengths)):
                index = torch.bucketize(x[on], edges, right=True)
                sums[name][0].index_add_(0, index, nll[on])
                sums[name][1].index_add_(0, index, torch.ones_like(nll[on]))
    return {
        name: {(0, *EDGES)[i]: float(nats / n) for i, (nats, n) in enumerate(both.T) if n}
        for name, both in sums.items()
    }


def _loader(data: Any) -> Iterator[Any]:
    data.load()
    return iter(data.val_dataloader())


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
        if (floor := g.first.summary["floor/loss"]) is not None:
            axis.axhline(floor, color=FLOOR, ls="--", lw=1, label="entropy floor")
        axis.set(title=g.name, xlabel="step", yscale="symlog")
    axes[0, 0].set_ylabel("nats per token")
    axes[0, 0].legend()
    return figure


def bins_picture(pyplot: Any, groups: Sequence[Group]) -> Any:
    """Loss by position in the document and by its length, a line per configuration."""
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3), sharey=True)
    for axis, name in zip(axes, ("position", "length"), strict=True):
        for g in groups:
            if bins := g.losses.get(name):
                axis.plot(range(len(bins)), list(bins.values()), marker="o", ms=3, label=g.name)
                axis.set_xticks(range(len(bins)), [f"{edge}" for edge in bins])
        axis.set(xlabel=f"{name} of the document, from … tokens on".replace(
            "position of", "position in"), yscale="symlog")  # fmt: skip
    axes[0].set_ylabel("true nats per token")
    axes[0].legend()
    return figure


def map_picture(pyplot: Any, groups: Sequence[Group]) -> Any:
    """What each logit was measured to see, a panel per configuration; gray: not tried."""
    figure, axes = pyplot.subplots(1, len(groups), figsize=(2.4 * len(groups), 2.7), squeeze=False)
    for g, axis in zip(groups, axes.flat, strict=True):
        seen = g.first.pictures.get("visibility") or {"cells": [[0.0]], "swapped": [False]}
        cells = [[c**0.25 if tried else math.nan
                  for c, tried in zip(line, seen["swapped"], strict=True)]
                 for line in seen["cells"]]  # fmt: skip
        colors = pyplot.get_cmap("viridis").copy()
        colors.set_bad(FLOOR)
        axis.imshow(cells, cmap=colors, vmin=0, vmax=1)
        axis.plot([-0.5, len(cells) - 0.5], [-0.5, len(cells) - 0.5], color="white", lw=0.8)
        axis.set(title=g.name, xlabel="input token", ylabel="logit", xticks=[], yticks=[])
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
    "val/ppl_over_floor": ("× floor's perplexity", number),
    "sample/legal_rate": ("legal transitions", percent),
    "sample/pad_eos_share": ("PAD or EOS written", percent),
    "train/pad_share": ("slots that are PAD", percent),
    "train/tokens_per_second": ("targets a second", number),
}


def page(groups: Sequence[Group], folder: Path | None = None) -> str:
    """The HTML page of the runs; with a folder, each picture is written there as PNG and SVG."""
    pictures = {
        "losses": (loss_picture, "Reported and true loss over the optimizer steps. Where the two "
                   "part, the reported one is wrong."),
        "visibility": (map_picture, "Which logit moves with which input token, as the preflight "
                       "measured. Above the white diagonal is the future. Gray was not tried."),
        "bins": (bins_picture, "True loss by the position of a token in its document, and by the "
                 "length of the document."),
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
    everything = [g.first.settings for g in groups]
    settings = [["", *(g.name for g in groups)]] + [
        [key, *(str(g.first.settings.get(key, "–")) for g in groups)]
        for key in differences(everything, everything[0])
    ]
    template = Path(__file__).with_name("compare_page.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        svgs, n=sum(len(g.runs) for g in groups), runs=_runs(groups), seeds=_seeds(groups),
        alignment="".join(map(_alignment, groups)), settings=_table(settings),
        samples="".join(f"<h3>{escape(g.name)}</h3><pre>{escape(g.first.samples)}</pre>"
                        for g in groups),
    )  # fmt: skip


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in rows[0])
    body = "".join(
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows[1:]
    )  # fmt: skip
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="wrap" tabindex="0">{table}</div>'


def _runs(groups: Sequence[Group]) -> str:
    rows = [["run", "seed", *(title for title, _ in COLUMNS.values()), "preflight"]]
    for g in groups:
        for run in g.runs:
            s = run.summary
            faults = ", ".join(s["preflight/faults"] or []) or (
                "clean" if s["preflight/audited"] else "not audited"
            )
            cells = (show(s[key]) for key, (_, show) in COLUMNS.items())
            rows.append([g.name, str(s["seed"]), *cells, faults])
    return _table(rows)


def _seeds(groups: Sequence[Group]) -> str:
    """Mean and interval over the seeds, and which configurations are better than which."""
    rows = [["configuration", "seeds", "true loss, mean ± 95 %", "lower than, intervals apart"]]
    for g in groups:
        mean, half = g.interval("val/loss")
        spread = "" if math.isnan(half) else f" ± {half:.4f}"
        better = ", ".join(other.name for other in groups if is_better(g, other))
        rows.append([g.name, str(len(g.runs)), f"{mean:.4f}{spread}", better or "–"])
    return _table(rows)


def _alignment(g: Group) -> str:
    """The first pairs of input and target that the loss trained, of the first row."""
    cells = (g.first.pictures.get("alignment") or [[]])[0][:12]
    if not cells:
        return ""
    rows = [
        [f"{g.name}: input", *(str(c["input"]) for c in cells)],
        ["trained on", *("·" if c["target"] is None else str(c["target"]) for c in cells)],
    ]
    return _table(rows)


def read_groups(paths: Iterable[Path]) -> list[Group]:
    """The finished runs of these ``summary.json`` files, by configuration."""
    runs = [Run.read(path) for path in paths]
    return group(run for run in runs if run.summary["val/loss"] is not None)
