"""The command line: signals, sweeps, errors in one line."""

import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from causal_lm import cli
from causal_lm.report.sweep import SweepTable
from support import ROOT, command
from support.runs import SHORT, short_run


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
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
    assert "signal" in summary["stopped_because"]
    assert 0 < summary["steps"] < 100000
    more = short_run(
        tmp_path / "more",
        f"ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}",
        f"trainer.max_steps={summary['steps'] + 2}",
    )
    assert more["steps"] == summary["steps"] + 2


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
    assert "pitfalls.unshifted_labels" in (tmp_path / "1_bug" / "train.log").read_text()
    assert "Traceback" not in done.stderr


def test_a_job_of_a_sweep_gets_its_directory_whatever_its_name(tmp_path, monkeypatch):
    """The command of a job on two devices, as Hydra reads it."""
    directory, commands = tmp_path / "it's a [b]=é" / "0_fix", []

    def run(command, check, cwd):
        commands.append((command, cwd))
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(cli.subprocess, "run", run)
    job, overrides = SimpleNamespace(config_name="train"), SimpleNamespace(task=["seed=1"])
    runtime = SimpleNamespace(config_sources=[], cwd="/where/it/was/typed")
    directory.mkdir(parents=True)
    with pytest.raises(ValueError, match="exit code 1"):
        cli._run_in_subprocess(
            SimpleNamespace(job=job, overrides=overrides, runtime=runtime), directory
        )
    ((command, cwd),) = commands
    (override,) = OverridesParser.create().parse_overrides(command[-1:])
    assert (override.get_key_element(), override.value()) == ("hydra.run.dir", str(directory))
    assert cwd == runtime.cwd and command[-2] == "seed=1"


def test_a_sweep_with_a_job_that_wrote_no_summary_fails(tmp_path):
    (tmp_path / "0_fix").mkdir()
    with pytest.raises(SystemExit) as stop:
        SweepTable().on_multirun_end(OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}}))
    assert stop.value.code == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_said_in_one_line(tmp_path):
    done = command("train.py", "trainer=gpu", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: trainer.accelerator=gpu")
    assert "trainer=cpu" in done.stderr
    assert done.stderr.count("\n") == 1


OWN = """# @package _global_
experiment: own
callbacks: {mine: {_target_: support.outside.Figure, value: 3.0}}
logger: {mine: {_target_: lightning.pytorch.loggers.CSVLogger, save_dir: "${paths.logs}"}}
paths: {logs: "${hydra:runtime.output_dir}/logs"}
hydra: {sweeper: {params: {seed: "1,-1"}}}
"""


def test_a_configuration_directory_of_ones_own(tmp_path):
    """Groups, callbacks, loggers and interpolations, with no file of ours edited."""
    (tmp_path / "own" / "experiment").mkdir(parents=True)
    (tmp_path / "own" / "experiment" / "own.yaml").write_text(OWN)
    where = f"{ROOT}/src:{ROOT}/preflight/src:{ROOT}/tests"
    words = ["--config-dir", str(tmp_path / "own"), *SHORT, "experiment=own"]
    run = tmp_path / "run"
    done = command("train.py", *words, f"hydra.run.dir={run}", PYTHONPATH=where)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "summary.json").read_text())["own/figure"] == 3.0
    assert list((run / "logs").rglob("metrics.csv"))
    done = command("train.py", "-m", *words, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert done.returncode == 2  # the sweeper's own axis is validated too
    assert "seed" in done.stderr and not (tmp_path / "sweep").exists()
