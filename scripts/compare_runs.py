"""Reads finished runs, from their folders or from a ledger."""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from causal_lm.ledger import Ledger
from causal_lm.report.files import read_summary

EDGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # of the bins of positions and lengths
MAX_BATCHES = 20  # of the validation data, for the losses by position and length


class Run(dict[str, Any]):
    """The summary of a run, with its ``name``, ``directory`` and ``settings``; reads its files."""

    @property
    def path(self) -> Path:
        return self["directory"]

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
        """The first texts that the trained model generated."""
        path = self.path / "samples.txt"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        return "\n".join(text.partition("--- 1\n")[2].splitlines()[:5])

    @cached_property
    def losses(self) -> dict[str, dict[int, float]]:
        """Nats per token by position in the window and by its length, in bins, of the trained model
        on the validation data; empty without a checkpoint."""
        path = self.path / "checkpoints/last.ckpt"
        return _losses(path) if path.is_file() else {}


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs of ledgers, which are files, and those below folders in the order of their jobs.

    Raises:
        ValueError: a summary is damaged, or a file is no ledger.
    """
    runs = [Run(s) for path in paths if path.is_file() for s in Ledger(path).summaries()]
    known = {run.path for run in runs}
    found = {path for folder in paths for path in folder.absolute().rglob("summary.json")}
    for path in sorted(found, key=_job_number):
        if (folder := path.parent) not in known:
            place = {"name": folder.name, "directory": folder, "settings": _settings(folder)}
            runs.append(Run(read_summary(path) | place))
    return runs


def _settings(folder: Path) -> Any:
    """Of a run; empty where it failed before it had written its configuration."""
    from omegaconf import OmegaConf

    path = folder / "config.yaml"
    return OmegaConf.to_container(OmegaConf.load(path)) if path.is_file() else {}


def _job_number(path: Path) -> tuple[Path, int, float]:
    """Orders files in folders of jobs, such as ``3_fix/summary.json``, and the last one last."""
    number = path.parent.name.partition("_")[0]
    job = int(number) if number.isdigit() else sys.maxsize
    return path.parents[1], job, path.stat().st_mtime


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
