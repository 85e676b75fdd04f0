"""A run is continued, made longer, moved, refused, or left as it is."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from causal_lm.checkpoint_file import read_checkpoint
from support import ROOT, command
from support.runs import SHORT, short_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    return directory, short_run(directory)


def test_going_on_from_a_finished_run(finished, tmp_path):
    directory, _ = finished
    path = directory / "checkpoints" / "last.ckpt"
    summary = short_run(tmp_path / "more", f"ckpt_path={path}", "trainer.max_steps=9")
    assert summary["steps"] == 9
    for steps in (5, 6):  # nothing left to do
        with pytest.raises(ValueError, match=rf"step 6.*trainer\.max_steps={steps}"):
            short_run(tmp_path / "same", f"ckpt_path={path}", f"trainer.max_steps={steps}")


def test_a_checkpoint_of_another_configuration_is_refused(finished, tmp_path):
    path = finished[0] / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=r"model\.d_model=16.* 32"):
        short_run(tmp_path / "a", f"ckpt_path={path}", "model.d_model=32")
    with pytest.raises(ValueError, match=r"tokenizer\.symbols=40.* 30"):
        short_run(tmp_path / "b", f"ckpt_path={path}", "data.source.symbols=30")
    with pytest.raises(ValueError, match=r"ckpt_path.*nowhere"):
        short_run(tmp_path / "c", "ckpt_path=nowhere")
    (tmp_path / "broken.ckpt").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"broken\.ckpt"):
        short_run(tmp_path / "d", f"ckpt_path={tmp_path / 'broken.ckpt'}")
    assert json.loads((tmp_path / "d" / "summary.json").read_text())["status"] == "failed"


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
    with pytest.raises(ValueError, match=r"model\.d_model"):
        short_run(tmp_path, "trainer.max_steps=6", "ckpt_path=auto", "model.d_model=32")
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_what_changed_is_said_and_the_optimizer_is_that_of_the_checkpoint(
    finished, tmp_path, caplog
):
    caplog.set_level("INFO")
    path = finished[0] / "checkpoints" / "last.ckpt"
    words = [f"ckpt_path={path}", "trainer.max_steps=8", "optimizer.lr=1e-7"]
    short_run(tmp_path / "more", *words)
    (line,) = [m for m in caplog.messages if str(path) in m and "step 6" in m]
    assert "trainer.max_steps 6 -> 8" in line.partition("kept")[0]
    assert "optimizer.lr" in line.partition("kept")[2] and "1e-07" not in line
    with pytest.raises(ValueError, match=r"optimizer\._target_"):
        short_run(tmp_path / "sgd", f"ckpt_path={path}", "optimizer=sgd")


def test_the_old_name_of_a_checkpoint_is_understood(finished, tmp_path):
    shutil.copytree(finished[0] / "checkpoints", tmp_path / "checkpoints")
    (tmp_path / "checkpoints" / "last.ckpt").rename(tmp_path / "checkpoints" / "stable.ckpt")
    old = tmp_path / "checkpoints" / "steady.ckpt"
    assert read_checkpoint(old)["global_step"] == 6
    more = short_run(tmp_path / "more", f"ckpt_path={old}", "trainer.max_steps=7")
    assert more["steps"] == 7


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
    assert re.fullmatch(r"step 6: .* 0\.5000", summary["checkpoint/best"])


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


def test_an_unwritable_run_directory_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = command("train.py", *SHORT, f"hydra.run.dir={tmp_path}/file/run")
    assert done.returncode == 1
    assert f"{tmp_path}/file" in done.stderr
    assert done.stderr.count("\n") == 1
