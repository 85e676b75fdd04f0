"""Runs with scripted sample statistics: when they stop, why, and which weights are kept."""

import logging
import math
import re

import pytest
import torch

from causal_lm.callbacks.sample_monitor import DegenerationStopper, SampleMonitor
from support.runs import short_run

STABLE = "stable"
REPETITION = [0.50, 0.10, 0.20, 0.20, 0.21, 0.50, 0.40, 0.60, 0.70]
CONSISTENCY = [0.90, 0.90, 0.80, 0.70, 0.95, 0.70, 0.80, 0.60, 0.50]
"""Of the evaluations after steps 1 to 9. Steps 3 and 4 are worse than step 2, and all from step 6
on are worse than step 5, though step 7 is better than step 6."""
EACH = ["trainer.val_check_interval=1", "trainer.max_steps=9"]


@pytest.fixture
def script(monkeypatch):
    """Replaces the statistics of an evaluation, by optimizer step; None: sampling fails."""

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
    path = directory / f"checkpoints/{STABLE}.ckpt"
    return torch.load(path, weights_only=True)["global_step"]


def figures_in(sentence):
    """The figures with decimals, in order."""
    return [float(number) for number in re.findall(r"\d\.\d+", sentence)]


WORSE = [0.21, 0.50, 0.40, 0.60, 0.95, 0.70, 0.80, 0.60]
"""Repetition and consistency of the reference and of three worse evaluations."""


def test_stops_and_says_why(tmp_path):
    summary = short_run(tmp_path, *EACH, "samples.patience=3")
    assert (summary["steps"], summary["status"]) == (8, "stopped")
    assert "step 8" in summary["stopped_because"]
    assert figures_in(summary["stopped_because"]) == WORSE


def test_keeps_the_weights_whose_last_three_rates_vary_least(tmp_path):
    """0.20, 0.20 and 0.21 after steps 3 to 5: a standard deviation of 0.01 √2 / 3, or 0.0047."""
    summary = short_run(tmp_path, *EACH)
    assert summary["status"] == "finished"
    assert stable_step(tmp_path) == 5
    reason = summary[f"checkpoint/{STABLE}"]
    assert reason.startswith("step 5:") and figures_in(reason) == [0.2, 0.2, 0.21]
    mean = (0.4 + 0.6 + 0.7) / 3
    spread = (sum((rate - mean) ** 2 for rate in (0.4, 0.6, 0.7)) / 3) ** 0.5
    assert summary["writing/repetition_spread"] == pytest.approx(spread)


def test_a_continued_run_remembers_earlier_evaluations(tmp_path):
    """Interrupted before the third worse evaluation, and before the last of the stable three."""
    short_run(tmp_path, *EACH, "samples.patience=3", "trainer.max_steps=7")
    more = short_run(tmp_path, *EACH, "samples.patience=3", "ckpt_path=auto")
    assert more["steps"] == 8
    assert figures_in(more["stopped_because"]) == WORSE
    assert stable_step(tmp_path) == 5

    short_run(tmp_path / "b", *EACH, "trainer.max_steps=4")
    assert stable_step(tmp_path / "b") == 4
    short_run(tmp_path / "b", *EACH, "trainer.max_steps=6", "ckpt_path=auto")
    assert stable_step(tmp_path / "b") == 5


def test_without_patience_nothing_stops(tmp_path):
    assert short_run(tmp_path, *EACH)["stopped_because"] is None


def test_of_spreads_within_the_noise_the_latest_is_kept(tmp_path, script):
    """0, 0, 0 of a model that knows nothing yet is not more stable than 0.050, 0.051, 0.050, since
    both are within the error; 0.05, 0.08, 0.09 is less stable than both."""
    rates = [math.nan, 0.0, 0.0, 0.0, 0.050, 0.051, 0.050, 0.08, 0.09]
    script(rates, [0.9] * 9, error=0.005)
    summary = short_run(tmp_path, *EACH, "trainer.max_steps=8")
    assert figures_in(summary[f"checkpoint/{STABLE}"]) == [0.05, 0.051, 0.05]
    assert stable_step(tmp_path) == 6


def test_an_evaluation_counts_once_and_with_its_own_figures(tmp_path, script):
    """Two evaluations within each optimizer step, all worse than the first."""
    script([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
    every = ["trainer.accumulate_grad_batches=4", "trainer.val_check_interval=2"]
    summary = short_run(tmp_path, *every, "samples.patience=4", "trainer.max_steps=5")
    assert summary["steps"] == 4
    assert figures_in(summary["stopped_because"])[:5] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_an_evaluation_without_samples_is_left_out(tmp_path, script):
    """The stable three end at step 3: step 4 has no samples, and no spread of an earlier step."""
    script([math.nan, 0.1, 0.2, 0.2, None, None, 0.4], [math.nan, 0.9, 0.8, 0.7, 0, 0, 0.6])
    summary = short_run(tmp_path, *EACH, "samples.patience=3", "trainer.max_steps=6")
    assert stable_step(tmp_path) == 3
    assert (summary["steps"], summary["status"]) == (6, "stopped")
    assert figures_in(summary["stopped_because"])[:4] == [0.1, 0.2, 0.2, 0.4]


def decisions(rates, error):
    stopper = DegenerationStopper(2)
    return [stopper.should_stop(i, rate, error, 0.9 - 0.1 * i) for i, rate in enumerate(rates)]


def test_a_rise_within_the_noise_does_not_stop():
    """As measured on a run that learned. The margin is three errors of a difference: 0.0042."""
    assert decisions([0.0013, 0.0047, 0.0030], error=0.001) == [False] * 3
    assert decisions([0.0013, 0.0057, 0.0056], error=0.001) == [False, False, True]
    assert decisions([0.0013, 0.0057, 0.0054], error=0.001) == [False] * 3


def test_a_missing_figure_is_named_once(caplog):
    stopper = DegenerationStopper(1)
    with caplog.at_level(logging.WARNING):
        assert [stopper.should_stop(step, 0.1, 0.01, None) for step in range(3)] == [False] * 3
    (record,) = caplog.records
    assert "samples.patience" in record.getMessage() and "consistency" in record.getMessage()
