"""A run that is killed at any moment and continued ends as one that was not."""

import contextlib
import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import lightning as L
import pytest
import torch

from causal_lm.data.datamodule import DataModule
from causal_lm.module import TRAINING_STATE
from support import ROOT, command, load_script
from support.resume import Uneven
from support.runs import short_run

crashtest = load_script("crashtest")
KILLED = ("packed", "workers", "muon", "dropout_packed", "ranks")


def write_run(
    folder: Path, weight: float = 1.0, epoch: int = 1, rows: str = "0,3.5,1\n1,3.25,2\n"
) -> Path:
    """The files of a run, as far as the comparison looks at them."""
    (folder / "checkpoints").mkdir(parents=True)
    checkpoint = {
        "state_dict": {"w": torch.tensor([weight, float("nan")])},
        "epoch": len(folder.name),  # Lightning's, which may differ
        "sampler": {"epoch": epoch},
        "causal_lm_config": {"seed": 0, "ckpt_path": folder.name},
    }
    torch.save(checkpoint, folder / "checkpoints" / "last.ckpt")
    (folder / "metrics.csv").write_text(f"step,train/loss,epoch\n{rows}")
    (folder / "config.yaml").write_text(f"seed: 0\nckpt_path: {folder.name}\n")
    (folder / "summary.json").write_text(json.dumps({"steps": 2, "seconds/fit": len(folder.name)}))
    return folder


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({}, ""),
        ({"weight": 1.0 + 2**-23}, "checkpoints/last.ckpt/state_dict/w"),
        ({"epoch": 2}, "checkpoints/last.ckpt/sampler/epoch"),
        ({"rows": "0,3.5,1\n1,3.25,2\n1,3.25,2\n"}, "metrics.csv"),
        ({"rows": "0,3.5,1\n"}, "metrics.csv"),
        ({"rows": "0,3.5,1\n1,3.250001,2\n"}, "metrics.csv/1/train/loss"),
        ({"rows": "0,3.5,1\n1,3.25,3\n"}, "metrics.csv/1/epoch"),
    ],
)
def test_the_comparison_finds(change, place, tmp_path):
    expected, found = write_run(tmp_path / "a"), write_run(tmp_path / "another", **change)
    differences = list(crashtest.compare(expected, found))
    assert [line.split()[0] for line in differences] == ([f"/{place}"] if place else [])


@pytest.mark.parametrize("name", ["checkpoints/.last.ckpt.part", ".metrics.csv.123", "core"])
def test_the_comparison_finds_what_a_kill_leaves(name, tmp_path):
    expected, found = write_run(tmp_path / "a"), write_run(tmp_path / "b")
    (found / name).touch()
    (line,) = crashtest.compare(expected, found)
    assert name in line
    (line,) = crashtest.compare(found, expected)
    assert name in line


class Killed(BaseException):
    """In place of a kill, between the last evaluation of the fit and the end of the run."""


def test_a_run_killed_after_its_last_step_ends_with_the_same_random_state(tmp_path, monkeypatch):
    """A run that is made longer then draws the same dropout."""

    def kill(*args, **kwargs):
        raise Killed

    options = ("model.dropout=0.2", "ckpt_path=auto", "samples.count=0", "preflight.on_fault=off")
    saved = []
    for name in ("whole", "killed"):
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            if name == "killed":
                patch.setattr(L.Trainer, "validate", kill)
            short_run(tmp_path / name, *options)
        saved.append(tmp_path / name / "checkpoints" / "last.ckpt")
    assert torch.load(saved[1], weights_only=True)["global_step"] == 6
    assert short_run(tmp_path / "killed", *options)["status"] == "finished"
    whole, killed = (torch.load(path, weights_only=True)[TRAINING_STATE] for path in saved)
    assert torch.equal(whole["random"]["cpu"], killed["random"]["cpu"])


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_draw_nothing_from_the_random_state_of_dropout(workers):
    data = DataModule(Uneven(), batch_size=4, max_length=12, num_workers=workers)
    data.setup()
    before = torch.get_rng_state()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert len(list(loader)) > 1
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.slow
def test_five_killed_runs_end_as_those_that_were_not(tmp_path):
    cases = [word for case in KILLED for word in ("--case", case)]
    done = command(
        "scripts/crashtest.py", "--kills", str(len(KILLED)), *cases,
        TMPDIR=str(tmp_path), OMP_NUM_THREADS="1", timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    *lines, count = done.stdout.splitlines()
    assert {line.split()[1].rstrip(":") for line in lines} == set(KILLED)
    assert count.split()[:3] == ["5", "of", "5"]
    # A killed process leaves the temporary folder of Python's multiprocessing.
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("pymp-")]


def run_in_fork(words, environment, *_):
    """What ckpt-chaos does to run a command, without a new process that loads torch again."""
    from ckpt_chaos.targets.common import arm_from_env

    out, into = os.pipe()
    if child := os.fork():
        os.close(into)
        with open(out, encoding="utf-8") as file:
            text = file.read()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), text
    code = 1
    try:
        sys.stdout = sys.stderr = open(into, "w", encoding="utf-8")  # noqa: SIM115
        os.environ |= environment
        arm_from_env(0, lazy=True)  # as in the process that it starts
        sys.argv = words[1:]
        runpy.run_path(words[1], run_name="__main__")
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


@pytest.mark.slow
def test_every_file_event_of_a_save(tmp_path, monkeypatch):
    """ckpt-chaos kills at each file event: before it, with the file torn, with all that is not
    flushed to the disk undone. Each time the newest complete checkpoint is continued."""
    byo = pytest.importorskip("ckpt_chaos.byo")
    from ckpt_chaos import cli, runner

    monkeypatch.setattr(byo, "_run", run_in_fork)
    loop = str(ROOT / "tests" / "support" / "checkpoint_loop.py")
    code = cli.main([
        "run", "--work", str(tmp_path / "work"), "--jobs", "1", "--max-points", "1000",
        "--modes", "before,torn,unsynced", "--checkpoint-glob", "{out}/step_*.ckpt",
        "--result-file", "{out}/last.ckpt", "--step-regex", r"resumed from step (\d+)",
        "--", sys.executable, loop, "{out}",
    ])  # fmt: skip
    assert code == 0
    control, *points = runner.rejudge(tmp_path / "work")
    assert control.verdict == "PASS"
    for point in points:
        assert (point.verdict, point.crashed, point.drift) == ("PASS", True, False), point
    names = [point.label for point in points]
    for name in ("last", "step_2"):
        for mode in ("before", "torn", "unsynced"):
            assert any(f"open:.{name}.ckpt.part" in n and f"[{mode}]" in n for n in names)
            if mode != "torn":
                assert any(f"os.rename:.{name}.ckpt.part" in n and f"[{mode}]" in n for n in names)
    assert len(names) >= 32
