"""Classes of a user's own project: none of them is in causal_lm."""

import lightning as L

from causal_lm.models.tiny import Tiny


class Model(Tiny):
    """A model class of another package."""


class Figure(L.Callback):
    """Logs a metric of its own at each evaluation."""

    def __init__(self, value: float) -> None:
        self.value = value

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log("own/figure", self.value)
