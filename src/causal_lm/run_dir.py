"""The files of a run: their names, what a new run clears, what a continued run keeps."""

import csv
import json
import logging
import os
import time
from itertools import count
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger
from omegaconf import DictConfig, OmegaConf

from causal_lm.checkpoint_file import AtomicCheckpointIO, RefusedError, read_checkpoint
from causal_lm.report.files import write_json, write_text

log = logging.getLogger(__name__)

FILES = (  # what a run writes besides its checkpoints and its ``samples/``
    "metrics.csv", "config.yaml", "summary.json", "preflight.json", "preflight.html", "samples.txt",
)  # fmt: skip


class RunDir:
    """The directory of a run, which each rank makes; only rank zero writes files into it."""

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints = path, path / "checkpoints"
        path.mkdir(parents=True, exist_ok=True)

    def latest_checkpoint(self) -> str | None:
        """``last.ckpt``, or the newest checkpoint that can be read; None if there is none.

        Raises:
            RefusedError: there are checkpoints, but none can be read.
        """
        found = list(self.checkpoints.glob("*.ckpt"))
        for path in sorted(found, key=lambda p: (p.name != "last.ckpt", -p.stat().st_mtime)):
            try:
                read_checkpoint(path)
                return str(path)
            except ValueError as error:
                log.warning(str(error))
        if found:
            where = f"no checkpoint in {self.checkpoints} can be read"
            raise RefusedError(f"{where}: delete them to start from step 0")
        return None

    def finished_summary(self, max_steps: int) -> dict[str, Any] | None:
        """The summary of a finished run of at least ``max_steps`` here; None if there is none."""
        try:
            summary = json.loads((self.path / "summary.json").read_text())
            is_finished = summary["status"] == "finished" and summary["steps"] >= max_steps
        except (OSError, ValueError, TypeError, KeyError):  # there is none, or it is damaged
            return None
        return summary if is_finished else None

    def contains(self, ckpt_path: str | None) -> bool:
        """Whether the checkpoint is one of the run in this directory."""
        return Path(ckpt_path or "/").resolve().is_relative_to(self.checkpoints.resolve())

    def set_aside_checkpoints(self) -> None:
        """Rename the folder of an earlier run's checkpoints, which a new run does not continue."""
        if is_rank_zero() and any(self.checkpoints.glob("*.ckpt")):
            names = (self.path / f"checkpoints_{n}" for n in count(1))
            aside = next(path for path in names if not path.exists())
            self.checkpoints.rename(aside)
            log.info(f"the checkpoints of an earlier run are now in {aside}")

    def prepare(self, cfg: DictConfig, step: int) -> None:
        """Write config.yaml; delete the files of an earlier run, but for checkpoints.

        If that run is continued, ``step`` is not 0: ``metrics.csv`` and samples up to it are kept.
        """
        if not is_rank_zero():
            return
        for name in FILES[1:] if step else FILES:
            (self.path / name).unlink(missing_ok=True)
        for path in self.checkpoints.glob(f".*{AtomicCheckpointIO.SUFFIX}"):
            path.unlink()  # left by a killed process
        for path in (self.path / "samples").glob("step_*.txt"):
            if not step or int(path.stem.removeprefix("step_")) > step:
                path.unlink()
        write_text(self.path / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))

    def logger(self, step: int) -> CSVLogger:
        """A CSVLogger that keeps the rows before ``step``; Lightning's would delete them."""
        logger, path = CSVLogger(self.path, name="", version=""), self.path / "metrics.csv"
        if is_rank_zero() and path.exists():
            logger.experiment.metrics = _rows(path, step)
            logger.save()
        return logger

    def write_summary(self, summary: dict[str, Any], started: float) -> None:
        """Write ``summary.json``, with the seconds since ``started``."""
        summary["seconds/total"] = time.perf_counter() - started
        if is_rank_zero():
            write_json(self.path / "summary.json", summary)


def _rows(path: Path, step: int) -> list[Any]:
    """The rows of ``metrics.csv`` before ``step``, up to the first that is damaged."""
    rows = []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(line for line in file if line.endswith("\n")):
                if None in row or None in row.values():  # more or fewer fields than names
                    raise ValueError("a row is incomplete")
                if int(row["step"]) < step:
                    rows.append(row)
    except (ValueError, KeyError, csv.Error) as error:
        log.warning(f"{path} is damaged after {len(rows)} rows, which are kept: {error!r}")
    return rows


def is_rank_zero() -> bool:
    """Whether this process writes files; known before the Trainer is made."""
    return int(os.environ.get("LOCAL_RANK", 0)) == 0 and int(os.environ.get("NODE_RANK", 0)) == 0
