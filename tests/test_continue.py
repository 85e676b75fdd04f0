"""A run that is continued with other settings: what it reads, what it keeps, what is refused."""

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from causal_lm.data.datamodule import DataModule
from causal_lm.data.documents import Corpus, Documents
from causal_lm.data.sampler import DocumentSampler, Start
from causal_lm.data.tokenizers import SymbolTokenizer
from causal_lm.module import CausalLM
from support import make_model
from support.resume import evaluated

# ---- each document once per epoch ----

settings_of_a_part = st.tuples(
    st.integers(1, 7), st.integers(1, 4), st.booleans(), st.integers(0, 30)
)


@given(st.integers(1, 60), st.booleans(), st.lists(settings_of_a_part, min_size=1, max_size=6))
def test_any_settings_in_turn_read_each_document_once_per_epoch(size, shuffle, parts):
    lengths = torch.randint(2, 50, (size,), generator=torch.Generator().manual_seed(0)).numpy()
    start, done, seen = Start(), 0, []
    for batch_size, world_size, by_length, stop_after in parts:
        ranks = [
            DocumentSampler(
                size, shuffle=shuffle, rank=rank, world_size=world_size, batch_size=batch_size,
                by_length=by_length, lengths=lambda: lengths, start=start,
            )
            for rank in range(world_size)
        ]  # fmt: skip
        stop = done + stop_after
        while done < stop:
            rest = [list(rank.remaining_indices(done)) for rank in ranks]
            assert len({len(indices) for indices in rest}) == 1
            n_batches = min(stop - done, -(-len(rest[0]) // batch_size))
            read = [i for indices in rest for i in indices[: n_batches * batch_size] if i >= 0]
            seen, done = seen + read, done + n_batches
        position = ranks[-1].position(done)
        assert all(rank.position(done) == position for rank in ranks)
        start = Start(*position._asdict().values())
    for first in range(0, len(seen), size):
        epoch = seen[first : first + size]
        assert len(set(epoch)) == len(epoch)
        assert len(epoch) == size or first + size > len(seen)
    assert start.epoch * size + start.documents == len(seen)


class Numbered:
    """A source whose document i begins with the three digits of i; of various lengths."""

    def __init__(self, size=1000):
        self.size = size

    def load(self):
        documents = [[1 + int(digit) for digit in f"{i:03}"] + [1] * (i % 5) for i in range(self.size)]
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
    """The documents of each micro-batch, and the logged step of each; ``last.ckpt`` is kept."""
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


def flat(batches):
    return [i for batch in batches for i in batch]


@pytest.mark.parametrize(
    "then",
    [
        {"batch_size": 20},
        {"batch_size": 7, "layout": "bucketed", "accumulate": 3},
        {"batch_size": 30, "layout": "packed", "num_workers": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", ["padded", "bucketed"])
def test_no_document_is_lost_or_read_twice_where_the_batches_change(tmp_path, layout, then):
    first = fit(tmp_path, 30, batch_size=10, layout=layout)
    assert len(flat(first)) == 300
    steps = 30 + -(-700 // (then["batch_size"] * then.get("accumulate", 1)))
    rest = fit(tmp_path, steps + 1, tmp_path / "last.ckpt", **then)
    seen = flat(first) + flat(rest)
    assert sorted(seen[:1000]) == list(range(1000))
    assert len(set(seen[1000:])) == len(seen) - 1000 > 0  # the next epoch


def test_a_checkpoint_inside_an_accumulated_step_or_at_the_end_of_an_epoch(tmp_path):
    options = {"size": 110, "batch_size": 10}  # 11 micro-batches; the last step of an epoch has 3
    whole = fit(tmp_path, 5, accumulate=4, keep=[evaluated(tmp_path / "kept")], **options)
    done = {"epoch=0-step=1.ckpt": 4, "epoch=1-step=3.ckpt": 11}  # evaluated after 7 and 14
    assert {path.name for path in (tmp_path / "kept").iterdir()} == done.keys()
    for name, read in done.items():
        path = tmp_path / "kept" / name
        rest = fit(tmp_path, 10, path, size=110, batch_size=25, accumulate=2)
        seen = flat(whole[:read]) + flat(rest)
        assert sorted(seen[:110]) == sorted(seen[110:220]) == list(range(110))
    fit(tmp_path, 11, size=110, batch_size=10)  # exactly one epoch
    rest = fit(tmp_path, 16, tmp_path / "last.ckpt", size=110, batch_size=25)
    assert [len(batch) for batch in rest] == [25, 25, 25, 25, 10]
    assert sorted(flat(rest)) == list(range(110))


def test_other_documents_or_another_seed_begin_an_epoch(tmp_path):
    fit(tmp_path, 5, size=100, batch_size=10)
    for changed in ({"size": 90}, {"seed": 1}, {"shuffle": False}):
        options = {"size": 100, "batch_size": 10} | changed
        rest = fit(tmp_path / "x", 5 + options["size"] // 10, tmp_path / "last.ckpt", **options)
        assert sorted(flat(rest)) == list(range(options["size"]))
