"""Signals at any moment of a run, and what is left of it."""

import contextlib
import csv
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment

from causal_lm.callbacks import stop
from causal_lm.callbacks.preflight import Preflight
from causal_lm.callbacks.sample_monitor import SampleMonitor
from causal_lm.data.datamodule import DataModule
from causal_lm.module import CausalLM
from causal_lm.report.files import MARKER
from causal_lm.signals import StoppedRun, leave_to_parent, requeue
from support import ROOT
from support.runs import SHORT, short_run

DROPOUT = ("model.dropout=0.2", "scheduler=constant")


def raise_before(monkeypatch, owner, method, when, number=signal.SIGTERM):
    """Raise a signal in front of the first call of ``method`` for which ``when(self)`` is true."""
    called, sent = getattr(owner, method), []

    def with_signal(self, *args, **kwargs):
        if not sent and when(self):
            sent.append(number)
            signal.raise_signal(number)
        return called(self, *args, **kwargs)

    monkeypatch.setattr(owner, method, with_signal)
    return sent


def at_step(step, fn="fit"):
    return lambda self: self.trainer.global_step == step and self.trainer.state.fn == fn


def logged(directory):
    with (directory / "metrics.csv").open() as file:
        names = ("step", "train/loss", "val/loss", "writing/distinct_1")
        return [[row[name] for name in names] for row in csv.DictReader(file)]


def saved(directory):
    return torch.load(directory / "checkpoints/last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    short_run(directory, *DROPOUT)
    return directory


MOMENTS = {  # what calls a method -> steps that the checkpoint has
    "a step": (CausalLM, "training_step", at_step(3), 4),
    "the last step": (CausalLM, "training_step", at_step(5), 6),
    "an evaluation": (CausalLM, "validation_step", at_step(3), 3),
    "its second batch": (CausalLM, "token_nll", lambda self: self.trainer.global_step == 3, 3),
    "the final validation": (CausalLM, "validation_step", at_step(6, "validate"), 6),
}


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(moment, marks=pytest.mark.slow) if "batch" in moment else moment
        for moment in MOMENTS
    ],
)
def test_the_fit_stops_and_goes_on_to_the_bit(moment, tmp_path, whole, monkeypatch, capfd):
    owner, method, when, steps = MOMENTS[moment]
    with monkeypatch.context() as patch:
        sent = raise_before(patch, owner, method, when)
        summary = short_run(tmp_path, *DROPOUT)
    assert sent and summary["steps"] == steps
    assert (summary["status"], summary["stopped_because"]) == ("stopped", "signal SIGTERM")
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert saved(tmp_path)["global_step"] == steps
    err = capfd.readouterr().err
    assert [line.startswith("SIGTERM") for line in err.splitlines() if "SIGTERM" in line] == [True]
    more = short_run(tmp_path, *DROPOUT, "ckpt_path=auto")
    assert (more["status"], more["steps"]) == ("finished", 6)
    state = saved(tmp_path)["state_dict"]
    assert all(torch.equal(state[k], w) for k, w in saved(whole)["state_dict"].items())
    rows = [row for row in logged(tmp_path) if steps < 6 or row[1]]  # not repeated: step 6's
    assert rows == [row for row in logged(whole) if steps < 6 or row[1]]


def test_sampling_stops_before_its_next_token(tmp_path, whole, monkeypatch):
    """The samples of an evaluation in the fit; the continued run repeats the evaluation."""
    calls, forward = [], CausalLM.forward
    with monkeypatch.context() as patch:
        sent = raise_before(patch, SampleMonitor, "evaluate", lambda self: True)
        patch.setattr(CausalLM, "forward", lambda self, *a: calls.append(1) or forward(self, *a))
        summary = short_run(tmp_path, *DROPOUT)
    assert sent and summary["steps"] == saved(tmp_path)["global_step"] == 3
    assert len(calls) == 4  # the 13 documents of the validation in batches of 4, and no sample
    short_run(tmp_path, *DROPOUT, "ckpt_path=auto")
    assert logged(tmp_path) == logged(whole)
    before, after = (saved(d)["callbacks"]["SampleMonitor"] for d in (whole, tmp_path))
    assert repr(before) == repr(after)  # NaN differs from itself


@pytest.mark.parametrize("number", stop.STOP_SIGNALS)
@pytest.mark.parametrize(
    ("owner", "method", "left"),
    [(DataModule, "load", set()), (Preflight, "audit", {"config.yaml", "summary.json"})],
)
def test_before_the_first_step_it_ends_at_once(owner, method, left, number, tmp_path, monkeypatch):
    sent = raise_before(monkeypatch, owner, method, lambda self: True, number)
    with pytest.raises(StoppedRun) as stopped:
        short_run(tmp_path)
    assert sent and stopped.value.code == 128 + number
    assert {path.name for path in tmp_path.iterdir()} == left | {MARKER}
    if left:
        summary = json.loads((tmp_path / "summary.json").read_text())
        assert (summary["status"], summary["steps"]) == ("stopped", 0)
        assert summary["stopped_because"] == f"signal {signal.Signals(number).name}"


def test_at_the_final_samples_the_checkpoints_are_written(tmp_path, monkeypatch):
    from causal_lm import fit

    monkeypatch.setattr(fit, "final_samples", lambda *a, **k: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(StoppedRun):
        short_run(tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["status"] == "stopped"
    assert saved(tmp_path)["global_step"] == 6
    monkeypatch.undo()
    assert short_run(tmp_path, "ckpt_path=auto")["status"] == "finished"


def test_a_second_interrupt_raises():
    before = signal.getsignal(signal.SIGINT)
    with stop.StopAfterStep() as callback:
        callback.at_once = False
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_time_limit_is_no_end(tmp_path):
    words = ("trainer.max_time='00:00:00:01'", "trainer.max_steps=100000")
    for again in ((), ("ckpt_path=auto",)):
        summary = short_run(tmp_path, *words, "trainer.val_check_interval=100000", *again)
        assert summary["status"] == "stopped"
        assert "trainer.max_time" in summary["stopped_because"]
        assert summary["val/loss"] is not None and 0 < summary["steps"] < 100000
    assert short_run(tmp_path / "b", "trainer.max_time='00:01:00:00'")["status"] == "finished"


def test_only_its_parent_ends_a_worker():
    """SIGTERM of another process, as a process group gets it, is ignored."""
    worker = multiprocessing.Process(target=_await_signals)
    worker.start()
    time.sleep(0.3)
    for name in ("INT", "TERM", "USR1"):
        subprocess.run(["kill", f"-{name}", str(worker.pid)], check=True)
    worker.join(0.5)
    assert worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def _await_signals():
    leave_to_parent()
    time.sleep(60)


# ---- SLURM ----


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A ``scontrol`` that records its arguments, and fails where the file ``broken`` exists."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "scontrol").write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ntest ! -e {tmp_path}/broken\n'
    )
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    (tmp_path / "calls").touch()
    return lambda: (tmp_path / "calls").read_text().splitlines()


ARRAY = {"SLURM_JOB_ID": "78", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.mark.parametrize(
    ("environment", "calls"),
    [({}, []), ({"SLURM_JOB_ID": "78"}, ["requeue 78"]), (ARRAY, ["requeue 77_3"])],
)
def test_the_job_or_the_task_of_an_array_is_requeued(environment, calls, scontrol, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    requeue()
    assert scontrol() == calls


@pytest.mark.parametrize("fault", ["broken", "missing"])
def test_a_job_that_cannot_be_requeued_is_named(fault, scontrol, tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    (tmp_path / "broken").touch()
    if fault == "missing":
        monkeypatch.setenv("PATH", str(tmp_path))
    requeue()
    (message,) = caplog.messages
    assert "78" in message and "failed" in message


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_lightning_does_not_requeue_too(number, scontrol, tmp_path, monkeypatch):
    """Where Lightning finds SLURM, its own handlers would save and requeue at once."""
    environment = {"SLURM_JOB_ID": "78", "SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train",
                   "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert SLURMEnvironment.detect()
    raise_before(monkeypatch, CausalLM, "training_step", at_step(3), number)
    summary = short_run(tmp_path / "run")
    assert (summary["status"], summary["steps"]) == ("stopped", 4)
    assert scontrol() == (["requeue 78"] if number == signal.SIGUSR1 else [])
    assert not list(tmp_path.rglob("hpc_ckpt*"))


# ---- a whole process group ----


def alive(group):
    """Whether a process of a group has not ended; zombies have."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            state, _, process_group = path.read_text().rpartition(")")[2].split()[:3]
            if int(process_group) == group and state != "Z":
                return True
    return False


def signal_group(directory, number, *words, when="metrics.csv", lines=1):
    """Send a signal to a run and all its processes, once a file of the run has so many lines.

    Returns the exit code and what was written to stderr.
    """
    process = subprocess.Popen(
        [sys.executable, "train.py", *SHORT, "trainer.max_steps=100000", "data.num_workers=2",
         "trainer.val_check_interval=100000", f"hydra.run.dir={directory}", *words],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    path, deadline = directory / when, time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_text().count("\n") >= lines:
            break
        time.sleep(0.1)
    os.killpg(process.pid, number)
    _, err = process.communicate(timeout=120)
    for _ in range(300):  # the other rank ends a moment later, and no process is left
        if not alive(process.pid):
            break
        time.sleep(0.1)
    assert not alive(process.pid)
    return process.returncode, err


TWO_RANKS = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2")


def assert_stopped(directory, code, err, number):
    assert code == 0, err
    assert "Traceback" not in err and "DataLoader worker" not in err
    summary = json.loads((directory / "summary.json").read_text())
    assert summary["status"] == "stopped"
    assert signal.Signals(number).name in summary["stopped_because"]
    assert 0 < summary["steps"] == saved(directory)["global_step"] < 100000
    return summary["steps"]


@pytest.mark.slow
def test_a_job_of_slurm_with_workers_goes_on_in_its_directory(scontrol, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    directory = tmp_path / "run"
    code, err = signal_group(directory, signal.SIGUSR1)
    steps = assert_stopped(directory, code, err, signal.SIGUSR1)
    assert scontrol() == ["requeue 78"]
    more = short_run(directory, "ckpt_path=auto", f"trainer.max_steps={steps + 2}")
    assert (more["status"], more["steps"]) == ("finished", steps + 2)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT,))],
)
def test_two_ranks_with_workers_stop_at_the_same_step(number, tmp_path):
    assert_stopped(tmp_path, *signal_group(tmp_path, number, *TWO_RANKS), number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_rank_with_workers_stops(number, tmp_path):
    assert_stopped(tmp_path, *signal_group(tmp_path, number), number)


@pytest.mark.slow
def test_two_ranks_stop_in_a_long_evaluation(tmp_path):
    words = ("trainer.val_check_interval=2", "data.source.val_documents=40000", "samples.count=0")
    code, err = signal_group(tmp_path, signal.SIGTERM, *TWO_RANKS, *words, lines=3)
    assert assert_stopped(tmp_path, code, err, signal.SIGTERM) == 2
    assert not list((tmp_path / "checkpoints").glob("best.ckpt"))  # no evaluation was complete


@pytest.mark.slow
def test_two_ranks_end_before_the_first_step(tmp_path):
    """At any moment from the preparation of the directory on: no checkpoint, no process left.

    Lightning kills the first rank if it still waits for the other one when that ends.
    """
    code, err = signal_group(tmp_path, signal.SIGTERM, *TWO_RANKS, when="config.yaml")
    assert code in (143, -signal.SIGKILL) and "Traceback" not in err
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_two_ranks_requeue_once(scontrol, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    run = tmp_path / "run"
    assert_stopped(run, *signal_group(run, signal.SIGUSR1, *TWO_RANKS), signal.SIGUSR1)
    assert scontrol() == ["requeue 78"]


TOKENIZES = """
import itertools, sys
from causal_lm import cli
from causal_lm.data.tokenize_corpus import Chunk, tokenize_chunks
from causal_lm.data.tokenizers import ByteTokenizer

def endless():
    chunk = Chunk([("text " * 1000,)] * 100, False, (0.0, 0.0), None)
    chunks = itertools.repeat(chunk)
    for n, _ in enumerate(tokenize_chunks(chunks, ByteTokenizer().state(), 2)):
        if n == 2:
            print("running", flush=True)

cli.start(endless)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_tokenizing_in_processes_ends_at_once(number):
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", TOKENIZES], env=os.environ | {"PYTHONPATH": path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "running\n"
    os.killpg(process.pid, number)
    started = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert err.count("\n") <= 2 and signal.Signals(number).name in err
    assert time.monotonic() - started < 20
