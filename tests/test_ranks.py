"""Two ranks train and measure what one does, and do not mix the jobs of a sweep."""

import json
import shutil

import pytest
import torch

from causal_lm import config
from causal_lm.build import instantiate
from causal_lm.report.files import MARKER
from support import command
from support.runs import SHORT


def test_two_ranks_measure_what_one_does(tmp_path):
    """The same weights on 13 documents, which two ranks do not share evenly."""
    one = tmp_path / "one"
    assert command("train.py", *SHORT, f"hydra.run.dir={one}").returncode == 0
    two = tmp_path / "two"
    shutil.copytree(one / "checkpoints", two / "checkpoints")  # as if stopped at its last step
    (two / MARKER).touch()
    done = command(
        "train.py", *SHORT, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2",
        "ckpt_path=auto", f"hydra.run.dir={two}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    a, b = (json.loads((d / "summary.json").read_text()) for d in (one, two))
    assert b["val/loss"] == pytest.approx(a["val/loss"], rel=1e-6)
    assert b["val/ppl"] == pytest.approx(a["val/ppl"], rel=1e-6)
    assert b["train/tokens"] == a["train/tokens"]


def test_two_ranks_train_and_a_sweep_of_them_does_not_mix(tmp_path):
    done = command(
        "train.py", "-m", *SHORT, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2",
        "trainer.max_steps=5", "seed=1,2", f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summaries = [json.loads((tmp_path / f"{i}_fix/summary.json").read_text()) for i in (0, 1)]
    assert [s["seed"] for s in summaries] == [1, 2]
    # 5 steps × 2 ranks × 4 documents is all 40 of them, each once

    data = instantiate(config.load(SHORT).data)
    data.setup()
    assert {s["train/tokens"] for s in summaries} == {int((data.corpus.train.lengths - 1).sum())}


@pytest.mark.parametrize("reduction", ["token", "sequence", "padded"])
def test_two_ranks_train_what_one_does(tmp_path, reduction):
    """Three steps of 4 documents, on one rank and on two of 2: the same weights."""
    states = []
    ddp = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    for name, extra in (("one", ["data.batch_size=4"]), ("two", ["data.batch_size=2", *ddp])):
        directory = tmp_path / name
        done = command(
            "train.py", *SHORT, "data.shuffle=false", "trainer.max_steps=3", *extra,
            "optimizer=sgd", "optimizer.lr=0.5", f"loss.reduction={reduction}",
            f"hydra.run.dir={directory}",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        states.append(torch.load(directory / "checkpoints/last.ckpt", weights_only=True))
    one, two = (s["state_dict"] for s in states)
    for key, value in one.items():
        assert float((two[key] - value).norm()) <= 1e-6 * float(value.norm()) + 1e-7, key
    losses = [json.loads((tmp_path / n / "summary.json").read_text()) for n in ("one", "two")]
    assert losses[1]["train/loss"] == pytest.approx(losses[0]["train/loss"], rel=1e-6)
    assert losses[1]["val/loss"] == pytest.approx(losses[0]["val/loss"], rel=1e-6)


def test_a_failing_rank_says_one_line(tmp_path):
    done = command(
        "train.py", *SHORT, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2",
        "pitfalls.pad_in_loss=true", f"hydra.run.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: preflight found pad") == 1
