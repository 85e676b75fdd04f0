"""A test split, its figures, runs by epochs, and what ends a run before its last step."""

import csv
import json
import logging
import math

import lightning as L
import pytest
import torch

from causal_lm import config
from causal_lm.checkpoint_file import RefusedError, read_checkpoint
from causal_lm.data.sources.huggingface import HuggingFaceDataset
from causal_lm.data.sources.text_files import TextFiles
from causal_lm.evaluate import evaluate
from support import command
from support.numbered import fit
from support.runs import SHORT, short_run

QUICK = ["preflight.on_fault=off", "samples.count=0", "samples.self_check.count=1"]
CALLBACK = "+callbacks.it._target_=lightning.pytorch.callbacks"
NAMES = ("best", "last")
TEN_BATCHES = [*QUICK, "trainer.max_steps=-1"]  # to an epoch: 40 documents, 4 to a batch


class StopAt(L.Callback):
    """Asks Lightning to stop after a step."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop |= trainer.global_step == self.step


def stop_at(step):
    return [f"+callbacks.stop._target_={__name__}.StopAt", f"+callbacks.stop.step={step}"]


def rows(directory, column):
    """(step, value) of each row of metrics.csv that has the column."""
    with (directory / "metrics.csv").open() as file:
        found = [(int(row["step"]), row.get(column)) for row in csv.DictReader(file)]
    return [(step, float(value)) for step, value in found if value]


def weights(directory, name="last"):
    return read_checkpoint(directory / "checkpoints" / f"{name}.ckpt")["state_dict"]


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


# ---- which document is in which split ----


def splits(path, tmp_path, kind=TextFiles, **options):
    """The texts of the training, the validation and the test documents."""
    shares = {"val_share": 0.2, "cache_dir": str(tmp_path / "cache"), "num_proc": 1}
    corpus = kind(path=str(path), **(shares | options)).load()
    return [
        [corpus.tokenizer.decode(part[i].tokens.tolist()) for i in range(len(part))]
        for part in (corpus.train, corpus.val, corpus.test or [])
    ]


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {i % 300}\n" for i in range(400)))  # 100 of them twice
    return path


def test_a_hash_deals_each_document_to_one_of_three_splits(lines, tmp_path):
    train, val, test = splits(lines, tmp_path, unit="line", test_share=0.3)
    assert sorted([*train, *val, *test]) == sorted(lines.read_text().splitlines())
    assert not set(train) & set(val) and not set(val) & set(test) and not set(test) & set(train)
    assert 0.2 < len(test) / 400 < 0.4 and 0.1 < len(val) / 400 < 0.3
    without = splits(lines, tmp_path, unit="line")
    assert without[1:] == [val, []]  # the documents of the test split come from training


def test_one_long_document_is_cut_in_three(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"é {i}\n" for i in range(3000)))
    (head,), (middle,), (tail,) = splits(path, tmp_path, test_share=0.1)
    assert head + middle + tail == path.read_text()
    assert all(part.endswith("\n") for part in (head, middle, tail))
    sizes = [len(part) / len(path.read_text()) for part in (head, middle, tail)]
    assert sizes == pytest.approx([0.7, 0.2, 0.1], abs=0.01)


@pytest.mark.parametrize("kind", [TextFiles, HuggingFaceDataset])
def test_a_file_of_its_own_for_testing(kind, lines, tmp_path, caplog):
    other = tmp_path / "other.txt"
    other.write_text("line 1\nnew\nnew too\nand new\n")
    with caplog.at_level(logging.WARNING):
        options = {"unit": "line", "test_path": str(other)}
        train, val, test = splits(lines, tmp_path, kind, **options)
    assert sorted([*train, *val]) == sorted(lines.read_text().splitlines()) and val
    assert test == other.read_text().splitlines()
    assert "25.0%" in caplog.text
    with pytest.raises(ValueError, match=r"25\.0%.*data\.max_overlap=0\.2"):
        splits(lines, tmp_path, kind, **options, max_overlap=0.2)
    copy = tmp_path / "copy.txt"
    copy.write_text(other.read_text())
    with pytest.raises(ValueError, match=r"100\.0% of the test .*data\.max_overlap"):
        splits(lines, tmp_path, kind, **options, val_path=str(copy))


def test_what_makes_no_test_split_is_refused_by_key(lines, tmp_path):
    with pytest.raises(ValueError, match=r"data\.path and in data\.test_path"):
        splits(lines, tmp_path, test_path=str(lines))
    with pytest.raises(ValueError, match=r"data\.test_split=test.*data\.test_path"):
        splits(lines, tmp_path, HuggingFaceDataset, test_split="test")
    with pytest.raises(config.ConfigError, match=r"data\.val_share and data\.test_share"):
        config.load(["data=docstrings", "data.val_share=0.5", "data.test_share=0.5"])
    with pytest.raises(config.ConfigError, match=r"data\.test_share=.*test_documents"):
        short_run(tmp_path / "run", "data.source.test_documents=0", "test=true")


# ---- its figures ----


def loss_of(checkpoint, data):
    return evaluate(str(checkpoint), data, split="test")["loss"]


def test_the_best_checkpoint_is_tested_at_the_end_or_later(tmp_path):
    """Trained on four documents, the model is soon at its best."""
    data = [f"data.source.{split}_documents={n}" for split, n in (("train", 4), ("test", 11))]
    steps = ["trainer.max_steps=16", "trainer.val_check_interval=4", "optimizer.lr=0.1"]
    words = [*QUICK, *data, *steps]
    assert short_run(tmp_path, *words)["test/loss"] is None
    summary = short_run(tmp_path, *words, "test=true", "ckpt_path=auto")
    assert summary["steps"] == 16 and summary["test/step"] < 16
    assert f"step {summary['test/step']}:" in summary["checkpoint/best"]
    assert short_run(tmp_path, *words, "test=true", "ckpt_path=auto") == summary  # nothing to do
    data += ["data=synthetic", "data.source.val_documents=13"]
    best, last = (loss_of(tmp_path / "checkpoints" / f"{name}.ckpt", data) for name in NAMES)
    assert summary["test/loss"] == pytest.approx(best, rel=1e-6) and best < last
    assert summary["test/ppl"] == pytest.approx(math.exp(summary["test/loss"]), rel=1e-5)
    assert rows(tmp_path, "test/loss") == [(16, pytest.approx(summary["test/loss"]))]


@pytest.mark.slow
def test_two_ranks_test_what_one_does(tmp_path):
    """On 13 documents, which two ranks do not share evenly."""
    words = [*SHORT, *QUICK, "test=true", "data.source.test_documents=13"]
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=2"]
    found = []
    for name, more in (("one", []), ("two", ranks)):
        done = command("train.py", *words, *more, f"hydra.run.dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / name / "summary.json").read_text()))
    assert found[1]["test/loss"] == pytest.approx(found[0]["test/loss"], rel=1e-5)
    best = tmp_path / "two" / "checkpoints" / "best.ckpt"
    data = ["data=synthetic", "data.source.test_documents=13", "data.source.train_documents=40"]
    assert found[1]["test/loss"] == pytest.approx(loss_of(best, data))
    sizes = {
        s: evaluate(str(best), data, split=s)["tokens"] for s in ("train", "val", "test", "all")
    }
    assert sizes.pop("all") == sum(sizes.values())


# ---- runs by epochs ----


def test_a_run_by_epochs_has_its_schedule_and_fractions_of_an_epoch(tmp_path):
    words = [*TEN_BATCHES, "trainer.max_epochs=2", "trainer.val_check_interval=0.5"]
    summary = short_run(tmp_path, *words)
    assert (summary["status"], summary["steps"], summary["epochs"]) == ("finished", 20, 2)
    evaluated = [step for step, _ in rows(tmp_path, "val/loss")]
    assert evaluated == [4, 9, 14, 19, 20]  # Lightning's steps before the last are from 0
    rates = [rate for _, rate in rows(tmp_path, "train/lr")]
    assert rates[-1] == pytest.approx(0.01 * max(rates), rel=1e-3)  # scheduler.final_share
    assert short_run(tmp_path, *words, "ckpt_path=auto")["steps"] == 20
    with pytest.raises(config.ConfigError, match=r"trainer\.max_steps.*trainer\.max_epochs"):
        config.load([*SHORT, "trainer.max_steps=-1"])


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_epoch_that_was_stopped_is_completed(accumulate, tmp_path):
    words = [*TEN_BATCHES, "trainer.max_epochs=3", "trainer.val_check_interval=4",
             "model.dropout=0.1", f"trainer.accumulate_grad_batches={accumulate}"]  # fmt: skip
    whole = short_run(tmp_path / "whole", *words)
    for step in (2, 4, 5, 10):  # within epochs, at their ends, at an evaluation
        directory = tmp_path / f"stopped{step}"
        stopped = short_run(directory, *words, *stop_at(step))
        assert (stopped["status"], stopped["steps"]) == ("stopped", step)
        resumed = short_run(directory, *words, "ckpt_path=auto")
        for key in ("status", "steps", "epochs", "train/tokens"):
            assert resumed[key] == whole[key], key
        assert same(weights(tmp_path / "whole"), weights(directory))
    checkpoint = f"ckpt_path={tmp_path / 'whole' / 'checkpoints' / 'last.ckpt'}"
    with pytest.raises(RefusedError, match=r"epoch 3: raise trainer\.max_epochs=2 "):
        short_run(tmp_path / "other", *words, "trainer.max_epochs=2", checkpoint)


@pytest.mark.slow
def test_a_run_that_is_continued_twice_knows_its_documents(tmp_path):
    """In batches of another size; the evaluation after the fit does not forget where it began."""
    short_run(tmp_path, *QUICK, "trainer.max_steps=5")
    short_run(tmp_path, *QUICK, "trainer.max_steps=7", "data.batch_size=8", "ckpt_path=auto")
    saved = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["causal_lm_training"]
    assert saved["position"]["start"] == [7, 0, [([0, 1, 0], 36)]]  # 5 × 4 + 2 × 8 documents of 40


@pytest.mark.parametrize(("accumulate", "said"), [(16, "sums 10,"), (4, "sums 2,"), (5, None)])
def test_steps_that_sum_fewer_micro_batches_are_said(accumulate, said, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="causal_lm.module"):
        fit(tmp_path, 1, size=100, batch_size=10, accumulate=accumulate)
    lines = [line for line in caplog.messages if "accumulate_grad_batches" in line]
    assert len(lines) == bool(said) and all(said in line for line in lines)


# ---- callbacks that stop a run, or average its weights ----


@pytest.mark.parametrize(
    "monitor",
    ["train/loss", *(pytest.param(f"val/{x}", marks=pytest.mark.slow) for x in ("loss", "ppl"))],
)
def test_early_stopping_by_a_logged_figure(monitor, tmp_path):
    words = [*QUICK, "trainer.max_steps=30", "+callbacks=early_stopping"]
    options = {"monitor": monitor, "patience": 2, "min_delta": 1000}
    words += [f"callbacks.early_stopping.{key}={value}" for key, value in options.items()]
    summary = short_run(tmp_path, *words)
    assert (summary["status"], summary["steps"]) == ("stopped", 9)  # the best is the first of 3
    assert f"monitor={monitor}, patience=2" in summary["stopped_because"]
    kept = {name: read_checkpoint(tmp_path / "checkpoints" / f"{name}.ckpt") for name in NAMES}
    assert kept["last"]["global_step"] == 9
    assert f"step {kept['best']['global_step']}:" in summary["checkpoint/best"]


def test_a_monitor_that_is_not_logged_lists_what_is(tmp_path):
    words = [*QUICK, "+callbacks=early_stopping", "callbacks.early_stopping.monitor=val/los"]
    with pytest.raises(RuntimeError, match=r"`val/los`.*`val/loss`"):
        short_run(tmp_path, *words)


def test_an_averaging_that_cannot_be_continued_is_refused():
    words = [f"{CALLBACK}.StochasticWeightAveraging", "+callbacks.it.swa_lrs=0.1"]
    with pytest.raises(config.ConfigError, match=r"StochasticWeightAveraging.*EMAWeightAveraging"):
        config.load(words)


@pytest.mark.slow
def test_averaged_weights_are_validated_kept_and_continued(tmp_path):
    data = ["data.source.train_documents=2000", "data.source.val_documents=50"]
    words = [*QUICK, *data, "trainer.max_steps=150", "trainer.val_check_interval=40"]
    plain = short_run(tmp_path / "plain", *words)
    words += [f"{CALLBACK}.EMAWeightAveraging", "+callbacks.it.decay=0.9"]
    averaged = short_run(tmp_path / "averaged", *words)
    assert averaged["val/loss"] == pytest.approx(plain["val/loss"], rel=0.02)
    assert not same(weights(tmp_path / "plain"), weights(tmp_path / "averaged"))
    for name in NAMES:
        path = tmp_path / "averaged" / "checkpoints" / f"{name}.ckpt"
        loss = evaluate(str(path), ["data=synthetic", *data])["loss"]
        assert loss == pytest.approx(min(v for _, v in rows(tmp_path / "averaged", "val/loss")))
    for step in (70, 80):
        stopped = short_run(tmp_path / f"{step}", *words, *stop_at(step))
        path = tmp_path / f"{step}" / "checkpoints" / "best.ckpt"
        best = min(value for _, value in rows(tmp_path / f"{step}", "val/loss"))
        assert evaluate(str(path), ["data=synthetic", *data])["loss"] == pytest.approx(best)
        assert stopped["stopped_because"]
        short_run(tmp_path / f"{step}", *words, "ckpt_path=auto")
        assert same(weights(tmp_path / f"{step}"), weights(tmp_path / "averaged"))
