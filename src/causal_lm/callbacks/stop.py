"""Ctrl-C and SIGTERM end a run after the step in hand, with its checkpoint and its summary."""

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
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._request)
        except ValueError:  # not the main thread: signals are somebody else's business
            self._before.clear()
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

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
