"""What ends a job of a sweep in the middle, and what is left of the sweep."""

import csv
import json
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L

ENDS = "+callbacks.end._target_=support.sweeps.SignalAtStep"
CHANGING = ("seconds/", "train/tokens_per_second")  # from one run to the next


class SignalAtStep(L.Callback):
    """Sends a signal after an optimizer step of the job with a seed, as ``SIGNAL`` in the
    environment says: its number, the seed, the step and, of a sweep with ranks, ``parent``."""

    def __init__(self) -> None:
        self.given = os.environ.get("SIGNAL", "").split()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if self.given and trainer.is_global_zero:
            number, seed, step = map(int, self.given[:3])
            if trainer.global_step == step and int(os.environ["PL_GLOBAL_SEED"]) == seed:
                os.kill(os.getppid() if "parent" in self.given else os.getpid(), number)


def signal_at(number: signal.Signals, seed: int, step: int, *whom: str) -> dict[str, str]:
    """The environment in which :class:`SignalAtStep` acts."""
    return {"SIGNAL": " ".join(map(str, (int(number), seed, step, *whom)))}


def figures(directory: Path) -> dict[str, Any]:
    """The summary of a run without its times."""
    summary = json.loads((directory / "summary.json").read_text())
    return {k: v for k, v in summary.items() if not k.startswith(CHANGING)}


def trained_steps(directory: Path) -> list[int]:
    """The steps of the rows of ``metrics.csv`` with a training loss."""
    with (directory / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
