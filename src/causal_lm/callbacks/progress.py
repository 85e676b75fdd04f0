"""Progress over the steps of the whole run (Lightning's own bar starts anew each epoch)."""

import sys
import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class StepBar(ProgressBar):
    """A bar of all steps of the run with the training and the validation loss.

    Where stderr is no terminal, a plain line every :data:`SECONDS_BETWEEN_LINES` instead.
    """

    def __init__(self) -> None:
        super().__init__()
        self._enabled, self._terminal = True, sys.stderr.isatty()
        self._bar: tqdm | None = None
        self._printed = time.monotonic()

    def disable(self) -> None:  # Lightning calls it on every rank but the first
        self._enabled = False

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if not self._enabled:
            return
        step, total = trainer.global_step, trainer.lightning_module.total_steps
        if not self._terminal:
            if time.monotonic() - self._printed >= SECONDS_BETWEEN_LINES:
                self._printed = time.monotonic()
                losses = ", ".join(f"{k} loss {v}" for k, v in self._losses(trainer).items())
                print(f"step {step} of {total}: {losses}", file=sys.stderr, flush=True)
            return
        if self._bar is None:  # not before the first step, as the preflight may end the run
            self._bar = tqdm(total=total, unit="step", mininterval=0.5)
            self._bar.n = self._bar.initial = step - 1
        if self._bar.update(step - self._bar.n):  # redrawn: only then synchronize for the losses
            self._bar.set_postfix(self._losses(trainer), refresh=False)

    def _losses(self, trainer: L.Trainer) -> dict[str, str]:
        logged = {name: trainer.callback_metrics.get(f"{name}/loss") for name in ("train", "val")}
        return {name: f"{float(v):.3f}" for name, v in logged.items() if v is not None}

    def on_train_end(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(self, *_: Any) -> None:
        self.on_train_end()
