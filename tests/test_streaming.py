"""A stream of text: every document once per pass on any ranks, and exact resumption."""

import json
import os
import random
import re
import sys
from collections import Counter
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from causal_lm import config
from causal_lm.config import ConfigError
from causal_lm.data.datamodule import DataModule
from causal_lm.data.sources.huggingface import HuggingFaceDataset
from causal_lm.data.tokenizers import ByteTokenizer
from causal_lm.models.tiny import Tiny
from causal_lm.module import CausalLM
from support import command

N = 150  # documents, a few of them longer than a row


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    draw, path = random.Random(0), tmp_path_factory.mktemp("stream") / "a.jsonl"
    rows = [f"{i} " + "x" * draw.choice([1, 5, 9, 60]) for i in range(N)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def make(path, streaming=True, rank=0, ranks=1, done=0, **options):
    """A DataModule, on one of several ranks, that has read ``done`` batches."""
    options = {"batch_size": 4, "max_length": 24, "shuffle_buffer": 50, "val_share": 0.1} | options
    data = DataModule(HuggingFaceDataset, path=str(path), streaming=streaming, **options)
    progress = SimpleNamespace(total=SimpleNamespace(started=done))
    loop = SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=ranks, fit_loop=loop)
    data.setup("fit")
    return data


def read(data, limit=None):
    """The documents of each batch of the rest of an epoch, as lists of their tokens."""
    batches = []
    for batch in data.train_dataloader():
        ids, documents = batch.input_ids, batch.document_ids
        rows = [
            [row[number == n].tolist() for n in range(int(number.max()) + 1)]
            for row, number in zip(ids, documents, strict=True)
        ]
        batches.append([document for row in rows for document in row])
        data.trainer.fit_loop.epoch_loop.batch_progress.total.started += 1
        if len(batches) == limit:
            break
    return batches


def flat(*parts):
    return sorted(document for batches in parts for batch in batches for document in batch)


@pytest.fixture(scope="module")
def stored(path):
    data = make(path, streaming=False, num_proc=1)
    assert len(data.train_windows) > len(data.corpus.train) > N / 2
    return flat(read(data))


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("layout", ["padded", "bucketed", "packed"])
def test_a_pass_has_the_windows_of_stored_documents_once(path, stored, layout, ranks):
    parts = [read(make(path, layout=layout, rank=r, ranks=ranks)) for r in range(ranks)]
    assert flat(*parts) == stored
    assert len({len(batches) for batches in parts}) == 1  # or a rank would wait for ever
    sizes = [sum(len(part[i]) for part in parts) for i in range(len(parts[0]))]
    assert set(sizes[:-1]) == {4 * ranks} and sizes[-1] <= 4 * ranks


def test_the_held_out_documents_are_those_of_the_stored_corpus(path):
    a, b = (make(path, streaming=s, test_share=0.1, num_proc=1) for s in (True, False))
    for one, other in ((a.val_windows, b.val_windows), (a.test_windows, b.test_windows)):
        assert len(one) == len(other) > 10
        for i in range(len(one)):
            assert one[i].tokens.tolist() == other[i].tokens.tolist()


def test_copies_of_held_out_documents_are_not_trained_on(tmp_path):
    path = tmp_path / "twice.jsonl"
    path.write_text("".join(json.dumps({"text": f"{i % 40}"}) + "\n" for i in range(80)))
    data = make(path, max_held_out=2, val_share=0.2)
    held_out = [data.corpus.val[i].tokens.tolist() for i in range(len(data.corpus.val))]
    seen = flat(read(data))
    assert len(held_out) == 2 and not any(document in held_out for document in seen)
    assert len(seen) == 80 - 2 * len({*map(tuple, held_out)})


def test_the_order_is_of_seed_and_epoch(path):
    data = make(path)
    first, second = read(data), read(data)
    assert flat(first) == flat(second) and first != second
    assert [first, second] == [read(again := make(path)), read(again)]
    assert read(make(path, seed=1)) != first
    plain = make(path, shuffle=False)
    texts = [plain.corpus.tokenizer.decode(d) for batch in read(plain) for d in batch]
    numbers = [int(text.split()[0]) for text in texts if " " in text]
    assert numbers == sorted(numbers)


def test_workers_and_processes_change_nothing(path):
    expected = read(make(path))
    assert read(make(path, num_workers=2)) == expected
    assert read(make(path, num_proc=2)) == expected


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_the_rest_of_a_pass_may_be_read_on_other_ranks_in_other_batches(path, stored, layout):
    for done in (0, 7, 13):  # before, within, and at the end of a pool
        data = make(path, layout=layout)
        before = read(data, done) if done else []
        saved = json.loads(json.dumps(data.save_position(0)))
        after = []
        for rank in (0, 1):
            other = make(path, rank=rank, ranks=2, done=done, batch_size=3, shuffle_buffer=20)
            other.resume(saved, {})
            after.append(read(other))
        assert flat(before, *after) == stored
        assert len(after[0]) == len(after[1])


def test_another_text_begins_a_new_pass(path, tmp_path, caplog):
    data = make(path)
    read(data, 5)
    saved = data.save_position(0)
    changed = tmp_path / "b.jsonl"
    changed.write_text(path.read_text().replace("xx", "yy"))
    other = make(changed, done=5)
    other.resume(saved, {})
    assert (
        flat(read(other)) == flat(read(make(changed))) and other.save_position(0)["start"][1] == 2
    )


def fit(path, folder, steps, ckpt_path=None, accumulate=1, **options):
    """The weights after so many steps, the batches on the way, and a checkpoint."""
    batches = []

    class Reads(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, number):
            batches.append(batch.input_ids.tolist())

    torch.manual_seed(0)
    module = CausalLM(
        Tiny(259, d_model=16, n_heads=2, n_layers=1, d_ff=16, max_positions=24, dropout=0.1),
        lambda p: torch.optim.AdamW(p, lr=0.01),
    )
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, accelerator="cpu",
        val_check_interval=10, check_val_every_n_epoch=None, limit_val_batches=1, logger=False,
        num_sanity_val_steps=0, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, use_distributed_sampler=False, callbacks=[Reads()],
    )  # fmt: skip
    data = DataModule(
        HuggingFaceDataset, path=str(path), streaming=True, batch_size=8, max_length=24,
        shuffle_buffer=50, val_share=0.1, **options,
    )  # fmt: skip
    trainer.fit(module, data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return torch.cat([p.detach().flatten() for p in module.parameters()]), batches


def test_a_broken_run_ends_as_an_unbroken_one(path, tmp_path):
    """Over the end of a pass, and broken between the micro-batches that were read ahead."""
    whole, batches = fit(path, tmp_path, 10, accumulate=3)
    assert flat(batches) != flat(batches[:20]) and len(batches) > 25
    _, before = fit(path, tmp_path, 4, accumulate=3)
    weights, after = fit(path, tmp_path, 10, tmp_path / "4.ckpt", accumulate=3)
    assert before + after == batches
    assert torch.equal(weights, whole)


@pytest.mark.slow
def test_a_run_broken_at_the_end_of_a_pass_does_too(path, tmp_path):
    options = {"layout": "packed", "num_workers": 1}
    end = len(read(make(path, layout="packed", batch_size=8)))
    whole, batches = fit(path, tmp_path, 2 * end, **options)
    for steps in (end - 1, end, end + 1):
        _, before = fit(path, tmp_path, steps, **options)
        weights, after = fit(path, tmp_path, 2 * end, tmp_path / f"{steps}.ckpt", **options)
        assert before + after == batches
        assert torch.equal(weights, whole)


@pytest.mark.parametrize(
    "wrong", ["trainer.max_steps=-1 trainer.max_epochs=1", "trainer.val_check_interval=0.5",
              "trainer.limit_train_batches=0.5", "trainer.overfit_batches=2", "data.tokenizer=bpe"],
)  # fmt: skip
def test_what_needs_stored_documents_is_refused(path, wrong):
    words = [f"+{w}" if "limit" in w or "overfit" in w else w for w in wrong.split()]
    with pytest.raises(ConfigError) as caught:
        config.load(["data=huggingface", f"data.path={path}", "data.streaming=true", *words])
    key, _, value = wrong.split()[0].partition("=")
    assert {"data.streaming=true", key, value} <= {*re.split("[ :]", str(caught.value))}


def test_a_file_that_is_read_as_a_whole_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('[{"text": "a"}]')
    with pytest.raises(ValueError, match=r"a\.json"):
        make(tmp_path / "a.json")
    (tmp_path / "a.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"a\.txt"):
        make(tmp_path / "a.txt", unit="file")


class Lacking(ByteTokenizer):
    def unknown(self, texts):
        return Counter("".join(texts)) & Counter(b=1000)


def test_what_is_skipped_or_unknown_is_said(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"b{i}"} if i % 9 else {} for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = make(path, on_error="skip", val_share=0.3, tokenizer=Lacking())
    assert [r.levelname for r in caplog.records if f"'b' ({len(data.corpus.val)})" in r.message]
    caplog.clear()
    read(data)
    assert [r.levelname for r in caplog.records if "10 records" in r.message] == ["WARNING"]


def test_an_empty_stream_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "b.txt").write_text("b\n")
    with pytest.raises(ValueError, match="no document for val"):
        make(tmp_path / "a.txt", val_share=1e-9)
    with pytest.raises(ValueError, match="no document for training"):
        make(tmp_path / "a.txt", val_path=str(tmp_path / "a.txt"))
    assert len(read(make(tmp_path / "a.txt", val_path=str(tmp_path / "b.txt")))) == 1


@pytest.mark.slow
def test_two_ranks_train_what_one_does_over_the_end_of_a_pass(path, tmp_path):
    words = [
        "data=huggingface", f"data.path={path}", "data.streaming=true", "data.shuffle_buffer=50",
        "data.max_length=24", "data.val_share=0.1", "trainer.max_steps=30", "optimizer=sgd",
        "optimizer.lr=0.1", "trainer.val_check_interval=1000", "preflight.on_fault=off",
        "trainer.enable_progress_bar=false", "samples.count=0", "samples.self_check.count=1",
        "model.d_model=16", "model.d_ff=16", "trainer=ddp", "trainer.accelerator=cpu",
    ]  # fmt: skip
    weights, tokens = [], []
    for ranks in (1, 2):
        here = tmp_path / f"{ranks}"
        size = [f"trainer.devices={ranks}", f"data.batch_size={8 // ranks}"]
        done = command("train.py", *words, *size, f"hydra.run.dir={here}", timeout=120)
        assert done.returncode == 0, done.stderr
        weights.append(torch.load(here / "checkpoints/last.ckpt", weights_only=True)["state_dict"])
        summary = json.loads((here / "summary.json").read_text())
        tokens.append(summary["train/tokens"])
        assert summary["epochs"] >= 1
    assert tokens[0] == tokens[1]
    for name, one in weights[0].items():
        torch.testing.assert_close(weights[1][name], one, rtol=1e-4, atol=1e-6)


@pytest.mark.extras
@pytest.mark.parametrize("kind", ["parquet", "disk", "parts", "folder"])
def test_data_sets_of_the_library_stream_and_go_on(path, stored, tmp_path, kind):
    datasets = pytest.importorskip("datasets")
    rows = datasets.Dataset.from_list([json.loads(row) for row in path.read_text().splitlines()])
    where = tmp_path / kind
    if kind == "parquet":
        rows.to_parquet(where)
    elif kind == "folder":
        where.mkdir()
        for i in range(3):
            rows.shard(3, i, contiguous=True).to_parquet(where / f"train-{i}.parquet")
    else:
        (rows if kind == "disk" else datasets.DatasetDict(train=rows)).save_to_disk(where)
    options = {"format": "parquet"} if kind == "parquet" else {}
    data = make(where, **options)
    before = read(data, 20)
    again = make(where, done=20, **options)
    again.resume(json.loads(json.dumps(data.save_position(0))), {})
    after = read(again)
    assert flat(before, after) == stored and len(after) > 10


def test_a_prompt_is_no_target(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"text": f" answer {i}", "q": f"question {i}?"} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    targets = [
        sorted(
            row[mask].tolist()
            for batch in make(path, streaming=s, prompt_field="q", num_proc=1).train_dataloader()
            for row, mask in zip(batch.input_ids, batch.loss_mask, strict=True)
        )
        for s in (True, False)
    ]
    assert targets[0] == targets[1] and len(targets[0]) > 40


MEMORY = """
import resource, sys
from causal_lm.data.datamodule import DataModule
from causal_lm.data.sources.huggingface import HuggingFaceDataset
if sys.argv[1].endswith("parquet"):
    import pyarrow.parquet

def megabytes():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000

before = megabytes()
data = DataModule(HuggingFaceDataset, path=sys.argv[1], streaming=True, batch_size=100,
                  max_length=1024)
data.setup("fit")
for number, batch in enumerate(data.train_dataloader()):
    if number in (150, 450):
        print(megabytes() - before)
    if number == 450:
        break
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["jsonl", pytest.param("parquet", marks=pytest.mark.extras)])
def test_a_gigabyte_is_read_within_a_bound_of_memory(tmp_path, kind):
    """Of which 45,000 documents of 1 kB are; the memory for them all would be 180 MB of tokens."""
    draw, path = random.Random(0), tmp_path / f"a.{kind}"
    rows = [{"text": "".join(draw.choices("abcdefgh ", k=1000))} for _ in range(1000)]
    if kind == "jsonl":
        block = "".join(f"{json.dumps(row)}\n" for row in rows)
        with path.open("w") as file:
            for _ in range(1000):
                file.write(block)
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        arrow = pytest.importorskip("pyarrow")
        table = arrow.concat_tables([arrow.Table.from_pylist(rows)] * 1000)
        parquet.write_table(table, path, use_dictionary=False, compression="none")
    assert path.stat().st_size > 10**9
    done = command("-c", MEMORY, str(path), PYTHONPATH=os.pathsep.join(sys.path))
    assert done.returncode == 0, done.stderr
    early, late = map(float, done.stdout.split())
    assert late < 300 and late < early + 60
