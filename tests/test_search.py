"""Searches with Optuna: what is sampled, what a study counts, how a killed search goes on."""

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from filelock import FileLock
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf

from causal_lm import config
from support import ROOT, command
from support.runs import SHORT, short_run

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.extras

Plugins.instance()  # runs the files of plugins again, so their classes are imported after it
from hydra._internal.core_plugins.basic_launcher import BasicLauncher  # noqa: E402

from hydra_plugins.causal_lm_optuna import OptunaSweeper  # noqa: E402

BRUTE_FORCE = [
    "hydra.sweeper.sampler={_target_:optuna.samplers.BruteForceSampler,seed:0}",
    "optimizer.lr=0.01,0.02,0.03", "~hydra.sweeper.params",
]  # fmt: skip


def search(folder, task, *overrides, validate=False):
    """Run a search of Hydra in this process, with a function in the place of training."""
    words = ["hparams_search=optuna", "~hydra.callbacks.table", "hydra/job_logging=none",
             "hydra/hydra_logging=none", f"hydra.sweep.dir={folder}", *overrides]  # fmt: skip
    words += [] if validate else ["~hydra.callbacks.validate"]  # which takes most of the time
    with initialize_config_dir(str(config.CONFIG_DIR), version_base="1.3"):
        return GlobalHydra.instance().hydra.multirun("train", task, words)


def study_of(folder, name="search"):
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/study.db")


def states_of(folder):
    return [trial.state.name for trial in study_of(folder).trials]


def test_an_axis_in_the_syntax_of_hydra_is_a_distribution():
    sweeper = OptunaSweeper(1)
    sweeper.optuna = optuna
    make = optuna.distributions
    expected = {
        "x=interval(0.5,2)": make.FloatDistribution(0.5, 2),
        "x=tag(log,interval(1e-4,1e-2))": make.FloatDistribution(1e-4, 1e-2, log=True),
        "x=int(interval(1,8))": make.IntDistribution(1, 8),
        "x=tag(log,int(interval(1,8)))": make.IntDistribution(1, 8, log=True),
        "x=range(1,8,3)": make.IntDistribution(1, 7, step=3),  # 1, 4, 7, as in a sweep of Hydra
        "x=range(4)": make.IntDistribution(0, 3),
        "x=range(5,1,-2)": make.IntDistribution(3, 5, step=2),
        "x=range(0.5,1.5,0.25)": make.FloatDistribution(0.5, 1.25, step=0.25),
        "x=1,a b,true,null": make.CategoricalDistribution([1, r"a\ b", True, "null"]),
        r"+x=choice(a\=b,2.5,[1,2])": make.CategoricalDistribution([r"a\=b", 2.5, "[1,2]"]),
    }
    overrides = OverridesParser.create().parse_overrides(list(expected))
    assert [sweeper._distribution(override) for override in overrides] == [*expected.values()]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["optimizer.lr=interval(1e-2,1e-3)"], ["optimizer.lr", "0.01"]),
        (["optimizer.lr=interval(-1,1e-3)"], ["optimizer.lr", "-1"]),
        (["seed=range(3,3)"], ["seed=range(3,3)"]),
        (["seed=tag(log,range(0,4))"], ["seed=tag(log,range(0,4))"]),
        (["hydra.sweeper.n_trials=0"], ["hydra.sweeper.n_trials", "0"]),
        (["hydra.sweeper.n_jobs=1.5"], ["hydra.sweeper.n_jobs", "1.5"]),
        (["hydra.sweeper.n_trails=3"], ["mean 'hydra.sweeper.n_trials'"]),
        (["hydra.sweeper.sampler.sed=3"], ["mean 'hydra.sweeper.sampler.seed'"]),
        (["hydra.sweeper.sampler._target_=optuna.samplers.Mine"], ["optuna.samplers.Mine"]),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_before_a_directory_is_made(words, named, tmp_path, monkeypatch):
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    with pytest.raises(BaseException) as error, config.as_config_error(words):  # noqa: PT011
        search(tmp_path / "new", lambda cfg: 0.0, *words, validate=True)
    raised = error.value.__cause__ if "Bypass" in error.typename else error.value
    assert isinstance(raised, config.ConfigError)
    assert [word for word in named if word not in str(raised)] == []
    assert not (tmp_path / "new").exists()


def test_a_study_has_its_trials_once_however_often_the_search_is_typed(tmp_path):
    """Trial N is job N. A value that is NaN fails its trial; the search goes on."""
    jobs = []

    def task(cfg):
        assert not cfg.ckpt_path and cfg.model.d_model == 32
        jobs.append(
            (HydraConfig.get().job.num, cfg.optimizer.lr, cfg.callbacks.pruning.trial.number)
        )
        return math.nan if cfg.optimizer.lr == 0.01 else -cfg.optimizer.lr

    words = [*BRUTE_FORCE, "model.d_model=32"]
    for n_trials, expected in ((2, 2), (2, 2), (3, 3)):
        search(tmp_path, task, *words, f"hydra.sweeper.n_trials={n_trials}")
        assert len(jobs) == expected
    assert [(number, number) for number in range(3)] == [(num, trial) for num, _, trial in jobs]
    assert {path.name for path in tmp_path.glob("*_fix")} == {"0_fix", "1_fix", "2_fix"}
    trials = study_of(tmp_path).trials
    assert [trial.params["optimizer.lr"] for trial in trials] == [lr for _, lr, _ in jobs]
    failed = [trial.params for trial in trials if trial.state.name == "FAIL"]
    assert failed == [{"optimizer.lr": 0.01}]
    assert sorted(states_of(tmp_path)) == ["COMPLETE", "COMPLETE", "FAIL"]
    results = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert results == {
        "name": "optuna", "best_params": {"optimizer.lr": 0.03}, "best_value": -0.03
    }  # fmt: skip


def test_a_search_can_maximize_and_mixes_samples_with_values_that_stay(tmp_path):
    words = ["hydra.sweeper.direction=maximize", "hydra.sweeper.n_trials=3", "seed=5",
             "model=tiny,llama", "model.d_model=int(interval(4,8))", "~hydra.sweeper.params",
             "model.n_layers=2"]  # fmt: skip
    seen = []

    def task(cfg):
        seen.append(cfg)
        return float(cfg.model.d_model)

    search(tmp_path, task, *words)
    assert {(cfg.seed, cfg.model.n_layers) for cfg in seen} == {(5, 2)}
    sampled = [trial.params["model.d_model"] for trial in study_of(tmp_path).trials]
    assert [cfg.model.d_model for cfg in seen] == sampled
    results = yaml.safe_load((tmp_path / "optimization_results.yaml").read_text())
    assert results["best_value"] == max(sampled)


def test_a_job_that_raises_fails_its_trial_and_the_search_at_its_end(tmp_path):
    def task(cfg):
        if cfg.optimizer.lr == 0.02:
            raise OSError("no space")
        return cfg.optimizer.lr

    with pytest.raises(OSError, match="no space"):
        search(tmp_path, task, *BRUTE_FORCE, "hydra.sweeper.n_trials=9")
    assert sorted(states_of(tmp_path)) == ["COMPLETE", "COMPLETE", "FAIL"]
    assert (tmp_path / "optimization_results.yaml").exists()


def test_a_trial_that_was_cut_short_is_continued_with_its_values(tmp_path, monkeypatch):
    calls, seen = [], []
    launch = BasicLauncher.launch

    def spy(self, job_overrides, initial_job_idx):
        calls.append((initial_job_idx, len(job_overrides)))
        return launch(self, job_overrides, initial_job_idx)

    monkeypatch.setattr(BasicLauncher, "launch", spy)

    def task(cfg):
        number = HydraConfig.get().job.num
        seen.append((number, cfg.optimizer.lr, cfg.ckpt_path))
        if len(seen) == 2:
            raise SystemExit(1)
        return cfg.optimizer.lr

    words = ["hydra.sweeper.n_trials=5", "hydra.sweeper.n_jobs=3", "optimizer.weight_decay=0.0"]
    with pytest.raises(SystemExit):
        search(tmp_path, task, *words)
    assert states_of(tmp_path) == ["RUNNING"] * 3
    search(tmp_path, task, *words)
    assert calls == [(0, 3), (0, 3), (3, 2)]
    again = seen[2:]
    assert [(number, path) for number, _, path in again] == [
        (0, "auto"), (1, "auto"), (2, "auto"), (3, None), (4, None)
    ]  # fmt: skip
    assert [rate for _, rate, _ in again[:2]] == [rate for _, rate, _ in seen[:2]]
    assert len({rate for _, rate, _ in again}) == 5  # the seed does not repeat its first values
    assert states_of(tmp_path) == ["COMPLETE"] * 5


def test_a_search_that_is_typed_twice_at_once_is_refused(tmp_path):
    with FileLock(tmp_path / ".search.lock"), pytest.raises(config.ConfigError, match="running"):
        search(tmp_path, lambda cfg: 1.0)


def test_a_changed_axis_or_direction_is_refused(tmp_path):
    search(tmp_path, lambda cfg: 1.0, *BRUTE_FORCE, "hydra.sweeper.n_trials=1")
    for word, named in (("optimizer.lr=1,2", "study_name"),
                        ("hydra.sweeper.direction=maximize", "minimize"),
                        ("hydra.sweeper.direction=down", "down")):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            search(tmp_path, lambda cfg: 1.0, *BRUTE_FORCE, word, "hydra.sweeper.n_trials=2")
    words = ["optimizer.lr=1,2", "hydra.sweeper.n_trials=1", "hydra.sweeper.study_name=second"]
    search(tmp_path, lambda cfg: 1.0, *BRUTE_FORCE, *words)
    assert len(study_of(tmp_path, "second").trials) == 1


@pytest.mark.parametrize(("upper", "steps"), [(0.0, 3), (1e9, 6)])
def test_a_run_that_falls_behind_stops_and_its_trial_is_pruned(upper, steps, tmp_path):
    storage = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(study_name="search", storage=storage)
    study.ask()
    pruning = "callbacks.pruning"
    summary = short_run(
        tmp_path / "run", "hparams_search=optuna", "preflight.on_fault=off",
        f"{pruning}.trial={{storage:'{storage}',study_name:search,number:0}}",
        f"{pruning}.pruner._target_=optuna.pruners.ThresholdPruner",
        f"+{pruning}.pruner.upper={upper}", f"~{pruning}.pruner.n_startup_trials",
        f"{pruning}.pruner.n_warmup_steps=0",
    )  # fmt: skip
    (trial,) = study.trials
    assert list(trial.intermediate_values) == [3]  # nothing is left to prune at the last step
    assert summary["steps"] == steps
    if steps == 3:
        assert (summary["status"], trial.state.name) == ("stopped", "PRUNED")
        assert "pruned" in summary["stopped_because"]
        assert trial.value == pytest.approx(summary["val/loss"], rel=1e-5)
    else:
        assert (summary["status"], trial.state.name) == ("finished", "RUNNING")


def test_a_killed_search_trains_what_is_missing(tmp_path):
    """SIGKILL in the middle of a trial; the same command continues it at its checkpoint."""
    words = [*SHORT, "hparams_search=optuna", "preflight.on_fault=off", "hydra.sweeper.n_trials=2",
             "trainer.max_steps=100", "trainer.val_check_interval=50", "~callbacks.pruning",
             "callbacks.checkpoint.every_n_steps=5", "samples.count=0",
             f"hydra.sweep.dir={tmp_path}"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "train.py", *words], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    checkpoint = tmp_path / "0_fix" / "checkpoints" / "last.ckpt"
    while not checkpoint.exists() and process.poll() is None:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert states_of(tmp_path) == ["RUNNING"] and not (tmp_path / "0_fix/summary.json").exists()
    rate = study_of(tmp_path).trials[0].params["optimizer.lr"]
    done = command("train.py", *words)
    assert done.returncode == 0, done.stderr
    assert states_of(tmp_path) == ["COMPLETE", "COMPLETE"]
    assert OmegaConf.load(tmp_path / "0_fix" / "config.yaml").optimizer.lr == rate
    assert str(OmegaConf.load(tmp_path / "0_fix" / "config.yaml").ckpt_path).endswith(".ckpt")
    summaries = [json.loads((tmp_path / f"{i}_fix/summary.json").read_text()) for i in (0, 1)]
    assert [s["steps"] for s in summaries] == [100, 100]
    assert [t.value for t in study_of(tmp_path).trials] == [s["val/loss"] for s in summaries]
