"""Fits over numbered documents, whose batches tell which documents were read."""

import lightning as L
import torch

from causal_lm.data.datamodule import DataModule
from causal_lm.data.documents import Corpus, Documents
from causal_lm.data.tokenizers import SymbolTokenizer
from causal_lm.module import CausalLM
from support import make_model


class Numbered:
    """A source whose document i begins with the three digits of i; of various lengths."""

    def __init__(self, size=1000):
        self.size = size

    def load(self):
        numbers = [[1 + int(digit) for digit in f"{i:03}"] for i in range(self.size)]
        documents = [number + [1] * (i % 5) for i, number in enumerate(numbers)]
        return Corpus(
            Documents.from_lists(documents), Documents.from_lists(documents[:5]), SymbolTokenizer(8)
        )


class Reads(L.Callback):
    """Records the numbers of the documents of each micro-batch."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        real = batch.document_ids >= 0
        tokens, starts = batch.input_ids[real], (batch.position_ids[real] == 0).nonzero().ravel()
        digits = torch.stack([tokens[starts + i] - 1 for i in range(3)])
        self.batches.append((digits * torch.tensor([[100], [10], [1]])).sum(0).tolist())


def fit(folder, steps, ckpt_path=None, *, size=1000, accumulate=1, ranks=1, keep=(), **data):
    """The documents of each micro-batch; ``last.ckpt`` is kept."""
    reads = Reads()
    module = CausalLM(make_model(d_model=4, d_ff=4), lambda p: torch.optim.AdamW(p, lr=0.01))
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, accelerator="cpu",
        val_check_interval=7, check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=bool(keep),
        use_distributed_sampler=False, callbacks=[reads, *keep],
        devices=ranks, strategy="ddp" if ranks > 1 else "auto",
    )  # fmt: skip
    trainer.fit(module, DataModule(Numbered(size), max_length=12, **data), ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / "last.ckpt")
    return reads.batches
