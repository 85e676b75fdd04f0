"""Fits on two ranks, replicated and sharded; run as a script, it saves what they end with.

``sharded_fits.py FOLDER``: the file ``FOLDER/NAME.ckpt`` of each fit, and ``FOLDER/failed.json``.
"""

import json
import sys
from pathlib import Path

import lightning as L
import torch
from torch.distributed.tensor import DTensor

from causal_lm.data.datamodule import DataModule
from causal_lm.generation import sample
from causal_lm.models.decoder import Decoder
from causal_lm.module import CausalLM
from causal_lm.objective import LossConfig
from causal_lm.optim.optimizers import adamw, muon, sgd
from causal_lm.sharding import FullyShardedStrategy
from support.resume import Uneven

OPTIMIZERS = {
    "adamw": lambda groups: adamw(groups, lr=0.01, weight_decay=0.1, fused=True),
    "muon": lambda groups: muon(groups, muon_lr=0.02, muon_momentum=0.9, lr=0.01, weight_decay=0.1),
    "sgd": lambda groups: sgd(groups, lr=0.5),
    "endless": lambda groups: sgd(groups, lr=float("inf")),
}


class Samples(L.Callback):
    """Samples at each evaluation, on all ranks and without gradients."""

    def on_validation_epoch_end(self, trainer, pl_module):
        self.rows = sample(pl_module, torch.ones(2, 1, dtype=torch.int64), 8, temperature=0)


def fit(path, strategy, *, optimizer="adamw", steps=4, start=None, chunk=None, devices=2):
    """Train a tied Llama for so many steps, each of two micro-batches, and save it at ``path``."""
    torch.manual_seed(0)
    model = Decoder(11, 16, 4, 2, 2, 32, tied=True)
    module = CausalLM(model, OPTIMIZERS[optimizer], loss=LossConfig(chunk_tokens=chunk))
    samples = Samples()
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_steps=steps, max_epochs=-1,
        accumulate_grad_batches=2, gradient_clip_val=0.5, val_check_interval=4,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=False, callbacks=[samples],
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False,
    )  # fmt: skip
    data = DataModule(Uneven(), batch_size=4 // devices, max_length=12, layout="packed")
    trainer.fit(module, data, ckpt_path=start)
    trainer.save_checkpoint(path)
    if trainer.is_global_zero:
        states = (s for state in trainer.optimizers[0].state.values() for s in state.values())
        kept = [
            t.to_local() if isinstance(t, DTensor) else t for t in (*model.parameters(), *states)
        ]
        numbers = sum(t.numel() for t in kept)
        torch.save({"samples": samples.rows, "val": trainer.callback_metrics, "kept": numbers},
                   f"{path}.figures")  # fmt: skip


def main(folder: Path) -> None:
    for name in ("adamw", "muon", "sgd"):
        fit(folder / f"{name}_ddp.ckpt", "ddp", optimizer=name)
        fit(folder / f"{name}_fsdp.ckpt", FullyShardedStrategy(), optimizer=name, chunk=4)
        resumed = ("2_ddp", "2_fsdp", "2_fsdp_fsdp", "2_ddp_fsdp", "2_fsdp_ddp")
        for path in resumed if name == "adamw" else resumed[1:3]:
            before, _, kind = path.rpartition("_")
            strategy = "ddp" if kind == "ddp" else FullyShardedStrategy()
            start = None if before == "2" else folder / f"{name}_{before}.ckpt"
            fit(folder / f"{name}_{path}.ckpt", strategy, optimizer=name, start=start,
                steps=4 if start else 2)  # fmt: skip
    try:
        fit(folder / "failed.ckpt", FullyShardedStrategy(), optimizer="endless")
    except FloatingPointError as error:
        rank = torch.distributed.get_rank()
        (folder / f"failed_{rank}.json").write_text(json.dumps(str(error)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
