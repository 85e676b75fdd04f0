"""A run is continued, made longer, moved, refused, or left as it is."""

import csv
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from causal_lm.checkpoint_file import RefusedError
from causal_lm.config import ConfigError
from causal_lm.ledger import outcome
from causal_lm.report.files import MARKER
from causal_lm.run_dir import RunDir
from support import ROOT, command
from support.runs import FILES, SHORT, short_run


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


@pytest.mark.slow
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


def contents(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def a_users_folder(path):
    """A folder with files of a user's own, whose names are those that a run writes."""
    (path / "samples").mkdir(parents=True)
    for name in [*sorted(FILES), "samples/step_00000001.txt", "train.log"]:
        (path / name).write_text("mine")
    return contents(path)


def test_a_folder_that_is_no_run_is_refused_and_left_as_it_is(tmp_path):
    before = a_users_folder(tmp_path)
    done = command(str(ROOT / "train.py"), *SHORT, "hydra.run.dir=.", cwd=tmp_path)
    assert done.returncode == 2
    assert str(tmp_path) in done.stderr and done.stderr.count("\n") == 1
    assert contents(tmp_path) == before
    done = command(str(ROOT / "train.py"), *SHORT, "hydra.run.dir=''", cwd=tmp_path)
    assert done.returncode == 2
    assert "hydra.run.dir" in done.stderr and done.stderr.count("\n") == 1
    assert contents(tmp_path) == before


def test_the_folder_of_a_job_may_have_the_files_of_hydra_and_no_others(tmp_path):
    (tmp_path / "job" / ".hydra").mkdir(parents=True)
    (tmp_path / "job" / "train.log").touch()
    with RunDir(tmp_path / "job"):
        assert (tmp_path / "job" / MARKER).exists()
    before = a_users_folder(tmp_path / "users")
    with pytest.raises(ConfigError, match="config\\.yaml"), RunDir(tmp_path / "users"):
        pass
    assert contents(tmp_path / "users") == before


def test_the_second_of_two_runs_in_one_directory_is_refused(tmp_path, monkeypatch):
    with RunDir(tmp_path):
        with pytest.raises(RefusedError, match=str(tmp_path)):
            short_run(tmp_path)
        assert os.listdir(tmp_path) == [MARKER]
        monkeypatch.setenv("LOCAL_RANK", "1")  # another rank of the same run
        with RunDir(tmp_path):
            pass
    monkeypatch.delenv("LOCAL_RANK")
    with RunDir(tmp_path):
        pass


HOLDS = """
import os, sys, time
from pathlib import Path
from causal_lm.ledger import outcome
from causal_lm.run_dir import RunDir
with RunDir(Path(sys.argv[1])):
    if os.fork() == 0:  # as a worker of a data loader
        time.sleep(5)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_killed_run_holds_no_lock_even_if_its_workers_live_on(tmp_path):
    words = [sys.executable, "-c", HOLDS, str(tmp_path)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(RefusedError), RunDir(tmp_path):
            pass
        process.kill()
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        with RunDir(tmp_path):
            pass


def test_what_a_killed_run_left_is_deleted_and_what_is_not_ours_stays(tmp_path):
    short_run(tmp_path, "trainer.max_steps=1")
    samples = tmp_path / "samples"
    left = [tmp_path / ".metrics.csv.123", tmp_path / ".config.yaml.45",
            samples / ".step_00000002.txt.6"]  # fmt: skip
    strangers = [tmp_path / ".config.yaml.swp", samples / "step_x.txt", samples / "step_1.txt.bak",
                 samples / "notes.txt"]  # fmt: skip
    for path in (*left, *strangers):
        path.write_text("x")
    (samples / "step_9.txt").mkdir()
    short_run(tmp_path, "samples.keep_last=2", "trainer.val_check_interval=1")
    assert not any(path.exists() for path in left)
    assert all(path.read_text() == "x" for path in strangers)
    numbers = sorted(path.name for path in samples.glob("step_????????.txt"))
    assert numbers == ["step_00000005.txt", "step_00000006.txt"]


@pytest.mark.parametrize("content", [b"", b'{"status": "fini', b"\xff\x00\x89", b"[1]", b"{}"])
def test_a_damaged_summary_is_named_wherever_it_is_read(tmp_path, content):
    (tmp_path / "0_fix").mkdir()
    path = tmp_path / "0_fix" / "summary.json"
    path.write_bytes(content)
    assert (
        RunDir(path.parent).finished_summary(OmegaConf.create({"trainer": {"max_steps": 6}}))
        is None
    )
    with pytest.raises(ValueError, match=str(path)):
        outcome(path.parent)
    if content == b"{}":
        done = command("scripts/compare.py", str(tmp_path))
        assert done.returncode == 1
        assert str(path) in done.stderr and done.stderr.count("\n") == 1
