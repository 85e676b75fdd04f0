"""A sweep that is stopped or killed, and started again; and one whose jobs have two ranks."""

import json
import os
import signal

import pytest
import torch
from omegaconf import OmegaConf

from causal_lm import fit
from causal_lm.config import ConfigError
from causal_lm.ledger import Ledger
from support import ROOT, command
from support.runs import SHORT
from support.sweeps import ENDS, figures, signal_at, trained_steps

PATH = os.pathsep.join(f"{ROOT}/{name}" for name in ("src", "preflight/src", "tests"))
EIGHT = [*SHORT, "preflight.on_fault=off", "samples.count=0", ENDS, "seed=range(8)"]
TWO_RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def sweep(folder, *words, **environment):
    words = ["train.py", "-m", *words, f"hydra.sweep.dir={folder}"]
    return command(*words, PYTHONPATH=PATH, **environment)


def table_of(done):
    """The rows of the table, without the seconds."""
    lines = done.stdout.rpartition("\nrun ")[2].splitlines()
    return [line.split()[:-1] for line in lines[2 : lines.index("")]]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    done = sweep(folder, *EIGHT)
    assert done.returncode == 0, done.stderr
    return folder, table_of(done)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_eight_jobs_ended_after_the_third_end_as_an_unbroken_sweep(number, tmp_path, unbroken):
    """In the fourth job after step 4, of which a kill leaves the checkpoint of step 3."""
    done = sweep(tmp_path, *EIGHT, **signal_at(number, seed=3, step=4))
    assert done.returncode == (-number if number == signal.SIGKILL else 128 + number), done.stderr
    names = [f"{n}_fix" for n in range(8)]
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == names[:4]
    if number == signal.SIGTERM:
        assert (figures(tmp_path / "3_fix")["status"], done.stderr.count("Traceback")) == (
            "stopped",
            0,
        )
        return
    before = [(tmp_path / name / "summary.json").stat().st_mtime_ns for name in names[:3]]
    done = sweep(tmp_path, *EIGHT)
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / n / "summary.json").stat().st_mtime_ns for n in names[:3]] == before
    assert done.stdout.count("nothing to do") == 3
    assert done.stdout.count("from step 3;") == 1  # the fourth
    folder, table = unbroken
    assert table_of(done) == table and len(table) == 8
    for name in names:
        assert trained_steps(tmp_path / name) == trained_steps(folder / name)
        assert figures(tmp_path / name) == figures(folder / name)
        a, b = (torch.load(f / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
                for f in (tmp_path, folder))  # fmt: skip
        assert all(torch.equal(a[key], b[key]) for key in b)


# ---- two ranks ----


def test_ranks_with_different_values_are_stopped(monkeypatch):
    def ranks_get(*every):
        def gather(ranks, own):
            ranks[:] = [{k: repr(v) for k, v in settings.items()} for settings in every]

        monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
        trainer = OmegaConf.create({"world_size": len(every)})
        fit._compare_ranks(every[-1], trainer, None, stage="fit")

    ranks_get({"a": 1}, {"a": 1})
    fit._compare_ranks({"a": 1}, OmegaConf.create({"world_size": 1}))
    for other, named in (({"a": 1, "b": 2}, "b=2"), ({"a": 1.0}, "a=1.0"), ({}, "a=None")):
        with pytest.raises(ConfigError, match=f"rank 2.* {named}"):
            ranks_get({"a": 1}, {"a": 1}, other)


@pytest.mark.slow
def test_two_ranks_with_different_values_both_exit(tmp_path):
    done = command(
        "train.py", *SHORT, *TWO_RANKS, "seed='${oc.decode:${oc.env:LOCAL_RANK,0}}'",
        f"hydra.run.dir={tmp_path}", timeout=100,
    )  # fmt: skip
    assert done.returncode == 2 and done.stderr.count("error:") == 1
    assert "seed=1" in done.stderr and "Traceback" not in done.stderr
    assert figures(tmp_path)["status"] == "failed" and not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_a_signal_to_a_sweep_stops_both_ranks_of_its_job(tmp_path):
    """The signal goes to the sweep alone, which gives it to the ranks. Each value is sampled once:
    the ranks, which compare theirs, have it from the sweep."""
    sampled = "optimizer.lr='${oc.decode:\"0.001${now:%f}\"}'"
    words = [
        *SHORT,
        *TWO_RANKS,
        ENDS,
        "trainer.max_steps=100000",
        "preflight.on_fault=off",
        sampled,
    ]
    end = signal_at(signal.SIGTERM, 2, 4, "parent")
    done = sweep(tmp_path, *words, "trainer.val_check_interval=1000", "seed=2,3", **end)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["0_fix"]
    summary = figures(tmp_path / "0_fix")
    assert (summary["status"], summary["stopped_because"]) == ("stopped", "signal SIGTERM")
    (run,) = Ledger(tmp_path / "ledger.sqlite").summaries()
    trained = OmegaConf.load(tmp_path / "0_fix/config.yaml")
    assert 0.001 <= trained.optimizer.lr == run["settings"]["optimizer"]["lr"] < 0.002
    assert json.loads(json.dumps(run["overrides"]))[-1] == "seed=2"
