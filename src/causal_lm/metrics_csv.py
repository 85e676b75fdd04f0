"""``metrics.csv``: what a run logs, one row for each optimizer step and for each evaluation."""

import csv
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from causal_lm.report.files import is_rank_zero, replacing

log = logging.getLogger(__name__)

LAST_ROW = "causal_lm_last_row"  # key of a checkpoint: the last entry of ``tail`` before its step
PRUNED_SHARE = 0.1  # of ``keep_steps``: so many steps are between two prunings


class MetricsCSV(Logger, L.Callback):
    """Logger that appends each row to ``metrics.csv`` at once, so that a kill loses none.

    A new column rewrites the file beside and renames it. (Lightning's CSVLogger deletes the file of
    an earlier run, and writes over the old one.) It is a callback, too: it records the last row in
    each checkpoint, and keeps Lightning from logging the values of earlier steps again.

    Args:
        directory: of the run.
        step: of the checkpoint that the run continues; rows from it on are dropped. 0: a new run.
        keep_steps: rows of the last so many steps are kept; up to a tenth more are in the file.
    """

    name = version = ""

    def __init__(self, directory: Path, step: int, keep_steps: int = 100_000) -> None:
        super().__init__()
        self.path = directory / "metrics.csv"
        self.step, self.keep_steps = step, keep_steps
        self.columns: list[str] = []
        self.earlier: dict[str, float] = {}
        """The last value of each column, from the rows that a continued run found."""
        self.tail: list[list[int]] = []  # the last two steps with rows, and their numbers of rows
        self._validating: L.Trainer | None = None  # after the fit
        if is_rank_zero() and self.path.exists():
            self._rewrite(_columns(self.path), end=step)
            if not self.columns:  # the header was damaged: begin with the first row
                self.path.unlink()

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    def _rewrite(self, columns: Iterable[str], first: int = 0, end: float = math.inf) -> None:
        """Write the file anew: these columns, and the rows of steps ``first`` to before ``end``."""
        self.columns, self.tail, later, damaged = sorted(columns), [], 0, []
        with replacing(self.path) as file:
            writer = csv.DictWriter(file, self.columns, lineterminator="\n")
            writer.writeheader()
            for number, row in _rows(self.path):
                if row is None:
                    damaged.append(number)
                elif int(row["step"]) >= end:
                    later += 1
                elif int(row["step"]) >= first:
                    writer.writerow(row)
                    self._count(int(row["step"]))
                    with suppress(ValueError):  # damaged, but whole
                        self.earlier |= {k: float(v) for k, v in row.items() if v}
        for index in ("epoch", "step"):
            self.earlier.pop(index, None)
        if later:
            log.info(f"{self.path}: {later} rows of step {end} or later are dropped")
        if damaged:
            where = f"the first of them in line {damaged[0]}"
            log.warning(f"{self.path}: {len(damaged)} damaged rows are dropped, {where}")

    def _count(self, step: int) -> None:
        if not self.tail or self.tail[-1][0] != step:
            self.tail = [*self.tail[-1:], [step, 0]]
        self.tail[-1][1] += 1

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        self._validating = None if stage == "fit" else trainer

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        row = {k: v.item() if isinstance(v, Tensor) else v for k, v in metrics.items()}
        if trainer := self._validating:  # Lightning's own differ if the fit had no step left to do
            step = trainer.global_step
            row["epoch"] = trainer.fit_loop.epoch_progress.current.ready
        last = self.tail[-1][0] if self.tail else 0
        step = last + 1 if step is None else step
        row["step"] = step
        between = math.ceil(self.keep_steps * PRUNED_SHARE)
        is_pruned = step > self.keep_steps and step // between > last // between
        if is_pruned or not row.keys() <= set(self.columns):
            self._rewrite({*row, *self.columns}, step - self.keep_steps if is_pruned else 0)
        with self.path.open("a", encoding="utf-8", newline="\n") as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)
        self._count(step)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing, as ``config.yaml`` is beside the file."""

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        """Forget the values of the last step; Lightning logs them again until the epoch ends."""
        if batch_idx % trainer.accumulate_grad_batches == 0:  # an optimizer step begins
            for value in trainer._results.values():
                if value.is_tensor and not value.meta.on_epoch:
                    value.reset()

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        before = [entry for entry in self.tail if entry[0] < trainer.global_step]
        checkpoint[LAST_ROW] = before[-1:]

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Warn where rows of steps before the checkpoint are not in the file."""
        expected = checkpoint.get(LAST_ROW)
        if self.step and expected and is_rank_zero() and self.tail[-1:] < expected:
            rest = f"after step {self.tail[-1][0]}" if self.tail else "before it"
            log.warning(
                f"{self.path} was cut: rows {rest}, up to step {expected[0][0]}, are missing"
            )


def _columns(path: Path) -> list[str]:
    """The columns of a metrics file; none if its first line is damaged."""
    columns = next(_lines(path), [])
    return columns if "step" in columns and len(set(columns)) == len(columns) else []


def _rows(path: Path) -> Iterator[tuple[int, dict[str, str] | None]]:
    """The line number of each row, and the row, None if it is damaged."""
    columns = _columns(path)
    for number, fields in enumerate(_lines(path), start=1):
        row = dict(zip(columns, fields, strict=False))
        is_good = len(fields) == len(columns) and row.get("step", "").isdecimal()
        if number > 1 or not columns:
            yield number, row if is_good else None


def _lines(path: Path) -> Iterator[list[str]]:
    """The fields of each line; none if it is torn, or not UTF-8."""
    if path.exists():
        with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
            for line in file:
                fields: list[str] = []
                if line.endswith("\n") and "\ufffd" not in line:
                    with suppress(csv.Error):
                        fields = next(csv.reader([line.rstrip("\r\n")]), [])
                yield fields
