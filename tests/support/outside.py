"""Classes of a user's own project: none of them is in causal_lm."""

from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import StochasticWeightAveraging
from lightning.pytorch.loggers import Logger

from causal_lm.models.tiny import Tiny


class Model(Tiny):
    """A model class of another package."""


class Figure(L.Callback):
    """Logs a metric of its own at each evaluation."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("own/figure", self.value)


class Averaging(StochasticWeightAveraging):
    """A subclass with a name of its own."""

    def __init__(self) -> None:
        super().__init__(swa_lrs=0.1)


class Recorder(Logger):
    """A logger of a user's own: keeps what it is given."""

    name = version = "recorder"

    def __init__(self) -> None:
        super().__init__()
        self.hparams: dict[str, Any] = {}
        self.metrics: list[tuple[int | None, dict[str, float]]] = []
        self.files: list[tuple[str, str, int]] = []

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self.hparams |= params

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.metrics.append((step, dict(metrics)))

    def log_file(self, name: str, path: Path, step: int) -> None:
        self.files.append((name, path.name, step))


class MeanOverRanks(L.Callback):
    """Logs a value as the first rank has it, and its mean over the ranks."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("own/value", self.value)
        pl_module.log("own/mean", self.value, sync_dist=True)
