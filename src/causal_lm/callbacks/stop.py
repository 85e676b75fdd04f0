"""Ends a run at a signal (Ctrl-C or SIGTERM): after the step, with checkpoint and summary."""

import signal
from types import FrameType
from typing import Any

import lightning as L
import torch


class StopAfterStep(L.Callback):
    """The first signal asks the run to stop; a second Ctrl-C stops it where it is.

    A context: ``with StopAfterStep() as stop`` listens from before the start until after the
    summary, so that a signal at any time leaves a whole run.
    """

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopAfterStep":
        self._before = self._listen()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._listen()  # again: Lightning adds a SIGTERM handler of its own, which raises

    def _listen(self) -> dict[int, Any]:
        """Take the signals; returns who had them."""
        try:
            return {n: signal.signal(n, self._request) for n in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread: signals are somebody else's business
            return {}

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        stop = self.requested
        if trainer.world_size > 1:  # all ranks take the same number of steps
            flag = torch.tensor(int(stop), device=trainer.strategy.root_device)
            stop = bool(trainer.strategy.reduce(flag, reduce_op="sum"))
        if stop:
            self.requested = True
            trainer.should_stop = True
