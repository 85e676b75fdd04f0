"""Ranks that torchrun starts, on one node or two: one run, which is that of a single process."""

import json
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
from omegaconf import OmegaConf

from causal_lm import cli, config
from support import ROOT, command
from support.runs import SHORT, short_run

TORCHRUN = ["-m", "torch.distributed.run"]
STEPS = ["data.shuffle=false", "optimizer=sgd", "optimizer.lr=0.05", "scheduler=constant",
         "scheduler.warmup_steps=0", "preflight.on_fault=off", "gradients.report_every=null"]  # fmt: skip


def start(folder, *words, node):
    words = [*SHORT, *STEPS, *words, "trainer.accelerator=cpu", f"paths.log_dir={folder}"]
    command_line = [sys.executable, *TORCHRUN, *node, "train.py", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(command_line, cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_run(folder, alone, status="finished"):
    """One run below ``folder``, which is that of one process that reads the batches of both ranks,
    in the folder ``alone``; returns its summary."""
    (run,) = (folder / "fix").iterdir()
    assert {path.name for path in run.glob("*.log")} == {"train.log", "train_rank_1.log"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == status
    steps = f"trainer.max_steps={summary['steps']}"
    single = short_run(alone, *STEPS, "data.batch_size=8", "samples.count=0", steps)
    assert summary["train/tokens"] == single["train/tokens"]
    assert summary["train/loss"] == pytest.approx(single["train/loss"], rel=1e-6)
    ours, theirs = (
        torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (run, alone)
    )
    assert ours["global_step"] == theirs["global_step"] == summary["steps"]
    for key, value in theirs["state_dict"].items():
        error = float((ours["state_dict"][key] - value).norm())
        assert error <= 1e-5 * float(value.norm()) + 1e-7, key
    return summary


@pytest.mark.slow
def test_two_ranks_of_a_node_stop_at_a_signal_with_the_checkpoint_of_one_process(tmp_path):
    endless = ["trainer.max_steps=100000", "trainer.val_check_interval=100000"]
    run = start(
        tmp_path / "runs", "trainer=ddp", *endless, node=["--standalone", "--nproc-per-node=2"]
    )
    for _ in range(1200):
        if list(tmp_path.glob("runs/fix/*/metrics.csv")) or run.poll() is not None:
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=120)
    assert (
        "signal SIGTERM"
        in check_run(tmp_path / "runs", tmp_path / "alone", "stopped")["stopped_because"]
    ), err


@pytest.mark.slow
def test_two_nodes_that_shard_the_weights(tmp_path):
    """Two torchruns on this machine, of a rank each."""
    address = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1",
               f"--master-port={free_port()}"]  # fmt: skip
    nodes = [
        start(tmp_path / "runs", "trainer=fsdp", node=[*address, f"--node-rank={rank}"])
        for rank in (0, 1)
    ]
    ended = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ended
    assert [out.count("written to") for out, _ in ended] == [1, 0]
    assert check_run(tmp_path / "runs", tmp_path / "alone")["steps"] == 6


@pytest.mark.slow
def test_an_invalid_value_is_said_once_and_torchrun_fails(tmp_path):
    done = command(
        *TORCHRUN, "--standalone", "--nproc-per-node=2", "train.py", "trainer=ddp",
        "trainer.accelerator=cpu", "trainer.max_steps=none", f"hydra.run.dir={tmp_path}/run",
    )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr.count("error: trainer.max_steps must be") == 1
    assert not (tmp_path / "run").exists()


def test_the_number_of_ranks_is_that_of_torchrun(monkeypatch):
    for name in ("ddp", "fsdp"):
        alone = config.load([f"trainer={name}"]).trainer
        assert (alone.devices, alone.num_nodes) == ("auto", 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    for name in ("ddp", "fsdp"):
        trainer = config.load([f"trainer={name}"]).trainer
        assert (trainer.devices, trainer.num_nodes) == (2, 3)


def test_a_sweep_is_refused(monkeypatch):
    monkeypatch.setenv(cli.TORCHRUN, "True")
    sweep = OmegaConf.create({"hydra": {"overrides": {"hydra": [], "task": ["seed=1,2"]}}})
    with pytest.raises(cli._BypassHydraError) as failure:
        cli.ValidateConfig().on_multirun_start(sweep)
    assert isinstance(failure.value.__cause__, config.ConfigError)
