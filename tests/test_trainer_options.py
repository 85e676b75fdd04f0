"""Arguments of Lightning's Trainer that change what a run measures: each works or is refused."""

import json
import math

import pytest
from lightning.pytorch.strategies import StrategyRegistry

from causal_lm import build, config
from causal_lm.fit import run
from support.runs import SHORT, short_run

PLAIN = ["val/loss", "train/loss", "val/ppl_over_floor", "checkpoint/best"]


SMALL = {
    "huggingface_llama": [
        "model.config.hidden_size=16", "model.config.intermediate_size=16",
        "model.config.num_attention_heads=2", "model.config.num_key_value_heads=1",
    ],
    "x_transformers": ["model.d_model=64"], "gru": ["model.d_model=16"],
}  # fmt: skip


def check_precision(directory, model, precision, *more):
    """A short run in this precision learns something, and its preflight finds no fault."""
    own = SMALL.get(model, ["model.d_model=16", "model.d_ff=16"])
    shared = [word for word in SHORT if not word.startswith("model.")]
    words = [f"model={model}", f"trainer.precision={precision}", "trainer.max_steps=20", *own]
    quick = ["trainer.val_check_interval=1000", "samples.count=0", "data.source.symbols=8"]
    summary = run(config.load([*shared, *words, *quick, "optimizer.lr=0.02", *more]), directory)
    assert summary["status"] == "finished" and summary["preflight/faults"] == []
    assert summary["val/loss"] < math.log(10)  # below that of a uniform guess
    return summary


@pytest.mark.parametrize("model", ["tiny", "llama", "gru"])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
def test_true_precisions_train(precision, model, tmp_path):
    is_audited = (model, precision) in [("gru", "bf16-true"), ("llama", "16-true")]
    summary = check_precision(
        tmp_path, model, precision, f"preflight.on_fault={'error' if is_audited else 'off'}"
    )
    assert (summary["seconds/preflight"] is not None) == is_audited


@pytest.mark.extras
@pytest.mark.parametrize(
    ("library", "model", "precision"),
    [("transformers", "huggingface_llama", "bf16-true"),
     ("x_transformers", "x_transformers", "64-true")],
)  # fmt: skip
def test_models_of_other_libraries_train_in_true_precisions(library, model, precision, tmp_path):
    pytest.importorskip(library)
    assert check_precision(tmp_path, model, precision)["seconds/preflight"] > 0


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
