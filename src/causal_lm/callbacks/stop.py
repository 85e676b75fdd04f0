"""What ends a run before its last step, with its checkpoint and its summary: a signal (Ctrl-C or
SIGTERM, after the step in hand), or writing that gets worse."""

import logging
import signal
from types import FrameType
from typing import Any

import lightning as L
import torch

log = logging.getLogger(__name__)
FIGURES = ("writing/repetition_4", "writing/consistency_")
"""What is compared, by its name or the beginning of it (the rest says what embeds)."""


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


class StopWhenWorse(L.Callback):
    """Stops a run whose writing gets worse, whatever its loss says.

    An evaluation is worse when the model repeats itself more, and its samples from one prompt agree
    less, than at the last evaluation that was not worse. (Than at the one just before would never
    be true for long, as both figures bounce.) A model that begins to learn may do both for a while.

    Args:
        patience: worse evaluations in a row that stop the run; None never stops it.
    """

    def __init__(self, patience: int | None) -> None:
        self.patience = patience
        self.because: str | None = None
        self.seen: list[list[float]] = []
        """Repetition and consistency of the last evaluations, all worse than the first of them."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or self.patience is None:
            return
        metrics = trainer.callback_metrics
        names = [n for start in FIGURES for n in metrics if n.startswith(start)]
        if len(names) < len(FIGURES):
            log.warning(f"step {trainer.global_step}: samples.patience has no {FIGURES} to go by")
            return
        now = [float(metrics[name]) for name in names]
        worse = self.seen and now[0] > self.seen[0][0] and now[1] < self.seen[0][1]
        self.seen = [*self.seen, now] if worse else [now]
        if len(self.seen) > self.patience:
            trainer.should_stop = True
            was_then = [
                f"{name} was {was:.4f}, then {', '.join(f'{figure:.4f}' for figure in then)}"
                for name, (was, *then) in zip(names, zip(*self.seen, strict=True), strict=True)
            ]
            self.because = (
                f"the writing is worse at {self.patience} evaluations in a row, up to step "
                f"{trainer.global_step}: {'; '.join(was_then)}"
            )
            log.warning(f"stopped: {self.because}")

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen = state_dict["seen"]
