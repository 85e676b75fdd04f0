"""Checkpoints besides evaluations: when they are due, and what a kill after one of them costs."""

import csv
import os
import sys
import time

import pytest
import torch

from causal_lm import config
from causal_lm.callbacks.checkpoint import StepCheckpoint
from causal_lm.callbacks.stop import StopAfterStep
from support import command
from support.resume import BUCKETED, PACKED, PADDED, STEPS, WORKERS, fit
from support.runs import short_run


class Kept(StepCheckpoint):
    """Keeps a file for each step, and the steps after which an evaluation followed."""

    def __init__(self, *args):
        super().__init__(*args)
        self.evaluated = set()

    def on_validation_end(self, trainer, *args):
        super().on_validation_end(trainer, *args)
        self.evaluated.add(trainer.global_step)

    def save(self, trainer):
        self.path = self.path.with_name(f"{trainer.global_step:02}.ckpt")
        super().save(trainer)


def saving(folder, every_n_steps):
    stop = StopAfterStep()
    stop.checkpoint = Kept(folder / "last.ckpt", None, every_n_steps)
    return [stop, stop.checkpoint]


@pytest.mark.parametrize(
    ("options", "every"), [(PADDED, 1), (BUCKETED, 2), (PACKED, 2), (WORKERS, 4)], ids=str
)
def test_a_run_goes_on_from_any_step_to_the_bit(tmp_path, options, every):
    """Also from the last step of an epoch, and from one before an evaluation."""
    whole, batches = fit(tmp_path, **options)
    stop, checkpoint = saving(tmp_path / "kept", 1)
    again, _ = fit(tmp_path, keep=[stop, checkpoint], **options)
    assert torch.equal(again, whole)  # saving has no effect on training
    kept = sorted((tmp_path / "kept").iterdir())
    assert len(kept) >= 6
    assert {int(p.stem) for p in kept} | checkpoint.evaluated >= set(range(1, STEPS))
    for path in kept[::every]:
        weights, after = fit(tmp_path, ckpt_path=path, keep=saving(tmp_path / "x", 100), **options)
        assert torch.load(path, weights_only=True)["global_step"] == int(path.stem)
        assert after == batches[len(batches) - len(after) :], path
        assert torch.equal(weights, whole), path


def test_when_one_is_due(tmp_path, monkeypatch):
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    checkpoint = StepCheckpoint(tmp_path / "last.ckpt", 2, 5)
    never = StepCheckpoint(tmp_path / "last.ckpt", None, None)
    for each in (checkpoint, never):
        each.step, each.time = 0, now
    assert [n for n in range(12) if checkpoint.is_due(n)] == [5, 10]
    now = 119.0
    assert not checkpoint.is_due(1)
    now = 120.0
    assert checkpoint.is_due(1) and not checkpoint.is_due(0)  # of step 0 there is nothing to save
    assert not any(map(never.is_due, range(12)))


@pytest.mark.parametrize(
    ("word", "key"),
    [("callbacks.checkpoint.every_minutes=0", "every_minutes"),
     ("callbacks.checkpoint.every_n_steps=0.5", "every_n_steps"),
     ("+callbacks.checkpoint.every_hours=1", "every_hours")],
)  # fmt: skip
def test_keys_are_checked(word, key):
    with pytest.raises(config.ConfigError, match=rf"callbacks\.checkpoint\.{key}"):
        config.load([word])


def test_other_callbacks_are_the_users_own():
    own = ("+callbacks.mine._target_=causal_lm.callbacks.progress.StepBar", "+callbacks.off=null")
    never = ("callbacks.checkpoint.every_minutes=null", "+callbacks.mine.x=1")
    assert config.load([*own, *never]).callbacks.mine.x == 1


def test_what_a_kill_can_cost_is_said(tmp_path, caplog):
    caplog.set_level("INFO")
    short_run(tmp_path, "trainer.max_steps=1")
    short_run(tmp_path, "trainer.max_steps=1", "callbacks.checkpoint.every_minutes=0.5",
              "callbacks.checkpoint.every_n_steps=7")  # fmt: skip
    default, both = (m for m in caplog.messages if m.startswith("a kill costs"))
    assert "10 minutes" in default and "steps" not in default
    assert "0.5 minutes" in both and "7 steps" in both


KILLED = """
import os, sys
from pathlib import Path
from causal_lm.callbacks.checkpoint import StepCheckpoint
from support.runs import short_run
save = StepCheckpoint.save
def then_die(self, trainer):
    save(self, trainer)
    if trainer.global_step == 4:
        os._exit(9)
StepCheckpoint.save = then_die
short_run(Path(sys.argv[1]), *sys.argv[2:])
"""


def logged(directory):
    """Loss and samples of each row of ``metrics.csv``, as text."""
    with (directory / "metrics.csv").open() as file:
        names = ("step", "train/loss", "val/loss", "writing/distinct_1")
        return [[row[name] for name in names] for row in csv.DictReader(file)]


@pytest.mark.slow
def test_a_kill_after_one_loses_nothing(tmp_path):
    words = ("callbacks.checkpoint.every_n_steps=2", "model.dropout=0.2", "trainer.max_steps=8")
    short_run(tmp_path / "whole", *words)
    done = command("-c", KILLED, str(tmp_path / "killed"), *words,
                   PYTHONPATH=os.pathsep.join(sys.path))  # fmt: skip
    assert done.returncode == 9, done.stderr
    assert [row[0] for row in logged(tmp_path / "killed") if row[1]] == ["0", "1", "2", "3"]
    short_run(tmp_path / "killed", *words, "ckpt_path=auto")
    whole, killed = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)
        for name in ("whole", "killed")
    )
    assert all(torch.equal(killed["state_dict"][k], w) for k, w in whole["state_dict"].items())
    assert logged(tmp_path / "killed") == logged(tmp_path / "whole")
