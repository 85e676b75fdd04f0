"""Ends a run at a signal (Ctrl-C or SIGTERM): after the step, with checkpoint and summary."""

import signal
from types import FrameType
from typing import Any

import lightning as L
import torch


class StopAfterStep(L.Callback):
    """Stop the fit after the current step at SIGINT (Ctrl-C) or SIGTERM; a second SIGINT raises.

    Use it as a context around the whole run, so that a signal outside the fit is noticed too.
    """

    def __init__(self) -> None:
        self.requested = False
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "StopAfterStep":
        self._handlers = self._install()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._install()  # again: Lightning has set a SIGTERM handler of its own, which raises

    def _install(self) -> dict[int, Any]:
        """Handle the signals here; return the handlers from before."""
        try:
            return {n: signal.signal(n, self._request) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # outside the main thread, where handlers cannot be set
            return {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        stop = self.requested
        if trainer.world_size > 1:  # all ranks must take the same number of steps
            flag = torch.tensor(int(stop), device=trainer.strategy.root_device)
            stop = bool(trainer.strategy.reduce(flag, reduce_op="sum"))
        if stop:
            self.requested = True
            trainer.should_stop = True
