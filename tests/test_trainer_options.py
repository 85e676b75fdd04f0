"""Arguments of Lightning's Trainer that change what a run measures: each works or is refused."""

import csv
import json
import math
import re

import pytest
import yaml
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.strategies import StrategyRegistry
from omegaconf import OmegaConf

from causal_lm import build, cli, config
from causal_lm.fit import run
from support.outside import Figure, Recorder
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


def check(key, value):
    """Check a value of the Trainer by its rule alone; it is written as YAML."""
    config.check_values(dict(config.leaves({"trainer": {key: yaml.safe_load(value)}})))


@pytest.mark.parametrize(
    ("key", "values"),  # as the documentation of lightning.Trainer lists them
    [("devices", ["2", "-1", "auto", "[0]", "[0, 1]", "[3, 1]", "'0,1'", "'1,'", "'2'", "'-1'"]),
     ("precision", ["16", "'16'", "32", "'32'", "64", "'64'", "bf16", "16-true", "bf16-mixed"]),
     ("max_time", ["null", "'00:12:00:00'", "{hours: 1, minutes: 30}", "{days: 0.5}"]),
     ("max_time", ["{_target_: datetime.timedelta}"]),
     ("max_epochs", ["null", "-1", "2"]), ("val_check_interval", ["null", "0.5", "1.0", "3"]),
     ("limit_train_batches", ["null", "0.5", "3"]), ("limit_val_batches", ["null", "0", "0.5"]),
     ("limit_test_batches", ["null", "0", "0.5", "3"]), ("limit_predict_batches", ["null"]),
     ("log_every_n_steps", ["null", "10"]), ("num_sanity_val_steps", ["null", "-1", "2"]),
     ("deterministic", ["null", "true", "warn"]), ("benchmark", ["null", "true"]),
     ("gradient_clip_algorithm", ["null", "norm"]), ("gradient_clip_val", ["null", "1", "0.5"]),
     ("profiler", ["null", "simple", "advanced", "pytorch", "{_target_: mine.Profiler}"])],
)  # fmt: skip
def test_what_lightning_takes_is_accepted(key, values):
    for value in values:
        check(key, value)


@pytest.mark.parametrize(
    ("key", "values"),
    [("devices", ["[]", "[-1]", "[true]", "'0'", "[a]", "0.5", "null", "true", "{a: 1}"]),
     ("precision", ["transformer-engine", "null"]), ("gradient_clip_algorithm", ["value"]),
     ("val_check_interval", ["'00:01:00:00'", "{hours: 1}", "0", "1.5"]),
     ("max_time", ["{day: 1}", "3"]), ("limit_predict_batches", ["1"]), ("profiler", ["abc"])],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_key(key, values):
    for value in values:
        with pytest.raises(config.ConfigError, match=rf"trainer\.{key} must be"):
            check(key, value)


def test_one_device_in_each_form():
    single, several = [1, "1", [3], "3,"], [2, "2", -1, "-1", "auto", [0, 1], "0,1"]
    forms = [OmegaConf.create({"devices": form}).devices for form in single + several]
    found = [bool(re.fullmatch(cli.ONE_DEVICE, str(form))) for form in forms]
    assert found == [True] * len(single) + [False] * len(several)


def test_the_cpu_has_no_numbered_devices():
    with pytest.raises(config.ConfigError, match=r"trainer\.devices=\[0\]"):
        build.make_trainer(config.load(["trainer=cpu", "trainer.devices=[0]"]), [])


def test_a_duration_in_words_reaches_the_trainer():
    cfg = config.load(["trainer=cpu", "trainer.max_time={hours: 1, minutes: 30}"])
    (timer,) = [c for c in build.make_trainer(cfg, []).callbacks if isinstance(c, Timer)]
    assert timer._duration == 5400


@pytest.mark.slow
def test_without_an_interval_each_epoch_is_validated(tmp_path):
    summary = short_run(tmp_path, "trainer.val_check_interval=null", "trainer.max_steps=12")
    assert summary["steps"] == 12  # an epoch has nine
    with (tmp_path / "metrics.csv").open() as file:
        found = [row["step"] for row in csv.DictReader(file) if row["val/loss"]]
    assert found == ["9", "12"]


OWN = "{_target_: support.outside.Figure, value: 1.0}"


@pytest.mark.parametrize(
    "form", [OWN, f"[{OWN}]", f"[null,{OWN}]", f"{{mine: {OWN}, other: null}}"]
)
def test_callbacks_of_the_trainer_in_each_form(form):
    trainer = build.make_trainer(config.load(["trainer=cpu", f"+trainer.callbacks={form}"]), [])
    assert [c.value for c in trainer.callbacks if isinstance(c, Figure)] == [1.0]


def test_false_means_no_logger():
    logger = "+logger.mine={_target_: support.outside.Recorder}"
    one = build.make_trainer(config.load(["trainer=cpu", logger]), [], [Recorder()])
    none = build.make_trainer(config.load(["trainer=cpu", logger, "+trainer.logger=false"]), [])
    assert [len(trainer.loggers) for trainer in (one, none)] == [2, 0]


SWA, EMA = (f"lightning.pytorch.callbacks.{n}WeightAveraging" for n in ("Stochastic", "EMA"))
FSDP = "trainer.strategy={_target_: lightning.pytorch.strategies.FSDPStrategy}"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ([f"+trainer.callbacks=[{{_target_: {SWA}, swa_lrs: 0.1}}]"], "StochasticWeightAveraging"),
        (["+callbacks.own={_target_: support.outside.Averaging}"], "StochasticWeightAveraging"),
        (["trainer=fsdp", f"+trainer.callbacks=[{{_target_: {EMA}}}]"], "trainer=fsdp"),
        ([FSDP], "trainer=fsdp"),
    ],
    ids=["in-a-list", "subclass", "sharded", "strategy"],
)
def test_a_class_that_would_make_a_run_wrong_is_refused_wherever_it_stands(words, named):
    with pytest.raises(config.ConfigError, match=named):
        build.make_trainer(config.load([*words, "trainer.accelerator=cpu"]), [])


def test_a_misspelled_key_is_refused_before_the_data_are_loaded(monkeypatch):
    monkeypatch.setattr(build, "instantiate", None)  # nothing is made
    cfg = config.load([*SHORT, "+trainer.fast_dev_runn=true"])
    with pytest.raises(config.ConfigError, match=r"trainer\.fast_dev_runn.*trainer\.fast_dev_run'"):
        build.prepare(cfg)


def test_every_strategy_of_lightning_is_a_valid_name():
    for name in ["auto", *StrategyRegistry.available_strategies()]:
        config.check_values({"trainer.strategy": name})
