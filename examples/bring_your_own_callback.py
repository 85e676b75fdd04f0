"""A callback of your own, outside the package: the accuracy of the next token on validation data.

Add it: `python train.py --config-dir examples/configs +callbacks=token_accuracy`. Its metric is
written to `metrics.csv` and `summary.json`.
"""

from typing import Any

import lightning as L
import torch

from causal_lm.data.collate import Batch
from causal_lm.objective import IGNORE


class TokenAccuracy(L.Callback):
    """Logs ``val/accuracy_K``: the fraction of targets among the K most likely tokens."""

    def __init__(self, k: int = 1) -> None:
        self.k, self.hits, self.targets = k, 0, 0

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        top_k = pl_module(batch).topk(self.k, dim=-1).indices  # (B, T, K)
        counted = batch.labels != IGNORE
        self.hits += int((top_k == batch.labels[..., None]).any(dim=-1)[counted].sum())
        self.targets += int(counted.sum())

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        local = torch.tensor([self.hits, self.targets], device=pl_module.device)
        hits, targets = trainer.strategy.reduce(local, reduce_op="sum").tolist()  # of all ranks
        pl_module.log(f"val/accuracy_{self.k}", hits / max(targets, 1))
        self.hits = self.targets = 0
