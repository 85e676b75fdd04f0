"""A run that is broken off anywhere and continued reads on where it was, and ends with the very
weights of one that was not broken off."""

import os

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from causal_lm.data.datamodule import DataModule
from causal_lm.data.documents import Corpus, Documents
from causal_lm.data.tokenizers import Symbols
from causal_lm.module import CausalLM
from causal_lm.nonfinite import rows
from support import ROOT, command, make_model

STEPS = 12
PADDED = {"accumulate": 2}  # evaluated at every third micro-batch: also between optimizer steps
BUCKETED = {"layout": "bucketed", "padding_side": "left"}  # six batches to an epoch
PACKED = {"layout": "packed", "accumulate": 4}  # the last step of an epoch has two
WORKERS = {"num_workers": 1, "dropout": 0.0}


class Uneven:
    """Twenty-one documents, some of them longer than a row: 23 rows of up to 12 tokens."""

    def load(self):
        draw = torch.Generator().manual_seed(0)
        lengths = torch.randint(3, 12, (21,), generator=draw).tolist()
        lengths[4] = lengths[9] = 20
        documents = [torch.randint(3, 11, (n,), generator=draw).tolist() for n in lengths]
        return Corpus(
            Documents.from_lists(documents), Documents.from_lists(documents[:5]), Symbols(8)
        )


class Reads(L.Callback):
    """The tokens of each batch; each held the rows that the guard would name."""

    def __init__(self):
        self.batches = []

    def on_train_batch_start(self, trainer, pl_module, batch, number):
        self.batches.append(batch.input_ids[batch.document_ids >= 0].tolist())
        named = [trainer.datamodule.train_rows[i].tokens for i in rows(trainer, number)]
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


@pytest.mark.parametrize("options", [PADDED, BUCKETED, PACKED, WORKERS], ids=str)
def test_a_broken_run_ends_as_an_unbroken_one(tmp_path, options):
    whole, batches = fit(tmp_path, keep=[evaluated(tmp_path / "kept")], **options)
    breaks = sorted((tmp_path / "kept").iterdir())
    assert len(breaks) >= 4
    for steps in (2, 6, 8):  # inside an epoch, and at the end of one where a step is a batch
        _, before = fit(tmp_path / f"{steps}", steps, **options)
        assert before == batches[: len(before)]
        breaks.append(tmp_path / f"{steps}" / "last.ckpt")
    for path in breaks:
        weights, after = fit(tmp_path, ckpt_path=path, **options)
        assert after == batches[len(batches) - len(after) :], path
        assert torch.equal(weights, whole), path


def test_epochs_differ_and_are_whole(tmp_path):
    """The guard of the test above."""
    _, batches = fit(tmp_path)
    first, second = ([t for batch in batches[i : i + 6] for t in batch] for i in (0, 6))
    assert first != second and sorted(first) == sorted(second)


TWO_RANKS = """
import sys
from pathlib import Path
import torch
from test_resume import PADDED, evaluated, fit

here, options = Path(sys.argv[1]), PADDED | {"dropout": 0.0, "ranks": 2}
whole, batches = fit(here, keep=[evaluated(here / "kept")], **options)
fit(here / "broken", 7, **options)
same = []
for path in [*sorted((here / "kept").iterdir()), here / "broken" / "last.ckpt"]:
    weights, after = fit(here, ckpt_path=path, **options)
    same += [bool(torch.equal(weights, whole)) and after == batches[len(batches) - len(after):]]
with open(here / f"rank{torch.distributed.get_rank()}.txt", "w") as file:
    print(*same, file=file)
"""


@pytest.mark.slow
def test_two_ranks_do_too(tmp_path):
    (tmp_path / "two.py").write_text(TWO_RANKS)
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    done = command("two.py", str(tmp_path), cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        same = (tmp_path / f"rank{rank}.txt").read_text().split()
        assert len(same) >= 5 and set(same) == {"True"}
