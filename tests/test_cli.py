"""The command line: signals, sweeps, errors in one line."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

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
