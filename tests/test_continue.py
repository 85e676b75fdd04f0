"""A run that is continued with other settings: what it reads, what it keeps, what is refused."""

import csv
import json
import os
import shutil

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from causal_lm.checkpoint_file import read_checkpoint
from causal_lm.data.datamodule import document_fingerprint
from causal_lm.data.documents import Documents, FileArray
from causal_lm.data.sampler import DocumentSampler, Start
from causal_lm.module import CausalLM
from support import ROOT, command
from support.numbered import fit
from support.resume import evaluated
from support.runs import short_run

# ---- each document once per epoch ----

KINDS = [{}, {"by_length": True}, {"row_length": 64}]
settings_of_a_part = st.tuples(
    st.integers(1, 7), st.integers(1, 4), st.sampled_from(KINDS), st.integers(0, 30)
)


@given(st.integers(1, 60), st.booleans(), st.lists(settings_of_a_part, min_size=1, max_size=6))
def test_any_settings_in_turn_read_each_document_once_per_epoch(size, shuffle, parts):
    lengths = torch.randint(2, 50, (size,), generator=torch.Generator().manual_seed(0)).numpy()
    start, done, seen = Start(), 0, []
    for batch_size, world_size, kind, stop_after in parts:
        ranks = [
            DocumentSampler(
                size, shuffle=shuffle, rank=rank, world_size=world_size, batch_size=batch_size,
                lengths=lambda: lengths, start=start, **kind,
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
    assert start.epoch * size + sum(n for _, n in start.segments) == len(seen)


def flat(batches):
    return [i for batch in batches for i in batch]


@pytest.mark.parametrize(
    ("layout", "then"),
    [
        ("padded", {"batch_size": 20}),
        ("bucketed", {"batch_size": 7, "layout": "bucketed", "accumulate": 3}),
        ("bucketed", {"batch_size": 30, "layout": "packed", "num_workers": 2}),
    ],
    ids=str,
)
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


TWO_RANKS = """
import json, sys
from pathlib import Path
import torch
from support.numbered import fit

here = Path(sys.argv[1])
batches = fit(here, 20, here / "last.ckpt", size=110, batch_size=3, ranks=2)
(here / f"rank{torch.distributed.get_rank()}.json").write_text(json.dumps(batches))
"""


@pytest.mark.slow
def test_one_rank_becomes_two_and_one_again(tmp_path):
    first = fit(tmp_path, 5, size=110, batch_size=7, layout="bucketed")  # 35 documents
    (tmp_path / "two.py").write_text(TWO_RANKS)
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT / "tests")])
    done = command("two.py", str(tmp_path), cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    both = [a + b for a, b in zip(*ranks, strict=True)]
    assert [len(documents) for documents in both] == [6] * 12 + [3] + [6] * 2
    last = fit(tmp_path, 30, tmp_path / "last.ckpt", size=110, batch_size=10)
    seen = flat([*first, *both, *last])
    assert sorted(seen[:110]) == sorted(seen[110:]) == list(range(110))


def test_a_fingerprint_tells_documents_apart_and_reads_little(tmp_path):
    tokens = torch.arange(5_000_000, dtype=torch.int32) % 251
    offsets = torch.tensor([0, 2_000_000, 5_000_000])
    reference = document_fingerprint(Documents(tokens, offsets))
    (tmp_path / "tokens").write_bytes(tokens.numpy().tobytes())
    read = []

    class Counted(FileArray):
        def __getitem__(self, index):
            read.append(super().__getitem__(index))
            return read[-1]

    assert (
        document_fingerprint(Documents(Counted(tmp_path / "tokens", "int32"), offsets)) == reference
    )
    assert 0 < sum(map(len, read)) <= 2**20
    assert document_fingerprint(Documents(tokens, offsets[[0, 2]])) != reference
    tokens[0] = 7
    assert document_fingerprint(Documents(tokens, offsets)) != reference


# ---- whole runs ----

QUICK = ("preflight.on_fault=off", "samples.count=0", "samples.self_check.count=1",
         "scheduler=constant", "data.batch_size=4")  # fmt: skip


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    directory = tmp_path_factory.mktemp("six")
    return directory, short_run(directory, *QUICK)


@pytest.fixture
def directory(six_steps, tmp_path):
    """A copy of a run of six steps, in batches of four of its 40 documents."""
    shutil.copytree(six_steps[0], tmp_path / "run")
    return tmp_path / "run"


def lines_of(caplog, word):
    return [message for message in caplog.messages if word in message]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("seed=1", r"seed=0\b.* 1\b"),
        ("data.seed=1", r"data\.seed=0\b.* 1\b"),
        ("data.shuffle=false", r"data\.shuffle=True\b.* False\b"),
        ("optimizer=sgd", r"optimizer\._target_=\S*adamw\b.*\bsgd\b"),
        ("trainer.max_steps=5", r"step 6\b.*trainer\.max_steps=5\b"),
    ],
)
def test_a_change_that_is_refused_names_both_values_and_changes_no_file(directory, change, named):
    files = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    path = directory / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=named):
        short_run(directory, *QUICK, "trainer.max_steps=8", f"ckpt_path={path}", change)
    assert files == {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.parametrize("wrap", ["nested", "list", "positional", "interpolation"])
def test_nothing_that_the_saved_optimizer_says_is_executed(directory, wrap, monkeypatch):
    path, written = directory / "checkpoints" / "last.ckpt", directory / "written"
    call = {"_target_": "pathlib.Path.write_text", "_args_": [str(written), "x"]}
    monkeypatch.setenv("SECRET", "0.5")
    saved = torch.load(path, weights_only=True)
    saved["causal_lm_config"]["optimizer"] |= {
        "nested": {"betas": call},
        "list": {"betas": [call, 0.9]},
        "positional": {"_args_": [call]},
        "interpolation": {"weight_decay": "${oc.env:SECRET}"},
    }[wrap]
    torch.save(saved, path)
    with pytest.raises(ValueError, match=r"last\.ckpt.*optimizer\."):
        short_run(directory, *QUICK, "trainer.max_steps=8", "ckpt_path=auto")
    assert not written.exists()


def test_config_yaml_and_the_statistics_are_those_of_the_whole_run(directory, tmp_path, caplog):
    caplog.set_level("INFO")
    longer = (*QUICK, "trainer.max_steps=9")
    whole = short_run(tmp_path / "whole", *longer)
    changed = ("optimizer.lr=1e-7", "trainer.val_check_interval=2", "samples.temperature=1")
    summary = short_run(directory, *longer, "ckpt_path=auto", *changed)
    (line,) = lines_of(caplog, "from step 6")
    assert str(directory) in line and "samples.temperature 0.8 -> 1" in line
    assert OmegaConf.load(directory / "config.yaml").optimizer.lr == 8e-3
    saved = read_checkpoint(directory / "checkpoints" / "last.ckpt")
    assert saved["causal_lm_config"]["optimizer"]["lr"] == 8e-3
    assert saved["optimizer_states"][0]["param_groups"][0]["lr"] == 8e-3
    for key in ("train/tokens", "train/pad_share", "train/loss", "val/loss"):
        assert summary[key] == pytest.approx(whole[key], rel=1e-6), key
    with (directory / "metrics.csv").open() as file:
        rows = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert rows == list(range(9))


def test_logged_steps_go_on_where_the_batches_change(directory):
    changed = ("data.batch_size=3", "trainer.accumulate_grad_batches=2", "data.layout=bucketed")
    short_run(directory, *QUICK, *changed, "trainer.max_steps=12", "ckpt_path=auto")
    with (directory / "metrics.csv").open() as file:
        rows = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert rows == list(range(12))


def test_statistics_do_not_count_repeated_micro_batches(tmp_path, monkeypatch):
    """Broken off at an evaluation; the one before it was inside a step of two micro-batches."""
    options = (*QUICK, "trainer.accumulate_grad_batches=2", "trainer.max_steps=3")
    whole = short_run(tmp_path / "whole", *options)
    evaluate = CausalLM.on_validation_epoch_end

    def broken(self):
        if self.trainer.global_step == 3:
            raise RuntimeError("broken off")
        evaluate(self)

    with monkeypatch.context() as patch:
        patch.setattr(CausalLM, "on_validation_epoch_end", broken)
        with pytest.raises(RuntimeError, match="broken off"):
            short_run(tmp_path / "broken", *options)
    saved = read_checkpoint(tmp_path / "broken" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 1 and saved["causal_lm_training"]["unfinished"] == 1
    summary = short_run(tmp_path / "broken", *options, "ckpt_path=auto")
    for key in ("train/tokens", "train/pad_share", "train/loss", "val/loss"):
        assert summary[key] == pytest.approx(whole[key], rel=1e-6), key


def test_the_best_score_is_forgotten_where_other_documents_are_validated(directory, caplog):
    caplog.set_level("INFO")
    last, best = (directory / "checkpoints" / f"{name}.ckpt" for name in ("last", "best"))
    saved = torch.load(last, weights_only=True)
    (key,) = (name for name in saved["callbacks"] if "'val/loss'" in name)
    saved["callbacks"][key]["best_model_score"] = torch.tensor(0.5)  # nothing here is as good
    torch.save(saved, last)
    before = best.read_bytes()
    short_run(directory, *QUICK, "trainer.max_steps=7", "ckpt_path=auto")
    assert best.read_bytes() == before and not lines_of(caplog, "forgotten")
    other = ("trainer.max_steps=8", "ckpt_path=auto", "data.source.val_documents=12")
    assert short_run(directory, *QUICK, *other)["checkpoint/best"].startswith("step 8")
    assert best.read_bytes() != before and len(lines_of(caplog, "forgotten")) == 1


def test_auto_after_a_new_run_in_an_old_directory_does_not_continue_the_old_one(
    directory, monkeypatch, caplog
):
    caplog.set_level("INFO")
    old = {path.name: path.read_bytes() for path in (directory / "checkpoints").iterdir()}

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(L.Trainer, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            short_run(directory, *QUICK, "seed=1")
    assert len(lines_of(caplog, "checkpoints_1")) == 1
    short_run(directory, *QUICK, "trainer.max_steps=2", "ckpt_path=auto", "seed=1")
    assert [str(directory) in line for line in lines_of(caplog, "step 0")] == [True]
    assert read_checkpoint(directory / "checkpoints" / "last.ckpt")["global_step"] == 2
    aside = directory / "checkpoints_1"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == old
    short_run(directory, *QUICK, "trainer.max_steps=1")
    assert (directory / "checkpoints_2" / "last.ckpt").is_file()


def test_a_run_that_was_stopped_at_its_last_step_is_validated_and_finished(directory, six_steps):
    (directory / "summary.json").unlink()
    summary = short_run(directory, *QUICK, "ckpt_path=auto")
    assert summary["status"] == "finished" and summary["steps"] == 6
    for key in ("val/loss", "train/tokens", "train/loss"):
        assert summary[key] == pytest.approx(six_steps[1][key], rel=1e-6)
