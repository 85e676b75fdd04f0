"""Two ranks train and measure what one does, and do not mix the jobs of a sweep."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from causal_lm import config
from causal_lm.build import instantiate
from causal_lm.checkpoint_file import read_checkpoint
from causal_lm.objective import REDUCTIONS
from causal_lm.report.files import MARKER
from support import command
from support.runs import SHORT


def test_two_ranks_measure_what_one_does(tmp_path):
    """The same weights on 13 documents, which two ranks do not share evenly."""
    one = tmp_path / "one"
    assert command("train.py", *SHORT, f"hydra.run.dir={one}").returncode == 0
    two = tmp_path / "two"
    shutil.copytree(one / "checkpoints", two / "checkpoints")  # as if stopped at its last step
    (two / MARKER).touch()
    done = command(
        "train.py", *SHORT, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2",
        "ckpt_path=auto", f"hydra.run.dir={two}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    a, b = (json.loads((d / "summary.json").read_text()) for d in (one, two))
    assert b["val/loss"] == pytest.approx(a["val/loss"], rel=1e-6)
    assert b["val/ppl"] == pytest.approx(a["val/ppl"], rel=1e-6)
    assert b["train/tokens"] == a["train/tokens"]


@pytest.mark.slow
def test_two_ranks_train_and_a_sweep_of_them_does_not_mix(tmp_path):
    done = command(
        "train.py", "-m", *SHORT, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2",
        "trainer.max_steps=5", "seed=shuffle(1,2)", f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summaries = [json.loads((tmp_path / f"{i}_fix/summary.json").read_text()) for i in (0, 1)]
    assert sorted(s["seed"] for s in summaries) == [1, 2]
    # 5 steps × 2 ranks × 4 documents is all 40 of them, each once

    data = instantiate(config.load(SHORT).data)
    data.setup()
    assert {s["train/tokens"] for s in summaries} == {int((data.corpus.train.lengths - 1).sum())}


@pytest.mark.slow
@pytest.mark.parametrize("reduction", REDUCTIONS)
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


def test_a_failing_rank_says_one_line(tmp_path):
    done = command(
        "train.py", *SHORT, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2",
        "pitfalls.pad_in_loss=true", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: preflight found pad") == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the ranks in /proc")
@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_rank_that_is_killed_ends_the_other(rank, tmp_path):
    """By SIGKILL, in the middle of training; without a checkpoint being lost."""
    command_line = [
        sys.executable, "train.py", *SHORT, "trainer=ddp", "trainer.accelerator=cpu",
        "trainer.devices=2", "trainer.max_steps=100000", "callbacks.checkpoint.every_n_steps=5",
        "trainer.val_check_interval=100000", f"hydra.run.dir={tmp_path}",
    ]  # fmt: skip
    first = subprocess.Popen(command_line, stderr=subprocess.PIPE, start_new_session=True)
    checkpoint = tmp_path / "checkpoints" / "last.ckpt"
    _wait(checkpoint.exists, 120)
    ranks = {"0": first.pid, "1": _second_rank(first.pid)}
    os.kill(ranks[rank], signal.SIGKILL)
    first.communicate(timeout=60)
    assert first.returncode != 0
    _wait(lambda: not Path(f"/proc/{ranks['1']}").exists(), 60)
    assert read_checkpoint(checkpoint)["global_step"] % 5 == 0


def _wait(condition, seconds):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(0.1)


def _second_rank(first):
    """Process number of the other rank, which the first one has started."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            is_rank = b"LOCAL_RANK=1" in (process / "environ").read_bytes()
        except OSError:  # it has ended
            continue
        if parent == first and is_rank:
            return int(process.name)
    raise AssertionError("there is no second rank")
