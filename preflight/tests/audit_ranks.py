"""Two ranks on the CPU: what `Preflight` finds in losses that call collectives. Run by
test_lightning_ranks.py."""

import json
import os
import warnings

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.distributed import all_reduce, recv, send
from torch.utils.data import DataLoader

from causal_preflight.lightning import Preflight, PreflightError

V = 12


class Gathered(L.LightningModule):
    """Right: the sum of this rank, divided by the targets of all ranks; DDP averages the ranks."""

    shift = 1

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(V, 16), nn.Linear(16, V))

    def targets(self, n: Tensor) -> Tensor:
        return self.all_gather(n).sum()

    def training_step(self, batch, batch_idx):
        ids = batch["input_ids"]
        target = ids[:, self.shift :]
        logits = self.net(ids)[:, : target.shape[1]].mT
        total = F.cross_entropy(logits, target, ignore_index=0, reduction="sum")
        return total * self.trainer.world_size / self.targets((target != 0).sum())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Reduced(Gathered):
    """Right: as above, by torch, and with a metric on the way."""

    def targets(self, n):
        every = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(every, {"n": int(n)})
        assert len(every) == self.trainer.world_size
        torch.distributed.barrier()
        all_reduce(n)
        return n


class Undone(Reduced):
    """Wrong: DDP divides by the number of ranks once more."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) / self.trainer.world_size


class Shifted(Gathered):
    """Wrong: trained two tokens ahead."""

    shift = 2


class OwnMean(Gathered):
    """Wrong: each rank divides by its own targets, so that DDP makes a mean of means."""

    def targets(self, n):
        return n * self.trainer.world_size


class PointToPoint(Gathered):
    """What one rank cannot do alone."""

    def targets(self, n):
        (send if self.global_rank == 0 else recv)(n, 1 - self.global_rank)
        return self.all_gather(n).sum()


def main() -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    ids = torch.tensor([[1, 3, 4, 5, 6, 2], [1, 7, 8, 2, 0, 0], [1, 9, 5, 4, 2, 0]])
    batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    for case in (Gathered, Reduced, Undone, Shifted, OwnMean, PointToPoint):
        callback, stopped = Preflight(pad_id=0, eos_id=2), False
        trainer = L.Trainer(
            max_steps=1, accelerator="cpu", devices=2, logger=False, callbacks=[callback],
            strategy=DDPStrategy(process_group_backend="gloo"), enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        try:
            trainer.fit(case(), DataLoader([batch] * 4, batch_size=None))
        except PreflightError:
            stopped = True
        report = callback.report
        record = (case.__name__, sorted(report.faults), report.audited, stopped, report.skipped)
        with open(f"{os.environ['RECORDS']}/{os.environ.get('LOCAL_RANK', 0)}", "a") as file:
            print(json.dumps(record), file=file)


if __name__ == "__main__":
    main()
