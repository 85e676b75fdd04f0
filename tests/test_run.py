"""Whole runs, short ones: the files of the contract, going on, stopping, many ranks, failing."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from omegaconf import OmegaConf

from causal_lm import config
from causal_lm.build import restore
from causal_lm.module import CausalLM
from support import ROOT, command
from support.runs import FILES, SHORT, short_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    return directory, short_run(directory)


def test_the_contract(finished):
    directory, summary = finished
    assert {p.name for p in directory.iterdir()} == FILES | {"checkpoints", "samples"}
    on_disk = json.loads((directory / "summary.json").read_text())
    assert on_disk == summary
    assert set(SUMMARY_KEYS) <= set(on_disk)
    assert {k for k, v in on_disk.items() if v is None} == {
        "error", "stopped_because", "val/bpb", "checkpoint/stable", "checkpoint/steady", "writing/repetition_spread",
        "writing/consistency_sentences",
    }  # fmt: skip
    assert [p.name for p in sorted((directory / "samples").iterdir())] == [
        "step_00000003.txt", "step_00000006.txt",
    ]  # fmt: skip
    assert on_disk["steps"] == 6
    assert on_disk["status"] == "finished"
    assert on_disk["checkpoint/last"] == "step 6: where the run ended"
    assert on_disk["checkpoint/best"] == f"step 6: val/loss is lowest, {on_disk['val/loss']:.4f}"
    assert on_disk["val/loss"] == on_disk["val/loss_as_trained"]
    assert on_disk["val/ppl_over_floor"] == pytest.approx(on_disk["val/ppl"] / on_disk["floor/ppl"])
    assert OmegaConf.load(directory / "config.yaml").data.max_length == 20  # resolved
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/loss"]]) == 6
    assert len([row for row in rows if row["val/loss"]]) >= 2
    assert len([row for row in rows if row["writing/repetition_4"]]) == 2
    assert "--- 3" in (directory / "samples.txt").read_text()
    assert json.loads((directory / "preflight.json").read_text())["faults"] == []


def test_tokens_are_counted_by_hand(finished, tmp_path):
    """One epoch of 40 documents: n - 1 targets each."""
    from causal_lm.build import instantiate

    summary = short_run(tmp_path, "trainer.max_steps=10")
    data = instantiate(config.load(SHORT).data)
    data.setup()
    assert summary["train/tokens"] == int((data.corpus.train.lengths - 1).sum())
    assert 0 < summary["train/pad_share"] < 1


def test_the_checkpoint_is_all_that_sampling_needs(finished):
    directory, _ = finished
    path = directory / "checkpoints" / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 6
    assert torch.load(directory / "checkpoints" / "best.ckpt", weights_only=True)
    module, tokenizer, _ = restore(path)
    assert not module.training
    assert tokenizer.vocab_size == 43
    once, again = (
        command("scripts/generate.py", str(path), "--prompt", "ab", "--seed", "3") for _ in range(2)
    )
    assert once.returncode == 0, once.stderr
    assert once.stdout == again.stdout
    assert once.stdout.count("\nab") == 4
    bad = command("scripts/generate.py", str(path), "--prompt", "é")
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: 'é' is no symbol")


def test_going_on_from_a_finished_run(finished, tmp_path):
    directory, _ = finished
    path = directory / "checkpoints" / "last.ckpt"
    summary = short_run(tmp_path / "more", f"ckpt_path={path}", "trainer.max_steps=9")
    assert summary["steps"] == 9
    same = short_run(tmp_path / "same", f"ckpt_path={path}")  # nothing left to do
    assert same["steps"] == 6
    assert same["train/loss"] is None
    assert same["val/loss"] == pytest.approx(
        json.loads((directory / "summary.json").read_text())["val/loss"]
    )


def test_a_checkpoint_of_another_configuration_is_refused(finished, tmp_path):
    path = finished[0] / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"written with model\.d_model=16, but this run has 32"):
        short_run(tmp_path / "a", f"ckpt_path={path}", "model.d_model=32")
    with pytest.raises(ValueError, match=r"written with tokenizer\.symbols=40, .* has 30"):
        short_run(tmp_path / "b", f"ckpt_path={path}", "data.source.symbols=30")
    with pytest.raises(ValueError, match="ckpt_path must be a file that exists"):
        short_run(tmp_path / "c", "ckpt_path=nowhere")
    (tmp_path / "broken.ckpt").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        short_run(tmp_path / "d", f"ckpt_path={tmp_path / 'broken.ckpt'}")
    assert json.loads((tmp_path / "d" / "summary.json").read_text())["status"] == "failed"


def test_a_fault_that_nobody_asked_for_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"shift: .*; change pitfalls\.unshifted_labels"):
        short_run(tmp_path, "pitfalls.unshifted_labels=true")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["preflight/faults"] == ["shift"]
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(("on_fault", "faults"), [("warn", ["shift"]), ("off", [])])
def test_a_fault_that_is_wanted(on_fault, faults, tmp_path):
    summary = short_run(
        tmp_path, "pitfalls.unshifted_labels=true", f"preflight.on_fault={on_fault}"
    )
    assert summary["preflight/faults"] == faults
    assert (summary["seconds/preflight"] is None) == (on_fault == "off")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_goes_on(number, tmp_path):
    """A process stopped by a signal leaves a checkpoint and a summary, and can be continued."""
    process = subprocess.Popen(
        [sys.executable, "train.py", *SHORT, "trainer.max_steps=100000",
         "trainer.val_check_interval=100000", f"hydra.run.dir={tmp_path}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = tmp_path / "metrics.csv"
    for _ in range(600):
        if metrics.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert summary["stopped_because"] == "a signal asked for it"
    assert 0 < summary["steps"] < 100000
    more = short_run(
        tmp_path / "more",
        f"ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}",
        f"trainer.max_steps={summary['steps'] + 2}",
    )
    assert more["steps"] == summary["steps"] + 2


def test_two_ranks_measure_what_one_does(tmp_path):
    """The same weights on 13 documents, which two ranks do not share evenly."""
    one = tmp_path / "one"
    assert command("train.py", *SHORT, f"hydra.run.dir={one}").returncode == 0
    two = tmp_path / "two"
    done = command(
        "train.py", *SHORT, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2",
        f"ckpt_path={one}/checkpoints/last.ckpt", f"hydra.run.dir={two}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    a, b = (json.loads((d / "summary.json").read_text()) for d in (one, two))
    assert b["val/loss"] == pytest.approx(a["val/loss"], rel=1e-6)
    assert b["val/ppl"] == pytest.approx(a["val/ppl"], rel=1e-6)


def test_two_ranks_train_and_a_sweep_of_them_does_not_mix(tmp_path):
    done = command(
        "train.py", "-m", *SHORT, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2",
        "trainer.max_steps=5", "seed=1,2", f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summaries = [json.loads((tmp_path / f"{i}_fix/summary.json").read_text()) for i in (0, 1)]
    assert [s["seed"] for s in summaries] == [1, 2]
    # 5 steps × 2 ranks × 4 documents is all 40 of them, each once
    from causal_lm.build import instantiate

    data = instantiate(config.load(SHORT).data)
    data.setup()
    assert {s["train/tokens"] for s in summaries} == {int((data.corpus.train.lengths - 1).sum())}


def test_a_sweep_ends_in_a_table_and_a_failure_does_not_stop_it(tmp_path):
    done = command(
        "train.py", "-m", *SHORT, "experiment=fix,bug", "preflight.on_fault=error",
        f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 1
    table = done.stdout.rpartition("run  ")[2]
    assert "0_fix" in table
    assert "clean" in table
    assert "1_bug  failed" in table.replace("     ", " ")
    assert "change pitfalls.unshifted_labels" in (tmp_path / "1_bug" / "train.log").read_text()
    assert "Traceback" not in done.stderr


def test_runs_started_together_do_not_share_a_directory(tmp_path):
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *SHORT, "trainer.max_steps=1"],
            cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]  # fmt: skip
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    assert len(list((tmp_path / "runs" / "fix").iterdir())) == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_said_in_one_line(tmp_path):
    done = command("train.py", "trainer=gpu", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1
    assert done.stderr == (
        "error: trainer.accelerator=gpu is not available on this machine: "
        "type trainer=cpu, or trainer=auto for what there is\n"
    )


def test_an_unwritable_run_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = command("train.py", *SHORT, f"hydra.run.dir={tmp_path}/file/run")
    assert done.returncode == 1
    assert f"{tmp_path}/file" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_fault_in_the_numbers_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"with rows \d+, .* is not finite at step \d"):
        short_run(
            tmp_path,
            "optimizer.lr=1e30",
            "scheduler.warmup_steps=0",
            "trainer.val_check_interval=1",
        )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed" and "is not finite" in summary["error"]
    assert not (tmp_path / "checkpoints").exists()  # no evaluation was finite


@pytest.mark.parametrize(("every", "steps"), [(1, 6), (3, 4)])
def test_the_last_good_checkpoint_is_kept(every, steps, tmp_path, monkeypatch):
    """Step 4 breaks the weights (they stay finite): before an evaluation, or as the last step."""
    good = {}

    def break_weights(self, *_):
        if self.trainer.global_step == 3:
            good.update({name: w.clone() for name, w in self.state_dict().items()})
        if self.trainer.global_step == 4:
            torch._foreach_mul_([p.data for p in self.parameters()], 1e30)

    monkeypatch.setattr(CausalLM, "on_train_batch_end", break_weights)
    with pytest.raises(FloatingPointError, match="not finite"):
        short_run(tmp_path, f"trainer.val_check_interval={every}", f"trainer.max_steps={steps}")
    for name in ("last", "best"):
        kept = torch.load(tmp_path / f"checkpoints/{name}.ckpt", weights_only=True)
        assert kept["global_step"] == 3
        assert all(torch.equal(kept["state_dict"][key], weight) for key, weight in good.items())


def test_before_any_evaluation_the_weights_in_hand_are_kept(tmp_path, monkeypatch):
    def break_gradients(self, *_):
        if self.trainer.global_step == 2:
            next(p for p in self.parameters() if p.grad is not None).grad.fill_(math.nan)

    monkeypatch.setattr(CausalLM, "on_after_backward", break_gradients)
    with pytest.raises(
        FloatingPointError, match=r"gradient of batch 2 with rows \d+, .* at step 2"
    ):
        short_run(tmp_path, "trainer.val_check_interval=100", "trainer.max_steps=5")
    kept = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    assert all(weight.isfinite().all() for weight in kept["state_dict"].values())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["train/skipped"]) == (2, 0)


EVEN = ("scheduler=constant", "model.dropout=0.2")


def test_a_run_made_longer_ends_as_one_that_was_long_from_the_start(tmp_path):
    """With dropout, whose draws the evaluation after the last step must not move."""
    short_run(tmp_path / "long", *EVEN, "trainer.max_steps=6")
    for steps in (3, 6):
        short_run(tmp_path / "twice", *EVEN, f"trainer.max_steps={steps}", "ckpt_path=auto")
    long, twice = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("long", "twice")
    )
    assert all(torch.equal(long[name], weight) for name, weight in twice.items())


def test_a_finished_run_is_left_as_it_is(tmp_path):
    summary = short_run(tmp_path, "trainer.max_steps=3")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert short_run(tmp_path, "trainer.max_steps=3", "ckpt_path=auto") == summary
    with pytest.raises(ValueError, match=r"was written with model.d_model"):
        short_run(tmp_path, "trainer.max_steps=6", "ckpt_path=auto", "model.d_model=32")
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_run_that_was_moved_knows_its_best(tmp_path):
    short_run(tmp_path / "a", "trainer.max_steps=6")
    last = tmp_path / "a/checkpoints/last.ckpt"
    saved = torch.load(last, weights_only=True)
    (key,) = (name for name in saved["callbacks"] if "'val/loss'" in name)
    saved["callbacks"][key]["best_model_score"] = torch.tensor(0.5)  # nothing here is as good
    torch.save(saved, last)
    (tmp_path / "a").rename(tmp_path / "b")
    best = tmp_path / "b/checkpoints/best.ckpt"
    before = best.read_bytes()
    summary = short_run(tmp_path / "b", "trainer.max_steps=9", "ckpt_path=auto")
    assert summary["steps"] == 9
    assert best.read_bytes() == before
    assert summary["checkpoint/best"] == "step 6: val/loss is lowest, 0.5000"


@pytest.mark.parametrize("reduction", ["token", "sequence", "padded"])
def test_two_ranks_train_what_one_does(tmp_path, reduction):
    """Three steps of 4 documents, on one rank and on two of 2: the same weights."""
    states = []
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    for name, extra in (("one", ["data.batch_size=4"]), ("two", ["data.batch_size=2", *ddp])):
        directory = tmp_path / name
        done = command(
            "train.py", *SHORT, "data.shuffle=false", "trainer.max_steps=3", *extra,
            "optimizer=sgd", "optimizer.lr=0.5", f"loss.reduction={reduction}",
            f"hydra.run.dir={directory}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        states.append(torch.load(directory / "checkpoints/last.ckpt", weights_only=True))
    one, two = (s["state_dict"] for s in states)
    for key, value in one.items():
        assert float((two[key] - value).norm()) <= 1e-6 * float(value.norm()) + 1e-7, key
    losses = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two")]
    assert losses[1]["train/loss"] == pytest.approx(losses[0]["train/loss"], rel=1e-6)
    assert losses[1]["val/loss"] == pytest.approx(losses[0]["val/loss"], rel=1e-6)


@pytest.mark.parametrize("reduction", ["token", "sequence", "padded"])
def test_however_documents_are_batched_the_weights_are_the_same(tmp_path, reduction):
    """Three steps of 4 documents, whole, one at a time, packed, and in another order of rows."""
    same = ("data.shuffle=false", "trainer.max_steps=3", "optimizer=sgd", "optimizer.lr=0.5",
            f"loss.reduction={reduction}", "loss.length=20")  # fmt: skip
    ways = {
        "whole": ["data.batch_size=4"],
        "parts": ["data.batch_size=1", "trainer.accumulate_grad_batches=4",
                  "trainer.val_check_interval=8"],
        "packed": ["data.batch_size=4", "data.layout=packed"],
        "left": ["data.batch_size=4", "data.padding_side=left"],
        "chunked": ["data.batch_size=4", "loss.chunk_tokens=5"],
    }  # fmt: skip
    states, summaries = {}, {}
    for name, extra in ways.items():
        summaries[name] = short_run(tmp_path / name, *same, *extra)
        path = tmp_path / name / "checkpoints/last.ckpt"
        states[name] = torch.load(path, weights_only=True)["state_dict"]
    for name in ways:
        for key, value in states["whole"].items():
            distance = float((states[name][key] - value).norm())
            assert distance <= 1e-6 * float(value.norm()) + 1e-7, (name, key)
        for figure in ("train/loss", "val/loss", "train/tokens"):
            assert summaries[name][figure] == pytest.approx(summaries["whole"][figure], rel=1e-6)
    assert summaries["packed"]["train/pad_share"] < summaries["whole"]["train/pad_share"]
    assert summaries["parts"]["train/pad_share"] == 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_low_precision_trains_and_is_audited(tmp_path, precision, reduction):
    summary = short_run(
        tmp_path, f"trainer.precision={precision}", f"loss.reduction={reduction}",
        "loss.chunk_tokens=16",
    )  # fmt: skip
    assert summary["status"] == "finished" and summary["preflight/faults"] == []
    assert summary["val/loss"] == pytest.approx(summary["val/loss_as_trained"], rel=0.05)


def test_bucketed_validates_the_same(tmp_path):
    losses = [
        short_run(tmp_path / name, "trainer.max_steps=1", "optimizer.lr=1e-12",
                  "data.source.val_documents=37", f"data.layout={name}", f"data.batch_size={size}")
        for name, size in (("padded", 4), ("bucketed", 5), ("packed", 7))
    ]  # fmt: skip
    for other in losses[1:]:
        assert other["val/loss"] == pytest.approx(losses[0]["val/loss"], rel=1e-9)


def test_accumulation_reports_its_own_loss(tmp_path):
    summary = short_run(tmp_path, "trainer.accumulate_grad_batches=2")
    assert summary["train/loss"] == pytest.approx(summary["val/loss"], rel=0.15)


def test_the_best_checkpoint_is_the_best(tmp_path):
    """Steps 3 and 6 are validated in the fit, the last weights after it: the best is the last."""
    short_run(tmp_path, "trainer.max_steps=8")
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 8


def test_auto_goes_on_where_there_is_something(tmp_path):
    assert short_run(tmp_path, "ckpt_path=auto")["steps"] == 6
    more = short_run(tmp_path, "ckpt_path=auto", "trainer.max_steps=8")
    assert more["steps"] == 8
    assert more["train/tokens"] < 8 * 4 * 19


KILLED = """
import os, sys
from pathlib import Path
from causal_lm.callbacks.sample_monitor import SampleMonitor
from support.runs import short_run
evaluate = SampleMonitor.evaluate
def at_four(self, module):
    return os._exit(9) if module.trainer.global_step == 4 else evaluate(self, module)
SampleMonitor.evaluate = at_four
short_run(Path(sys.argv[1]), "trainer.val_check_interval=2", "trainer.max_steps=8")
"""


def test_a_killed_run_goes_on_where_it_was_evaluated(tmp_path):
    """Killed while it evaluates step 4: it goes on from step 2, and nothing is lost or twice."""
    done = command("-c", KILLED, str(tmp_path), PYTHONPATH=os.pathsep.join(sys.path))
    assert done.returncode == 9, done.stderr
    assert torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2
    kept = tmp_path / "samples/step_00000002.txt"
    written = kept.stat().st_mtime_ns
    short_run(tmp_path, "trainer.val_check_interval=2", "trainer.max_steps=8", "ckpt_path=auto")
    assert kept.stat().st_mtime_ns == written
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows if row["train/loss"]] == list(range(8))
    assert [int(row["step"]) for row in rows if row["writing/distinct_1"]] == [1, 3, 5, 7]
    last = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert len(last["callbacks"]["SampleMonitor"]["rates"]) <= 3
    short_run(tmp_path, "trainer.max_steps=1")  # from the start: nothing of the old run is left
    assert not kept.exists()


def test_a_failing_rank_says_one_line(tmp_path):
    done = command(
        "train.py", *SHORT, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2",
        "pitfalls.pad_in_loss=true", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: preflight found pad") == 1
