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
from causal_lm.build import instantiate, restore
from causal_lm.generation import generate_text
from support import ROOT, command
from support.runs import SHORT, short_run

TORCHRUN = ["-m", "torch.distributed.run"]
STEPS = ["data.shuffle=false", "optimizer=sgd", "optimizer.lr=0.05", "scheduler=constant",
         "scheduler.warmup_steps=0", "preflight.on_fault=off",
         "gradients.report_every=null"]  # fmt: skip


def start(folder, command, *words, replaced=()):
    """The command of docs/scaling.md that begins so, as a short run on a CPU."""
    page = (ROOT / "docs/scaling.md").read_text("utf-8")
    (line,) = (line for line in page.splitlines() if line.startswith(command))
    for old in replaced:
        assert old in line
        line = line.replace(old, replaced[old])
    more = [*SHORT[1:], *STEPS, *words, "trainer.accelerator=cpu", f"paths.log_dir={folder}"]
    args, pipe = [*TORCHRUN, *line.split()[1:], *more], subprocess.PIPE
    return subprocess.Popen([sys.executable, *args], cwd=ROOT, stdout=pipe, stderr=pipe, text=True)


def check_run(folder, alone, *words, status="finished"):
    """One run below ``folder``, which is that of one process that reads the batches of both ranks,
    in the folder ``alone``; returns its summary and its directory."""
    (run,) = (folder / "fix").iterdir()
    assert {path.name for path in run.glob("*.log")} == {"train.log", "train_rank_1.log"}
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == status
    steps = f"trainer.max_steps={summary['steps']}"
    single = short_run(alone, *STEPS, "data.batch_size=8", *words, steps)
    kinds = ("train/tokens", "train/loss", "test/", "gradient/", "update/")
    for key, value in single.items():
        if key.startswith(kinds) and value is not None and key != "train/tokens_per_second":
            assert summary[key] == pytest.approx(value, rel=1e-5), key
    ours, theirs = (
        torch.load(path / "checkpoints/last.ckpt", weights_only=True) for path in (run, alone)
    )
    assert ours["global_step"] == theirs["global_step"] == summary["steps"]
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for key, value in theirs["state_dict"].items():
        error = float((ours["state_dict"][key] - value).norm())
        assert error <= 1e-5 * float(value.norm()) + 1e-7, key
    return summary, run


@pytest.mark.slow
def test_two_ranks_of_a_node_stop_at_a_signal_with_the_checkpoint_of_one_process(tmp_path):
    folder = tmp_path / "runs"
    endless = ["trainer.max_steps=100000", "trainer.val_check_interval=100000"]
    run = start(folder, "torchrun --standalone", *endless)
    for _ in range(1200):
        if list(folder.glob("fix/*/metrics.csv")) or run.poll() is not None:
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 1, err  # that of torchrun
    summary, _ = check_run(folder, tmp_path / "alone", status="stopped")
    assert "SIGTERM" in summary["stopped_because"]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["fsdp", "ddp"])
def test_two_machines(tmp_path, trainer):
    """Two torchruns on this one, of a rank each; with all that a run does besides training."""
    folder, more = tmp_path / "runs", ["preflight.on_fault=error"]
    words = ["model=llama", "model.d_model=16", "model.d_ff=16", "gradients.report_every=2",
             "test=true", "data.source.test_documents=8"]  # fmt: skip
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = {"HOST": "127.0.0.1", "PORT": str(probe.getsockname()[1])}
    address["trainer=fsdp"] = f"trainer={trainer}"
    nodes = [
        start(folder, "torchrun --nnodes=2", *words, *more, replaced=address | {"rank=0": rank})
        for rank in ("rank=0", "rank=1")
    ]
    ended = [node.communicate(timeout=300) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], ended
    assert [out.count("written to") for out, _ in ended] == [1, 0]
    summary, run = check_run(folder, tmp_path / "alone", *words)
    assert summary["steps"] == 6 and {"test/loss", "gradient/model.blocks.0"} <= summary.keys()
    assert summary["preflight/audited"] and summary["preflight/faults"] == []
    module, tokenizer, _ = restore(run / "checkpoints/last.ckpt")
    assert module.model.lm_head.weight is module.model.token_embedding.weight
    assert len(generate_text(module, tokenizer, "a", 8)) == 1


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


def test_the_page_counts_parameters_as_the_models_do():
    page = (ROOT / "docs/scaling.md").read_text("utf-8")
    cfg = config.load(["model=llama_124m"])
    with torch.device("meta"):
        models = [instantiate(cfg.model, vocab_size=size) for size in (50257, 50304)]
    parts = [*models, models[0].blocks[0], models[0].token_embedding]
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    assert [n for n in counts if f"{n:,}" not in page] == []
    # nanoGPT's, without biases and positions: table, and in each layer 12 width² and two norms
    assert f"{50304 * 768 + 12 * (12 * 768**2 + 2 * 768) + 768:,}" in page


def test_a_sweep_is_refused(monkeypatch):
    monkeypatch.setenv(cli.TORCHRUN, "True")
    sweep = OmegaConf.create({"hydra": {"overrides": {"hydra": [], "task": ["seed=1,2"]}}})
    with pytest.raises(cli._BypassHydraError) as failure:
        cli.ValidateConfig().on_multirun_start(sweep)
    assert isinstance(failure.value.__cause__, config.ConfigError)
