"""A run whose writing is scripted: when it stops, why, and which weights it keeps."""

import pytest
import torch

from causal_lm.callbacks.writing import Writing
from test_run import short_run

REPETITION = [0.50, 0.10, 0.20, 0.20, 0.21, 0.50, 0.40, 0.60, 0.70]
CONSISTENCY = [0.90, 0.90, 0.80, 0.70, 0.95, 0.70, 0.80, 0.60, 0.50]
"""Of the evaluations after steps 1 to 9. Both are worse than after step 2 at steps 3
and 4, and than after step 5 from step 6 on, though step 7 is better than step 6."""
EACH = ["trainer.val_check_interval=1", "trainer.max_steps=9"]


@pytest.fixture(autouse=True)
def _script(monkeypatch):
    def evaluate(self, module):
        n = module.trainer.global_step - 1
        return {"repetition_4": REPETITION[n], "consistency_hidden": CONSISTENCY[n]}, ""

    monkeypatch.setattr(Writing, "evaluate", evaluate)


def steady_step(directory):
    return torch.load(directory / "checkpoints/steady.ckpt", weights_only=True)["global_step"]


def test_stops_and_says_why(tmp_path):
    summary = short_run(tmp_path, *EACH, "samples.patience=3")
    assert summary["steps"] == 8
    assert summary["status"] == "stopped"
    assert summary["stopped_because"] == (
        "the writing is worse at 3 evaluations in a row, up to step 8: "
        "writing/repetition_4 was 0.2100, then 0.5000, 0.4000, 0.6000; "
        "writing/consistency_hidden was 0.9500, then 0.7000, 0.8000, 0.6000"
    )


def test_keeps_where_three_rates_vary_least(tmp_path):
    """0.20, 0.20 and 0.21 after steps 3 to 5: their standard deviation is 0.01 √2 / 3."""
    summary = short_run(tmp_path, *EACH)
    assert summary["status"] == "finished"
    assert steady_step(tmp_path) == 5
    assert summary["checkpoint/steady"] == (
        "step 5: the last three repetition rates vary least, 0.0047"
    )
    mean = (0.4 + 0.6 + 0.7) / 3
    spread = (sum((rate - mean) ** 2 for rate in (0.4, 0.6, 0.7)) / 3) ** 0.5
    assert summary["writing/repetition_spread"] == pytest.approx(spread)


def test_going_on_remembers(tmp_path):
    """Stopped short of the third bad evaluation, and of the second of the steadiest three."""
    short_run(tmp_path, *EACH, "samples.patience=3", "trainer.max_steps=7")
    more = short_run(tmp_path, *EACH, "samples.patience=3", "ckpt_path=auto")
    assert more["steps"] == 8
    assert "was 0.2100, then 0.5000, 0.4000, 0.6000" in more["stopped_because"]
    assert steady_step(tmp_path) == 5

    short_run(tmp_path / "b", *EACH, "trainer.max_steps=4")
    assert steady_step(tmp_path / "b") == 4
    short_run(tmp_path / "b", *EACH, "trainer.max_steps=6", "ckpt_path=auto")
    assert steady_step(tmp_path / "b") == 5


def test_without_patience_nothing_stops(tmp_path):
    assert short_run(tmp_path, *EACH)["stopped_because"] is None
