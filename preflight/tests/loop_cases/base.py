"""A small model, a right loop around it, and a short fit."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

V, C, T = 12, 8, 6


class Net(nn.Module):
    """Embedding, two blocks with dropout, norm, head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, C)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.Dropout(0.1)) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


class Right(L.LightningModule):
    """A right loop, under automatic or manual optimization; subclasses break one method of it."""

    n = 1  # micro-batches of a step

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = not manual
        self.net = self.make()

    def make(self) -> nn.Module:
        return Net()

    def loss(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.net(ids)[:, :-1].transpose(1, 2), ids[:, 1:])

    def training_step(self, ids: Tensor, i: int) -> Any:
        loss = self.loss(ids)
        self.log("train/loss", loss)
        if self.automatic_optimization:
            return self.scaled(loss)
        self.manual_backward(self.scaled(loss) / self.n)
        if (i + 1) % self.n == 0:
            self.finish(i)
        return None

    def scaled(self, loss: Tensor) -> Tensor:
        return loss

    def finish(self, i: int) -> None:
        """A manual step, after the backward pass."""
        optimizer = self.optimizers()
        optimizer.step()
        self.zero()
        self.schedule(i)

    def zero(self) -> None:
        self.optimizers().zero_grad()

    def schedule(self, i: int) -> None:
        if scheduler := self.lr_schedulers():
            scheduler.step()

    def validation_step(self, ids: Tensor, i: int) -> None:
        self.log("val/loss", self.loss(ids), batch_size=len(ids))

    def on_validation_epoch_end(self) -> None: ...

    def parts(self) -> Any:
        return self.parameters()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parts(), lr=1e-3, weight_decay=0.0)


def fit(module: L.LightningModule, *callbacks: Any, **options: Any) -> L.Trainer:
    ids = torch.randint(0, V, (16, T), generator=torch.Generator().manual_seed(1))
    data = options.pop("data", ids)
    options = {
        "max_steps": 4,
        "max_epochs": 1,
        "logger": False,
        "val_check_interval": 4,
        "limit_val_batches": 2,
        "num_sanity_val_steps": 0,
    } | options
    trainer = L.Trainer(
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=2), DataLoader(ids, batch_size=4))
    return trainer
