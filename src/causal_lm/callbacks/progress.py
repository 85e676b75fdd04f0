"""One bar over the steps of the run (Lightning's own bar starts anew each epoch)."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from tqdm import tqdm


class StepBar(ProgressBar):
    """``trainer.max_steps`` from left to right, with the training and the validation loss."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._bar: tqdm | None = None

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not (self._enabled and trainer.is_global_zero):
            return
        if self._bar is None:  # not before the first step, which the preflight may refuse
            self._bar = tqdm(total=trainer.max_steps, unit="step", mininterval=0.5)
            self._bar.n = self._bar.initial = trainer.global_step - 1
        ahead = trainer.global_step - self._bar.n
        if self._bar.update(ahead):  # true when it redrew: only then is the loss fetched
            seen = trainer.callback_metrics
            shown = {"train": seen.get("train/loss"), "val": seen.get("val/loss")}
            self._bar.set_postfix(
                {k: f"{float(v):.3f}" for k, v in shown.items() if v is not None}, refresh=False
            )

    def on_train_end(self, *_: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def on_exception(self, *args: Any) -> None:
        self.on_train_end()
