"""Training loss, tokens, padding and seconds of a run, for its summary."""

import time
from collections import deque
from typing import Any

import lightning as L
import torch

from causal_lm import objective
from causal_lm.data.collate import Batch

LOSS_STEPS = 20  # over which train/loss is averaged for the summary


class RunStatistics(L.Callback):
    """Counts the targets and slots of every training batch on this rank, and times the fit.

    Targets are the canonical ones. The counts stay on the device until :meth:`figures` is called.
    ``seconds_train`` begins after the preflight, whose callback comes first, and leaves out
    validations.
    """

    def __init__(self) -> None:
        self.losses: deque[float] = deque(maxlen=LOSS_STEPS)
        self.targets: Any = 0
        self.real_tokens: Any = 0
        self.slots = 0
        self.seconds_fit = self.seconds_train = self.seconds_validating = 0.0
        self._train_start: float | None = None

    def on_fit_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._fit_start, self._step = time.perf_counter(), trainer.global_step

    def on_train_batch_start(self, *_: Any) -> None:
        self._train_start = self._train_start or time.perf_counter()

    def on_train_end(self, *_: Any) -> None:
        if self._train_start is not None:
            self.seconds_train = time.perf_counter() - self._train_start - self.seconds_validating

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        if trainer.global_step != self._step:  # this micro-batch ended an optimizer step
            self._step = trainer.global_step
            if pl_module.step_loss is not None:  # None: the step was skipped
                self.losses.append(pl_module.step_loss)
        self.targets += (batch.labels != objective.IGNORE).sum()
        self.real_tokens += batch.lengths.sum()
        self.slots += batch.input_ids.numel()
        pl_module.log("train/pad_share", (batch.document_ids < 0).float().mean())

    def on_validation_start(self, *_: Any) -> None:
        self._validation_start = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit":
            self.seconds_validating += time.perf_counter() - self._validation_start

    def on_fit_end(self, *_: Any) -> None:
        self.seconds_fit = time.perf_counter() - self._fit_start

    def figures(self, trainer: L.Trainer) -> dict[str, float | int | None]:
        """Sums over all ranks, for ``summary.json``; every rank must call it."""
        module: Any = trainer.lightning_module
        counts = [int(self.targets), int(self.real_tokens), self.slots]
        local = torch.tensor(counts, device=trainer.strategy.root_device)
        targets, tokens, slots = trainer.strategy.reduce(local, reduce_op="sum").tolist()
        return {
            "train/loss": sum(self.losses) / len(self.losses) if self.losses else None,
            "train/tokens": targets,
            "train/tokens_per_second": targets / self.seconds_train if targets else None,
            "train/pad_share": 1 - tokens / slots if slots else None,
            "train/skipped": module.guard.skipped,
            "seconds/fit": self.seconds_fit,
            "seconds/train": self.seconds_train,
        }
