"""A sweep that is stopped or killed, and started again; and one whose jobs have two ranks."""

import os
import signal

import pytest
import torch
from omegaconf import OmegaConf

from causal_lm import fit
from causal_lm.checkpoint_file import read_checkpoint
from causal_lm.config import ConfigError
from causal_lm.ledger import Ledger
from support import ROOT, command
from support.runs import SHORT
from support.sweeps import ENDS, figures, signal_at, trained_steps

PATH = os.pathsep.join(f"{ROOT}/{name}" for name in ("src", "preflight/src", "tests"))
LITTLE = [*SHORT, ENDS, "preflight.on_fault=off", "samples.count=0", "gradients.report_every=null",
          "data.source.test_documents=0"]  # fmt: skip
TWO_RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def sweep(folder, *words, **environment):
    words = ["train.py", "-m", *words, f"hydra.sweep.dir={folder}"]
    return command(*words, PYTHONPATH=PATH, **environment)


def jobs_in(folder):
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def table_of(done):
    """The rows of the table, without the seconds."""
    lines = done.stdout.rpartition("\nrun ")[2].splitlines()
    return [line.split()[:-1] for line in lines[2 : lines.index("")]]


@pytest.mark.slow
def test_eight_jobs_killed_after_the_third_end_as_an_unbroken_sweep(tmp_path):
    """Killed in the fourth job after step 4, which leaves its checkpoint of step 3."""
    folder, names = tmp_path / "unbroken", [f"{n}_fix" for n in range(8)]
    unbroken = sweep(folder, *LITTLE, "seed=range(8)")
    assert unbroken.returncode == 0, unbroken.stderr
    broken = tmp_path / "broken"
    killed = signal_at(signal.SIGKILL, seed=3, step=4)
    assert sweep(broken, *LITTLE, "seed=range(8)", **killed).returncode == -signal.SIGKILL
    assert jobs_in(broken) == names[:4]
    before = [(broken / name / "summary.json").stat().st_mtime_ns for name in names[:3]]
    again = sweep(broken, *LITTLE, "seed=range(8)")
    assert again.returncode == 0, again.stderr
    assert [(broken / name / "summary.json").stat().st_mtime_ns for name in names[:3]] == before
    assert again.stdout.count("nothing to do") == 3
    assert again.stdout.count("from step 3;") == 1  # the fourth
    assert table_of(again) == table_of(unbroken) and len(table_of(again)) == 8
    for name in names:
        assert trained_steps(broken / name) == trained_steps(folder / name)
        assert figures(broken / name) == figures(folder / name)
        a, b = (torch.load(f / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
                for f in (broken, folder))  # fmt: skip
        assert all(torch.equal(a[key], b[key]) for key in b)


@pytest.mark.slow
def test_a_signal_saves_the_job_in_hand_and_begins_no_other(tmp_path):
    number = signal.SIGINT
    done = sweep(tmp_path, *LITTLE, "seed=1,2", **signal_at(number, seed=1, step=4))
    assert done.returncode == 128 + number and "Traceback" not in done.stderr
    assert jobs_in(tmp_path) == ["0_fix"]
    summary = figures(tmp_path / "0_fix")
    assert (summary["status"], summary["stopped_because"]) == ("stopped", f"signal {number.name}")
    assert read_checkpoint(tmp_path / "0_fix/checkpoints/last.ckpt")["global_step"] == 4


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
    sampled = "optimizer.lr='${oc.decode:0.001${now:%f}}'"
    words = [*LITTLE, *TWO_RANKS, "trainer.max_steps=100000", "trainer.val_check_interval=1000"]
    end = signal_at(signal.SIGTERM, 2, 4, "parent")
    done = sweep(tmp_path, *words, sampled, "seed=2,3", **end)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert jobs_in(tmp_path) == ["0_fix"]
    summary = figures(tmp_path / "0_fix")
    assert (summary["status"], summary["stopped_because"]) == ("stopped", "signal SIGTERM")
    (run,) = Ledger(tmp_path / "ledger.sqlite").summaries()
    trained = OmegaConf.load(tmp_path / "0_fix/config.yaml")
    assert 0.001 <= trained.optimizer.lr == run["settings"]["optimizer"]["lr"] < 0.002
    assert run["overrides"][-1] == "seed=2"
