"""A run whose writing is scripted: when it stops, why, and which weights it keeps."""

import logging
import math

import pytest
import torch

from causal_lm.callbacks.sample_monitor import SampleMonitor
from causal_lm.callbacks.stop import DegenerationStopper
from support.runs import short_run

REPETITION = [0.50, 0.10, 0.20, 0.20, 0.21, 0.50, 0.40, 0.60, 0.70]
CONSISTENCY = [0.90, 0.90, 0.80, 0.70, 0.95, 0.70, 0.80, 0.60, 0.50]
"""Of the evaluations after steps 1 to 9. Both are worse than after step 2 at steps 3
and 4, and than after step 5 from step 6 on, though step 7 is better than step 6."""
EACH = ["trainer.val_check_interval=1", "trainer.max_steps=9"]


@pytest.fixture
def script(monkeypatch):
    """Evaluations by the optimizer step; None: the model cannot write."""

    def play(repetition, consistency, error=0.001):
        def evaluate(self, module):
            rate = repetition[module.trainer.global_step]
            if rate is None:
                raise FloatingPointError("logits")
            agree = consistency[module.trainer.global_step]
            figures = {"repetition_4": rate, "repetition_error": error}
            return figures | {"consistency_hidden": agree}, ""

        monkeypatch.setattr(SampleMonitor, "evaluate", evaluate)

    play([math.nan, *REPETITION], [math.nan, *CONSISTENCY])
    return play


pytestmark = pytest.mark.usefixtures("script")


def stable_step(directory):
    return torch.load(directory / "checkpoints/stable.ckpt", weights_only=True)["global_step"]


def test_stops_and_says_why(tmp_path):
    summary = short_run(tmp_path, *EACH, "samples.patience=3")
    assert summary["steps"] == 8
    assert summary["status"] == "stopped"
    assert summary["stopped_because"] == (
        "the writing is worse at 3 evaluations in a row, up to step 8: "
        "repetition was 0.2100, then 0.5000, 0.4000, 0.6000; "
        "consistency was 0.9500, then 0.7000, 0.8000, 0.6000"
    )


def test_keeps_where_three_rates_vary_least(tmp_path):
    """0.20, 0.20 and 0.21 after steps 3 to 5: a standard deviation of 0.01 √2 / 3, or 0.0047."""
    summary = short_run(tmp_path, *EACH)
    assert summary["status"] == "finished"
    assert stable_step(tmp_path) == 5
    assert summary["checkpoint/stable"] == (
        "step 5: the last three repetition rates vary least, 0.2000, 0.2000, 0.2100"
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
    assert stable_step(tmp_path) == 5

    short_run(tmp_path / "b", *EACH, "trainer.max_steps=4")
    assert stable_step(tmp_path / "b") == 4
    short_run(tmp_path / "b", *EACH, "trainer.max_steps=6", "ckpt_path=auto")
    assert stable_step(tmp_path / "b") == 5


def test_without_patience_nothing_stops(tmp_path):
    assert short_run(tmp_path, *EACH)["stopped_because"] is None


def test_of_what_samples_cannot_tell_apart_the_later_is_kept(tmp_path, script):
    """0, 0, 0 of a model that knows nothing yet is not steadier than 0.050, 0.051, 0.050; 0.05,
    0.08, 0.09 is less steady than both."""
    rates = [math.nan, 0.0, 0.0, 0.0, 0.050, 0.051, 0.050, 0.08, 0.09]
    script(rates, [0.9] * 9, error=0.005)
    summary = short_run(tmp_path, *EACH, "trainer.max_steps=8")
    assert summary["checkpoint/stable"].endswith("vary least, 0.0500, 0.0510, 0.0500")
    assert stable_step(tmp_path) == 6


def test_an_evaluation_is_judged_once_and_by_its_own_figures(tmp_path, script):
    """Two evaluations within each optimizer step, all worse than the first."""
    script([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    every = ["trainer.accumulate_grad_batches=4", "trainer.val_check_interval=2"]
    summary = short_run(tmp_path, *every, "samples.patience=4", "trainer.max_steps=5")
    assert summary["steps"] == 4
    assert (
        "repetition was 0.1000, then 0.2000, 0.3000, 0.4000, 0.5000;"
        in (summary["stopped_because"])
    )


def test_without_samples_nothing_is_judged(tmp_path, script):
    """The steadiest three are those up to step 3; step 4 has none, and the old spread is past."""
    script([math.nan, 0.1, 0.2, 0.2, None, None, 0.4], [math.nan, 0.9, 0.8, 0.7, 0, 0, 0.6])
    summary = short_run(tmp_path, *EACH, "samples.patience=3", "trainer.max_steps=6")
    assert stable_step(tmp_path) == 3
    assert (summary["steps"], summary["status"]) == (6, "stopped")
    assert "repetition was 0.1000, then 0.2000, 0.2000, 0.4000" in summary["stopped_because"]


def judged(rates, error):
    decline = DegenerationStopper(2)
    return [decline.judge(i, rate, error, 0.9 - 0.1 * i) for i, rate in enumerate(rates)]


def test_a_handful_of_n_grams_stops_nothing():
    """As measured on a run that learned. The margin is three errors of a difference: 0.0042."""
    assert judged([0.0013, 0.0047, 0.0030], error=0.001) == [False] * 3
    assert judged([0.0013, 0.0057, 0.0056], error=0.001) == [False, False, True]
    assert judged([0.0013, 0.0057, 0.0054], error=0.001) == [False] * 3


def test_what_cannot_be_told_is_said_once(caplog):
    decline = DegenerationStopper(1)
    with caplog.at_level(logging.WARNING):
        assert [decline.judge(step, 0.1, 0.01, None) for step in range(3)] == [False] * 3
    (record,) = caplog.records
    assert "there is no consistency" in record.getMessage()
