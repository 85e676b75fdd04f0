"""Fits that are interrupted and resumed, and the batches that they read."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from causal_lm.data.datamodule import DataModule
from causal_lm.data.documents import Corpus, Documents
from causal_lm.data.tokenizers import SymbolTokenizer
from causal_lm.module import CausalLM
from causal_lm.nonfinite import dataset_indices
from support import make_model

STEPS = 12
PADDED = {"accumulate": 2}  # evaluated at every third micro-batch: also between optimizer steps
BUCKETED = {"layout": "bucketed", "padding_side": "left"}  # six batches to an epoch
PACKED = {"layout": "packed", "accumulate": 4}  # the last step of an epoch has two
WORKERS = {"num_workers": 1, "dropout": 0.0}


class Uneven:
    """A source of 21 documents, two of them longer than a row: 23 rows of up to 12 tokens."""

    def load(self):
        draw = torch.Generator().manual_seed(0)
        lengths = torch.randint(3, 12, (21,), generator=draw).tolist()
        lengths[4] = lengths[9] = 20
        documents = [torch.randint(3, 11, (n,), generator=draw).tolist() for n in lengths]
        return Corpus(
            Documents.from_lists(documents), Documents.from_lists(documents[:5]), SymbolTokenizer(8)
        )


class Reads(L.Callback):
    """Records the tokens of each batch; they must be those of the windows that the guard names."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, number):
        self.batches.append(batch.input_ids[batch.document_ids >= 0].tolist())
        named = [
            trainer.datamodule.train_windows[i].tokens for i in dataset_indices(trainer, number)
        ]
        assert sorted(torch.cat(named).tolist()) == sorted(self.batches[-1])


def fit(
    folder, steps=STEPS, ckpt_path=None, *, accumulate=1, dropout=0.1, ranks=1, keep=(), **data
):
    """The weights after so many steps, and the batches on the way; ``last.ckpt`` is kept."""
    reads = Reads()
    module = CausalLM(make_model(dropout=dropout), lambda p: torch.optim.AdamW(p, lr=0.01))
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, accelerator="cpu",
        val_check_interval=3, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=bool(keep), use_distributed_sampler=False, callbacks=[reads, *keep],
        devices=ranks, strategy="ddp" if ranks > 1 else "auto",
    )  # fmt: skip
    torch.manual_seed(0)
    batch_size = 4 // ranks
    trainer.fit(module, DataModule(Uneven(), batch_size=batch_size, max_length=12, **data),
                ckpt_path=ckpt_path)  # fmt: skip
    trainer.save_checkpoint(folder / "last.ckpt")
    return torch.cat([p.detach().flatten() for p in module.parameters()]), reads.batches


def evaluated(folder):
    """Keeps a checkpoint of each evaluation."""
    return ModelCheckpoint(folder, save_top_k=-1, save_on_train_epoch_end=False)
