"""Training loss, tokens, padding and seconds of a run, for its summary."""

import time
from collections import deque
from typing import Any

import lightning as L
import torch

from causal_lm import objective
from causal_lm.data.collate import Batch

STATISTICS = "causal_lm_statistics"  # key of a checkpoint
LOSS_STEPS = 20  # over which train/loss is averaged for the summary


class RunStatistics(L.Callback):
    """Counts the targets and slots of every training batch on this rank, and times the fit.

    Targets are the canonical ones. The counts stay on the device until they are saved or
    :meth:`figures` is called; those of a checkpoint are added. Seconds are of this process alone;
    ``seconds_train`` begins after the preflight, whose callback comes first, without validations.
    """

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=LOSS_STEPS)
        self.counts: Any = torch.zeros(3, dtype=torch.int64)
        """Targets, real tokens and slots of the completed optimizer steps."""
        self.unfinished: Any = 0  # the same, of the step in progress, which a resumed run repeats
        self.before = torch.zeros(3, dtype=torch.int64)  # over all ranks, before this process
        self.seconds_fit = self.seconds_train = self.seconds_validating = 0.0
        self._fit_start = self._train_start = 0.0
        self.logged: dict[str, float] = {}  # by the fit

    def on_fit_start(self, *_: Any) -> None:
        self._fit_start = time.perf_counter()

    def on_train_batch_start(self, *_: Any) -> None:
        self._train_start = self._train_start or time.perf_counter()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        targets, tokens = (batch.labels != objective.IGNORE).sum(), batch.lengths.sum()
        slots = torch.full_like(tokens, batch.input_ids.numel())
        self.unfinished += torch.stack([targets, tokens, slots])
        if not pl_module.accumulator.micro_batches:  # this one ended an optimizer step
            if pl_module.step_loss is not None:  # None: the step was skipped
                self.losses.append(pl_module.step_loss)
            self.counts, self.unfinished = self.counts.to(tokens.device) + self.unfinished, 0
        pl_module.log("train/pad_share", (batch.document_ids < 0).float().mean())

    def on_validation_start(self, *_: Any) -> None:
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit":
            self.seconds_validating += time.perf_counter() - self._validation_start

    def on_fit_end(self, trainer: L.Trainer, *_: Any) -> None:
        now = time.perf_counter()
        self.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        self.seconds_fit = now - self._fit_start
        self.seconds_train = now - (self._train_start or now) - self.seconds_validating

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit":  # a signal ends it in an evaluation
            self.on_fit_end(trainer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[STATISTICS] = {"losses": [*self.losses], "counts": self._totals(trainer)}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self.losses.extend(checkpoint[STATISTICS]["losses"])
        self.before = torch.tensor(checkpoint[STATISTICS]["counts"])

    def _totals(self, trainer: Any) -> list[int]:
        """The counts of the whole run over all ranks; every rank must call it."""
        local = self.counts.to(trainer.strategy.root_device, copy=True)  # reduced in place
        return (trainer.strategy.reduce(local, reduce_op="sum").cpu() + self.before).tolist()

    def figures(self, trainer: L.Trainer) -> dict[str, float | int | None]:
        """Sums over all ranks, for ``summary.json``; every rank must call it."""
        module: Any = trainer.lightning_module
        targets, tokens, slots = self._totals(trainer)
        new = targets - int(self.before[0])
        return {
            "train/loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "train/tokens": targets,
            "train/tokens_per_second": new / self.seconds_train if new else None,
            "train/pad_share": 1 - tokens / slots if slots else None,
            "train/skipped": module.guard.skipped,
            "seconds/fit": self.seconds_fit,
            "seconds/train": self.seconds_train,
        }
