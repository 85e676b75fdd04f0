"""The files of a run: their names, what a new run clears, what a continued run keeps."""

import csv
import json
import logging
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf

from causal_lm.report.files import write_json, write_text

log = logging.getLogger(__name__)

FILES = (
    "metrics.csv", "config.yaml", "summary.json", "preflight.json", "preflight.html", "samples.txt",
)  # fmt: skip
"""What a run writes beside its checkpoints and its ``samples/``."""


class RunDir:
    """The directory of a run. Only the process of rank zero writes into it."""

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints = path, path / "checkpoints"
        path.mkdir(parents=True, exist_ok=True)

    def resume(self, cfg: DictConfig) -> DictConfig:
        """The configuration with ``ckpt_path=auto`` replaced by ``last.ckpt`` here, or null."""
        if cfg.ckpt_path != "auto":
            return cfg
        cfg, last = deepcopy(cfg), self.checkpoints / "last.ckpt"
        cfg.ckpt_path = str(last) if last.exists() else None
        return cfg

    def finished(self, max_steps: int) -> dict[str, Any] | None:
        """The summary of the run of so many steps that is finished here; None if there is none."""
        path = self.path / "summary.json"
        summary = json.loads(path.read_text()) if path.exists() else {}
        finished = summary.get("status") == "finished" and summary["steps"] >= max_steps
        return summary if finished else None

    def holds(self, ckpt_path: str | None) -> bool:
        """Whether the checkpoint is in this directory."""
        return bool(ckpt_path) and Path(ckpt_path or "").resolve().is_relative_to(
            self.path.resolve()
        )

    def begin(self, cfg: DictConfig, step: int) -> None:
        """Delete what an earlier run left, after ``step`` where it is continued; write config.yaml.

        Checkpoints are kept until new ones replace them.
        """
        if not is_rank_zero():
            return
        for name in FILES[1:] if step else FILES:
            (self.path / name).unlink(missing_ok=True)
        for path in (self.path / "samples").glob("step_*.txt"):
            if not step or int(path.stem.removeprefix("step_")) > step:
                path.unlink()
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))

    def logger(self, step: int) -> CSVLogger:
        """The logger of ``metrics.csv``, with the rows up to ``step``, which Lightning deletes."""
        logger, path = CSVLogger(self.path, name="", version=""), self.path / "metrics.csv"
        if is_rank_zero() and path.exists():
            with path.open(newline="") as file:
                rows: list[Any] = [row for row in csv.DictReader(file) if int(row["step"]) < step]
            logger.experiment.metrics = rows
            logger.save()
        return logger

    def write_summary(self, summary: dict[str, Any]) -> None:
        if is_rank_zero():
            write_json(self.path / "summary.json", summary)


def is_rank_zero() -> bool:
    """Whether this process writes files; known before the Trainer is made."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0
