"""Reads finished runs, from their folders or from a ledger, and groups them by configuration."""

import csv
import json
import math
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from causal_lm.config import leaves
from causal_lm.ledger import NOT_SETTINGS, Ledger
from causal_lm.report.files import read_summary

EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # of the bins of positions and lengths
MAX_BATCHES = 20  # of the validation data, for the losses by position and length
T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t for a two-sided interval of 95 %, by degrees of freedom from 1 on."""
NO_DIFFERENCE = ("seed", "ckpt_path", "hydra", *NOT_SETTINGS)


def read_runs(paths: Sequence[Path]) -> list["Run"]:
    """The runs of ledgers, which are files, and those below folders in the order of their jobs.

    Raises:
        ValueError: a summary is damaged, or a file is no ledger.
    """
    runs = [Run(s["directory"], s, s["settings"])
            for path in paths if path.is_file() for s in Ledger(path).summaries()]  # fmt: skip
    known = {run.path for run in runs}
    found = {path for folder in paths for path in folder.rglob("summary.json")}
    for path in sorted(found, key=_job_number):
        if path.parent.absolute() not in known:
            runs.append(Run(path.parent, {"name": path.parent.name} | read_summary(path)))
    return runs


def _job_number(path: Path) -> tuple[int, str]:
    """Orders files in folders of jobs, such as ``3_fix/summary.json``."""
    number = path.parent.name.partition("_")[0]
    return (int(number) if number.isdigit() else sys.maxsize, path.parent.name)


@dataclass
class Run:
    """What a run has left in its directory."""

    path: Path
    summary: dict[str, Any]
    config: Mapping[str, Any] | None = None  # None: read config.yaml where it is needed

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Value by dotted key, without what does not tell configurations apart."""
        from omegaconf import OmegaConf

        config: Any = self.config
        if config is None:
            config = OmegaConf.to_container(OmegaConf.load(self.path / "config.yaml"))
        return {
            key: value
            for key, value in leaves(config)
            if key.split(".")[0] not in NO_DIFFERENCE and not key.endswith(".seed")
        }

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
