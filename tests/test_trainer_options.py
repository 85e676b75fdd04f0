"""Arguments of Lightning's Trainer that change what a run measures: each works or is refused."""

import json
import math

import pytest
from lightning.pytorch.strategies import StrategyRegistry

from causal_lm import build, config
from support.runs import SHORT, short_run

PLAIN = ["val/loss", "train/loss", "val/ppl_over_floor", "checkpoint/best"]


@pytest.mark.parametrize("model", ["tiny", "llama"])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_true_precisions_train(precision, model, tmp_path):
    quick = ["trainer.val_check_interval=1000", "preflight.on_fault=off", "samples.count=0"]
    words = [f"model={model}", f"trainer.precision={precision}", "trainer.max_steps=20", *quick]
    summary = short_run(tmp_path, *words, "data.source.symbols=8", "optimizer.lr=0.02")
    assert summary["status"] == "finished"
    assert summary["val/loss"] < math.log(10)  # below that of a uniform guess


def test_without_validation_its_figures_are_null(tmp_path):
    summary = short_run(tmp_path, "+trainer.limit_val_batches=0")
    assert summary["status"] == "finished" and summary["steps"] == 6
    assert [summary[key] is None for key in PLAIN] == [True, False, True, True]
    assert summary["floor/loss"] > 0
    assert json.loads((tmp_path / "summary.json").read_text())["val/loss"] is None
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize(
    ("word", "steps"),
    [("+trainer.fast_dev_run=true", 1), ("+trainer.fast_dev_run=3", 3),
     ("+trainer.overfit_batches=2", 6), ("+trainer.limit_val_batches=1", 6)],
)  # fmt: skip
def test_shortened_runs_end_with_all_figures(word, steps, tmp_path):
    summary = short_run(tmp_path, word)
    assert (summary["status"], summary["steps"]) == ("finished", steps)
    assert all(summary[key] is not None for key in PLAIN)


@pytest.mark.parametrize(
    ("key", "value"),
    [("enable_checkpointing", "false"), ("limit_train_batches", "0"), ("barebones", "true"),
     ("limit_val_batches", "1.5"), ("limit_val_batches", "-1"), ("fast_dev_run", "abc"),
     ("overfit_batches", "abc"), ("strategy", "abc"), ("max_epochs", "0"),
     ("max_time", "'99999999:00:00:00'"), ("max_time", "'٣:00:00:00'")],
)  # fmt: skip
def test_what_makes_no_run_is_refused_by_key(key, value):
    with pytest.raises(config.ConfigError, match=rf"trainer\.{key} must be"):
        config.load([*SHORT, f"++trainer.{key}={value}"])


def test_a_misspelled_key_is_refused_before_the_data_are_loaded(monkeypatch):
    monkeypatch.setattr(build, "instantiate", None)  # nothing is made
    cfg = config.load([*SHORT, "+trainer.fast_dev_runn=true"])
    with pytest.raises(config.ConfigError, match=r"trainer\.fast_dev_runn.*trainer\.fast_dev_run'"):
        build.prepare(cfg)


def test_every_strategy_of_lightning_is_a_valid_name():
    for name in ["auto", *StrategyRegistry.available_strategies()]:
        config.check_values({"trainer.strategy": name})
