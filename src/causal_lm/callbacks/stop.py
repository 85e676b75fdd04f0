"""What ends a run before its last step, with its checkpoint and its summary: a signal (Ctrl-C or
SIGTERM, after the step in hand), or writing that gets worse."""

import logging
import math
import signal
from types import FrameType
from typing import Any

import lightning as L
import torch

log = logging.getLogger(__name__)

ERRORS = 3
"""Standard errors by which a rate must rise, before it is the model and not the draw."""


class StopAfterStep(L.Callback):
    """Stop the fit after the current step at SIGINT (Ctrl-C) or SIGTERM; a second SIGINT raises.

    Use it as a context around the whole run (``with StopAfterStep() as stop``), so that a signal
    outside the fit is noticed too. The run then ends with a checkpoint and a summary.
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


class DegenerationStopper:
    """Tells when the writing gets worse, whatever the loss says.

    An evaluation is worse when the model repeats itself more, by :data:`ERRORS`, and its samples
    from one prompt agree less, than at the last evaluation that was not worse. (Than at the one
    just before would never be true for long, as both figures bounce.) A model that begins to
    learn may do both for a while.

    Args:
        patience: worse evaluations in a row that are too many; None: none are.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.because: str | None = None
        self.warned = False
        self.seen: list[list[float]] = []
        """What the last evaluations were judged by, all worse than the first of them."""

    def judge(
        self, step: int, repetition: float | None, error: float, consistency: float | None
    ) -> bool:
        """Is the run to stop? To be asked once for each evaluation; ``because`` says why."""
        if self.patience is None:
            return False
        if repetition is None or consistency is None:
            if not self.warned:
                missing = "repetition" if repetition is None else "consistency"
                log.warning(f"step {step}: samples.patience cannot tell: there is no {missing}")
            self.warned = True
            return False
        now = [repetition, error, consistency]
        was, its_error, agreed = (self.seen or [now])[0]
        more = repetition - was > ERRORS * math.hypot(error, its_error)
        self.seen = [*self.seen, now] if more and consistency < agreed else [now]
        if len(self.seen) <= self.patience:
            return False
        rates, _, agreements = ([f"{x:.4f}" for x in each] for each in zip(*self.seen, strict=True))
        self.because = (
            f"the writing is worse at {len(rates) - 1} evaluations in a row, up to step {step}: "
            f"repetition was {rates[0]}, then {', '.join(rates[1:])}; "
            f"consistency was {agreements[0]}, then {', '.join(agreements[1:])}"
        )
        log.warning(f"stopped: {self.because}")
        return True
