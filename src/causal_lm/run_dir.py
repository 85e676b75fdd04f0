"""The files of a run: their names, what a new run clears, what a continued run keeps."""

import logging
import time
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import DictConfig, OmegaConf

from causal_lm.checkpoint_file import AtomicCheckpointIO, RefusedError, read_checkpoint
from causal_lm.report import files

log = logging.getLogger(__name__)

FILES = (  # what a run writes besides its checkpoints and its ``samples/``
    "metrics.csv", "config.yaml", "summary.json", "preflight.json", "preflight.html", "samples.txt",
)  # fmt: skip


class RunDir:
    """The directory of a run, which each rank makes; only rank zero writes files into it.

    A context, in which rank zero holds a lock, so that no other run writes into the directory. The
    operating system releases it when the process ends, however it does. Raises ConfigError where
    the directory has files, but is not that of a run; RefusedError where another run writes there.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints = path, path / "checkpoints"
        self._lock = FileLock(path / files.MARKER)

    def __enter__(self) -> "RunDir":
        self.path.mkdir(parents=True, exist_ok=True)
        if files.is_rank_zero():
            files.claim_directory(self.path, ignored=files.HYDRA_FILES)
            try:
                self._lock.acquire(timeout=0.2)  # a sweep may be trying it
            except Timeout:
                todo = "wait for its end, or set another hydra.run.dir"
                raise RefusedError(f"another run is writing into {self.path}: {todo}") from None
        return self

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def latest_checkpoint(self) -> str | None:
        """``last.ckpt``, or the newest checkpoint that can be read; None if there is none. Raises
        RefusedError where there are checkpoints, but none can be read."""
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

    def finished_summary(self, cfg: DictConfig) -> dict[str, Any] | None:
        """The summary of a finished run here that has all that ``cfg`` asks for, or None."""
        try:
            summary = files.read_summary(self.path / "summary.json")
        except (OSError, ValueError):  # there is none, or it is damaged
            return None
        done = {"max_steps": summary["steps"] or 0, "max_epochs": summary["epochs"] or 0}
        is_over = any(0 < cfg.trainer.get(key, -1) <= n for key, n in done.items())
        is_tested = summary["test/loss"] is not None or not cfg.get("test")
        return summary if summary["status"] == "finished" and is_over and is_tested else None

    def contains(self, ckpt_path: str | None) -> bool:
        """Whether the checkpoint is one of the run in this directory."""
        return Path(ckpt_path or "/").resolve().is_relative_to(self.checkpoints.resolve())

    def prepare(self, cfg: DictConfig, step: int | None) -> None:
        """Write config.yaml; set the checkpoints of an earlier run aside, delete its other files.

        If that run is continued at ``step``, its checkpoints stay, and ``metrics.csv`` and the
        samples up to the step are kept. None: it is not continued.
        """
        if not files.is_rank_zero():
            return
        if step is None and any(self.checkpoints.glob("*.ckpt")):
            names = (self.path / f"checkpoints_{n}" for n in count(1))
            aside = next(path for path in names if not path.exists())
            self.checkpoints.rename(aside)
            log.info(f"the checkpoints of an earlier run are now in {aside}")
        for name in FILES[1:] if step else FILES:
            (self.path / name).unlink(missing_ok=True)
        temporary = [f".{name}.[0-9]*" for name in FILES] + ["samples/.step_*.txt.[0-9]*"]
        for pattern in (*temporary, f"checkpoints/.*{AtomicCheckpointIO.SUFFIX}"):
            for path in self.path.glob(pattern):
                path.unlink()  # left by a killed process
        for step_written, path in files.sample_files(self.path):
            if step_written > (step or 0):
                path.unlink()
        files.write_text(self.path / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))

    def write_summary(self, summary: dict[str, Any], started: float) -> None:
        """Write ``summary.json``, with the seconds since ``started``, and None for NaN and inf."""
        summary["seconds/total"] = time.perf_counter() - started
        summary |= files.replace_nonfinite(summary)
        if files.is_rank_zero():
            files.write_json(self.path / "summary.json", summary)
