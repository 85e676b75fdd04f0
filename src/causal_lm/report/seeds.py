"""Runs of one configuration that differ in their seed: the mean of a figure and its interval."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from causal_lm.config import leaves
from causal_lm.ledger import NOT_SETTINGS
from causal_lm.report.table import table

SEEDS = ("seed", "data.seed")  # not data.source.seed, which makes another language
T_95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160,
    2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056,
    2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t for a two-sided interval of 95 %, by degrees of freedom from 1 on."""


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its interval of 95 %; NaN where there are too few values.

    >>> interval([1.0, 2.0, 3.0])[0]
    2.0
    """
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    freedom = len(values) - 1
    t = T_95[freedom - 1] if freedom <= len(T_95) else 1.96 + 2.5 / freedom
    return statistics.fmean(values), t * statistics.stdev(values) / len(values) ** 0.5


@dataclass
class Group:
    """Runs of one configuration, one for each seed, as summaries that have their ``settings``."""

    name: str
    settings: dict[str, Any]  # without the seeds
    by_seed: dict[Any, Any] = field(default_factory=dict)

    @property
    def runs(self) -> list[Any]:
        return [*self.by_seed.values()]

    @property
    def first(self) -> Any:
        return self.runs[0]

    def interval(self, key: str = "val/loss") -> tuple[float, float]:
        """:func:`interval` of a figure over the seeds."""
        return interval([run[key] for run in self.runs if run[key] is not None])

    def is_better(self, other: "Group") -> bool:
        """Whether the validation loss is lower, and the intervals of the two do not touch."""
        (mean, half), (other_mean, other_half) = self.interval(), other.interval()
        return mean + half < other_mean - other_half  # False for a NaN, as of one seed


def settings_but_seed(run: Mapping[str, Any]) -> dict[str, Any]:
    """What tells the configuration of a run from others, by dotted key."""
    left_out = (*NOT_SETTINGS, "ckpt_path", "hydra")
    items = leaves(run["settings"])
    return {k: v for k, v in items if k.split(".")[0] not in left_out and k not in SEEDS}


def differences(settings: Sequence[dict[str, Any]], own: dict[str, Any]) -> dict[str, Any]:
    """The settings in which not all are alike, with the values of ``own``."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return {k: own.get(k) for k in keys if len({str(each.get(k)) for each in settings}) > 1}


def group(runs: Iterable[Mapping[str, Any]]) -> list[Group]:
    """Runs by configuration, each group named by its preset and by what else tells it apart.

    Failed runs, and those without a validation loss, are left out. Of several runs with one seed,
    as before and after a change of the code, the last one stays.
    """
    by_key: dict[str, Group] = {}
    for run in runs:
        if run["val/loss"] is None or run["status"] not in ("finished", "stopped"):
            continue
        settings = settings_but_seed(run)
        key = json.dumps(settings, sort_keys=True, default=str)
        g = by_key.setdefault(key, Group(str(run["experiment"]), settings))
        g.by_seed[run["seed"], (run["settings"].get("data") or {}).get("seed")] = run
    presets: dict[str, list[Group]] = {}
    for g in by_key.values():
        presets.setdefault(g.name, []).append(g)
    for alike in presets.values():
        every = [g.settings for g in alike]
        for g in alike:
            g.name += "".join(f", {k}={v}" for k, v in differences(every, g.settings).items())
    return [*by_key.values()]


def rows_of(groups: Sequence[Group]) -> list[list[str]]:
    """A table: mean and interval over the seeds, and which configurations are better than which."""
    rows = [["configuration", "seeds", "true loss, mean ± 95 %", "lower than, intervals apart"]]
    for g in groups:
        mean, half = g.interval()
        spread = "" if math.isnan(half) else f" ± {half:.4f}"
        better = ", ".join(other.name for other in groups if g.is_better(other))
        rows.append([g.name, str(len(g.runs)), f"{mean:.4f}{spread}", better or "–"])
    return rows


def seed_table(runs: Iterable[Mapping[str, Any]]) -> str:
    """The table of :func:`rows_of` for a terminal; empty where no configuration has two seeds."""
    groups = group(runs)
    return table(rows_of(groups)) if any(len(g.runs) > 1 for g in groups) else ""
