"""trainer=fsdp: weights that ranks divide among them train, save and resume as replicated ones."""

import json
import os
from itertools import product
from unittest import mock

import pytest
import torch

from causal_lm import config
from causal_lm.sharding import FullyShardedStrategy
from support import ROOT, command
from support.sharded_fits import fit

ON_CPU = ["trainer=fsdp", "trainer.accelerator=cpu"]


@pytest.fixture
def one_rank():
    """Lets a run of one rank start a process group in this process, and ends it."""
    with mock.patch.dict(os.environ):
        yield
        torch.distributed.destroy_process_group()


def test_one_rank_continues_a_replicated_fit_to_the_same_end(tmp_path, one_rank):
    fit(tmp_path / "whole.ckpt", "auto", devices=1)
    fit(tmp_path / "half.ckpt", "auto", devices=1, steps=2)
    start = tmp_path / "half.ckpt"
    fit(tmp_path / "more.ckpt", FullyShardedStrategy(), devices=1, start=start, chunk=4)
    whole, more = (torch.load(tmp_path / f"{n}.ckpt", weights_only=True) for n in ("whole", "more"))
    assert more["global_step"] == 4
    assert relative_distance(whole["state_dict"], more["state_dict"]) < 2e-6


@pytest.mark.parametrize(
    "words",
    [["trainer.strategy=fsdp"], ["trainer.strategy=fsdp_cpu_offload"], [*ON_CPU, "callbacks=ema"]],
)
def test_what_would_be_wrong_is_refused(words):
    with pytest.raises(config.ConfigError, match="trainer=fsdp"):
        config.load(words)


def relative_distance(a: dict, b: dict) -> float:
    """The largest one of these tensors, by key."""
    assert a.keys() == b.keys()
    tensors = [(x, b[key]) for key, x in a.items()]
    return max((float((x - y).norm() / x.norm()) for x, y in tensors), default=0.0)


@pytest.fixture(scope="module")
def fits(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fits")
    paths = os.pathsep.join([str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    done = command("tests/support/sharded_fits.py", str(folder), PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "path"),
    [*product(["adamw", "sgd", "muon"], ["fsdp", "2_fsdp_fsdp"]),
     ("adamw", "2_fsdp_ddp"), ("adamw", "2_ddp_fsdp")],
)  # fmt: skip
def test_two_ranks_that_shard_train_what_two_replicas_do(fits, optimizer, path):
    """In one go, and resumed at step 2 by either strategy from a checkpoint of either."""
    one, other = (
        torch.load(fits / f"{optimizer}_{name}.ckpt", weights_only=True) for name in ("ddp", path)
    )
    # Muon computes in bfloat16, whose sums depend on how a matrix is divided.
    most = 0.01 if optimizer == "muon" else 2e-6
    assert relative_distance(one["state_dict"], other["state_dict"]) < most
    mine, theirs = one["optimizer_states"][0], other["optimizer_states"][0]
    assert mine["param_groups"] == theirs["param_groups"]
    assert mine["state"].keys() == theirs["state"].keys()
    for number, values in mine["state"].items():
        assert relative_distance(values, theirs["state"][number]) < most
    assert bool(mine["state"]) == (optimizer != "sgd")
    figures = [torch.load(fits / f"{optimizer}_{name}.ckpt.figures") for name in ("ddp", path)]
    assert torch.equal(figures[0]["samples"], figures[1]["samples"])
    assert figures[0]["val"].keys() == figures[1]["val"].keys()
    for key, value in figures[0]["val"].items():
        assert float(figures[1]["val"][key]) == pytest.approx(
            float(value), rel=most, nan_ok=True
        ), key


@pytest.mark.slow
def test_a_rank_keeps_half_of_weights_and_optimizer_state(fits):
    """Numbers on rank zero: AdamW has two a weight; a fraction of a row cannot be given away."""
    for optimizer, each in (("adamw", 3), ("sgd", 1)):
        both, half = (
            torch.load(fits / f"{optimizer}_{name}.ckpt.figures")["kept"]
            for name in ("ddp", "fsdp")
        )
        weights = torch.load(fits / f"{optimizer}_ddp.ckpt", weights_only=True)["state_dict"]
        size = sum(w.numel() for name, w in weights.items() if "lm_head" not in name)  # it is tied
        assert both == pytest.approx(each * size, rel=0.01)
        assert half == pytest.approx(both / 2, rel=0.02)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_both_ranks_alike(fits):
    first, second = (json.loads((fits / f"failed_{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and "batch" in first and "step 1" in first
