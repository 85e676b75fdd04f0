"""A stream of text: every document once per pass on any ranks, and exact resumption."""

import json
import logging
import random
import re
from collections import Counter
from types import SimpleNamespace

import lightning as L
import pytest
import torch

from causal_lm import config
from causal_lm.build import instantiate
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
    write(tmp_path / "a.json", map(str, range(20)))
    words = ["data=huggingface", "data.streaming=true", "data.format=jsonl", "data.unit=record"]
    cfg = config.load([*words, f"data.path={tmp_path / 'a.json'}", "data.val_share=0.5"])
    assert 0 < len(instantiate(cfg.data).load().val) < 20
    (tmp_path / "a.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"a\.txt"):
        make(tmp_path / "a.txt", unit="file")


def write(path, texts, **more):
    path.write_text("".join(json.dumps({"text": text} | more) + "\n" for text in texts))
    return str(path)


def figures(caplog, level, word):
    """The figures in each line of a level that has a word."""
    found = (r.getMessage() for r in caplog.records if r.levelname == level)
    return [[*map(float, re.findall(r"\d+\.?\d*", line))] for line in found if word in line]


@pytest.fixture
def _lacking(monkeypatch):
    """A tokenizer that lacks the letter b."""
    lacked = Counter(b=1000)
    monkeypatch.setattr(ByteTokenizer, "unknown", lambda _, texts: Counter("".join(texts)) & lacked)


@pytest.mark.usefixtures("_lacking")
def test_what_is_skipped_or_unknown_is_said(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    rows = [{"text": f"b{i}"} if i % 9 else {} for i in range(90)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = make(path, on_error="skip", val_share=0.3)
    n_val = len(data.corpus.val)
    assert figures(caplog, "WARNING", "'b'") == [[n_val, n_val], [80, 80]]  # at the start
    caplog.clear()
    for _ in range(2):  # passes, each with its beginning and its total
        read(data)
    assert figures(caplog, "WARNING", "'b'") == [[80, 80]] * 4
    assert [found[-1] for found in figures(caplog, "WARNING", "records")] == [10, 10]


@pytest.mark.usefixtures("_lacking")
def test_what_the_vocabulary_lacks_is_said_as_it_is_met(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", [*(f"{i} " + "a" * 9990 for i in range(150)), "b"])
    data = make(path, max_length=10_100, val_path=write(tmp_path / "val.jsonl", "c"))
    assert not figures(caplog, "WARNING", "'b'")
    read(data)
    (n, n_read), total = figures(caplog, "WARNING", "'b'")
    assert n == 1 and 0 < n_read < 100 and total == [1, 151]  # then, and at the end of the pass


def test_windows_that_a_prompt_fills_are_said(tmp_path, caplog):
    path = write(tmp_path / "a.jsonl", map(str, range(90)), q="a question of some 30 letters")
    make(path, prompt_field="q", max_length=60)
    assert not figures(caplog, "WARNING", "max_length")
    make(path, prompt_field="q", max_length=20)
    train, val = figures(caplog, "WARNING", "max_length")
    assert train[0] == val[0] == 50 and train[1] + val[1] == 2 * 90


def test_held_out_documents_that_are_elsewhere_are_counted_or_refused(path, tmp_path, caplog):
    copy = write(tmp_path / "copy.jsonl", [json.loads(row)["text"] for row in path.open()])
    other, quarter = ([f"{word} {i}" for i in range(40)] for word in ("other", "new"))
    quarter = write(tmp_path / "quarter.jsonl", other[:10] + quarter[10:])
    other = write(tmp_path / "other.jsonl", other)
    for split, options in (
        ("val", {"val_path": str(path)}), ("val", {"val_path": copy, "max_held_out": 100}),
        ("test", {"test_path": copy}), ("test", {"test_path": other, "val_path": other}),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rf"100\.0% of the {split} .*data\.max_overlap=0\.5"):
            make(path, **options)
    options = {"test_path": other, "val_path": quarter}
    with pytest.raises(ValueError, match=r"25\.0% of the test .*data\.max_overlap=0\.2"):
        make(path, **options, max_overlap=0.2)
    caplog.clear()
    assert len(flat(read(make(path, **options)))) > N
    assert figures(caplog, "WARNING", "test") == [[25.0]] * 2  # as it starts, and as it ends


def test_documents_that_are_passed_over_are_counted_in_each_pass(path, tmp_path, caplog):
    """Those of a file that is not held out as a whole are no fault, however many they are."""
    caplog.set_level(logging.INFO)
    texts = [json.loads(row)["text"] for row in path.open()]
    twice = write(tmp_path / "twice.jsonl", [*texts[:20], *texts])
    data = make(path, val_path=twice, max_held_out=20, max_overlap=1)
    for _ in range(2):
        read(data)
    assert figures(caplog, "INFO", "stream") == [[N, len({*texts[:20]})]] * 2
    caplog.clear()
    data = make(path, val_share=0.7)
    read(data)
    assert figures(caplog, "INFO", "stream") == [[N, len(data.corpus.val)]]
    assert len(data.corpus.val) > N / 2 and not figures(caplog, "WARNING", "split")


def test_an_empty_stream_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("a\n")
    (tmp_path / "b.txt").write_text("b\n")
    with pytest.raises(ValueError, match="no document for val"):
        make(tmp_path / "a.txt", val_share=1e-9)
    with pytest.raises(ValueError, match=r"train .* no document"):
        make(tmp_path / "a.txt", val_path=str(tmp_path / "a.txt"), max_overlap=1)
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
