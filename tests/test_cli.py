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
from causal_lm.signals import StoppedRun
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
    """In a directory with a space, a quote and a letter beyond ASCII."""
    folder = tmp_path / "a b'é"
    quoted = str(folder).replace("'", "\\'")
    done = command(
        "train.py", "-m", *SHORT, "experiment=fix,bug", "preflight.on_fault=error",
        f"hydra.sweep.dir='{quoted}'",
    )  # fmt: skip
    assert done.returncode == 1
    head, _, *rows = done.stdout.rpartition("\nrun  ")[2].splitlines()[:4]
    assert head.split()[0] == "experiment"
    assert [row.split()[:2] for row in rows] == [["0_fix", "fix"], ["1_bug", "bug"]]
    assert "clean" in rows[0] and "failed" in rows[1]
    assert "Traceback" not in done.stdout + done.stderr
    logs = [(folder / name / "train.log").read_text() for name in ("0_fix", "1_bug")]
    assert [text.count("Traceback") for text in logs] == [0, 1]
    assert "pitfalls.unshifted_labels" in logs[1]


def test_the_command_of_a_job_has_its_directory_and_its_sampled_values(tmp_path, monkeypatch):
    """As Hydra reads it."""
    directory = tmp_path / "it's a [b]=é" / "0_fix"
    runtime = SimpleNamespace(config_sources=[], cwd="/where/it/was/typed")
    hydra_cfg = SimpleNamespace(
        job=SimpleNamespace(config_name="train"), runtime=runtime,
        overrides=OmegaConf.create({"task": ["seed=1", "data.name='${y}'"]}),
    )  # fmt: skip
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: hydra_cfg)
    raw = {"seed": 1, "ckpt_path": None, "optimizer": {"lr": "${random:}", "fused": "${x}"},
           "data": {"name": "${y}", "path": "${z}"}}  # fmt: skip
    config = {"seed": 1, "ckpt_path": None, "optimizer": {"lr": 1.5e-05, "fused": True},
              "data": {"name": "it's \\", "path": None}}  # fmt: skip
    command = cli._command(raw, config, directory)
    overrides = OverridesParser.create().parse_overrides(command[command.index("seed=1") :])
    assert {override.get_key_element(): override.value() for override in overrides} == {
        "seed": 1, "ckpt_path": None, "optimizer.lr": 1.5e-05, "optimizer.fused": True,
        "data.name": "it's \\", "data.path": None, "hydra.run.dir": str(directory),
    }  # fmt: skip


def test_a_command_gets_signals_once_and_its_failure_is_raised(tmp_path, monkeypatch):
    runtime = SimpleNamespace(cwd=tmp_path)
    monkeypatch.setattr(cli.HydraConfig, "get", lambda: SimpleNamespace(runtime=runtime))
    with pytest.raises(ValueError, match="exit code 3"):
        cli._run_command([sys.executable, "-c", "raise SystemExit(3)"], tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    ends_parent = """
import os, signal, time
def got(*_):
    with open("got", "a") as file:
        file.write("once")
    time.sleep(0.3)
    os._exit(0)
signal.signal(signal.SIGTERM, got)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
    with pytest.raises(StoppedRun) as stop:
        cli._run_command([sys.executable, "-c", ends_parent], tmp_path)
    assert stop.value.code == 128 + signal.SIGTERM
    assert (tmp_path / "got").read_text() == "once"
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_no_gpu_is_said_in_one_line(tmp_path):
    done = command("train.py", "trainer=gpu", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: trainer.accelerator=gpu")
    assert "trainer=cpu" in done.stderr
    assert done.stderr.count("\n") == 1


ADVICE = (
    "💡",
    "Tip:",
    "litlogger",
    "GPU available",
    "num_workers",
    "Trainer.fit",
    "checkpoint dir",
)
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
    written = done.stdout + done.stderr + (run / "train.log").read_text()
    assert "preflight" in written and [word for word in ADVICE if word in written] == []
    done = command("train.py", "-m", *words, f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert done.returncode == 2  # the sweeper's own axis is validated too
    assert "seed" in done.stderr and not (tmp_path / "sweep").exists()
