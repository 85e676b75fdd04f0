"""The launchers of other people run the jobs of a sweep as ours do."""

import json
import os
import sys
from importlib.util import find_spec

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from causal_lm import config
from causal_lm.cli import PROGRAM
from support import ROOT, command
from support.runs import SHORT

QUICK = [*SHORT, "preflight.on_fault=off", "samples.count=0"]
INSTALLED = {
    name: find_spec("hydra_plugins") and find_spec(f"hydra_plugins.hydra_{name}_launcher")
    for name in ("joblib", "submitit", "ray")
}
SBATCH = """#!/bin/sh
cp "$1" "$RECORDED"
exit 1
"""


def needs(name):
    installed = bool(INSTALLED[name])
    return pytest.mark.skipif(not installed, reason=f"hydra-{name}-launcher is not installed")


def summaries(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*_fix/summary.json"))]


@pytest.mark.parametrize(
    ("option", "extra"),
    [("joblib", "joblib"), ("submitit_slurm", "submitit"), ("slurm", "submitit"), ("ray", "ray")],
)
def test_a_launcher_that_is_not_installed_is_answered_with_its_extra(option, extra):
    if INSTALLED[extra]:
        config.load([f"hydra/launcher={option}"])
        return
    with pytest.raises(config.ConfigError) as error:
        config.load([f"hydra/launcher={option}"])
    assert f"'.[{extra}]'" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.extras
@needs("joblib")
def test_joblib_runs_the_trials_of_a_search_side_by_side(tmp_path):
    """One of them is pruned, by a process that has only the address of its trial."""
    pruner = "callbacks.pruning.pruner"
    done = command(
        "train.py", "-m", *QUICK, "hparams_search=optuna", "hydra/launcher=joblib",
        "hydra.launcher.n_jobs=2", "hydra.sweeper.n_jobs=2", "hydra.sweeper.n_trials=2",
        f"{pruner}._target_=optuna.pruners.ThresholdPruner", f"~{pruner}.n_startup_trials",
        f"+{pruner}.upper=3.74", "optimizer.lr=1e-9,0.03",
        "hydra.sweeper.sampler._target_=optuna.samplers.BruteForceSampler",
        "~hydra.sweeper.params", f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = OmegaConf.load(tmp_path / "optimization_results.yaml")
    assert results.best_params == {"optimizer.lr": 0.03}
    steps = {s["val/loss"]: (s["status"], s["steps"]) for s in summaries(tmp_path)}
    assert [steps[loss] for loss in sorted(steps)] == [("finished", 6), ("stopped", 3)]


@pytest.mark.extras
@needs("submitit")
def test_two_ranks_of_a_trial_train_its_values_and_stop_together(tmp_path):
    """In a process of submitit. The mean over ranks of their rates is the rate of the trial; the
    first rank finds the trial behind, and the other one does not wait for it."""
    pruner = "callbacks.pruning.pruner"
    done = command(
        "train.py", *QUICK, "hparams_search=optuna", "hydra/launcher=submitit_local",
        "hydra.sweeper.n_trials=1", "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2",
        "+callbacks.rate={_target_:support.outside.MeanOverRanks,value:${optimizer.lr}}",
        f"{pruner}._target_=optuna.pruners.ThresholdPruner", f"~{pruner}.n_startup_trials",
        f"+{pruner}.upper=0.0", f"hydra.sweep.dir={tmp_path}",
        PYTHONPATH=f"{ROOT}/src:{ROOT}/preflight/src:{ROOT}/tests",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    import optuna

    storage = f"sqlite:///{tmp_path}/study.db"
    (trial,) = optuna.load_study(study_name="search", storage=storage).trials
    (summary,) = summaries(tmp_path)
    assert (summary["status"], summary["steps"], trial.state.name) == ("stopped", 3, "PRUNED")
    assert trial.value == pytest.approx(summary["val/loss"], rel=1e-5)
    rate = trial.params["optimizer.lr"]
    assert [summary["own/value"], summary["own/mean"]] == pytest.approx([rate, rate], rel=1e-6)


@pytest.mark.extras
@needs("submitit")
def test_the_preset_of_slurm_submits_one_array(tmp_path, monkeypatch):
    """What sbatch gets; there is no cluster here, so it refuses the job."""
    for name in ("sbatch", "srun"):
        (tmp_path / name).write_text(SBATCH)
        (tmp_path / name).chmod(0o755)
    path, recorded = f"{tmp_path}:{os.environ['PATH']}", tmp_path / "recorded"
    done = command(
        "train.py", "-m", *QUICK, "hydra/launcher=slurm", "hydra.launcher.partition=gpu",
        "seed=0,1", f"hydra.sweep.dir={tmp_path / 'sweep'}", PATH=path, RECORDED=str(recorded),
    )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    asked = {line.removeprefix("#SBATCH --") for line in recorded.read_text().splitlines()}
    expected = {"partition=gpu", "array=0-1%2", "time=240", "cpus-per-task=8", "gpus-per-node=1",
                "mem=32GB", "nodes=1", "ntasks-per-node=1"}  # fmt: skip
    assert expected - asked == set()


@pytest.mark.extras
@needs("ray")
def test_ray_runs_the_jobs_of_a_sweep(tmp_path):
    done = command(
        "train.py", "-m", *QUICK, "hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2",
        "+hydra.launcher.ray.init.include_dashboard=false", "seed=0,1",
        f"hydra.sweep.dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [(s["seed"], s["steps"]) for s in summaries(tmp_path)] == [(0, 6), (1, 6)]


def test_a_search_without_optuna_is_answered_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)  # as if it were not installed
    words = ["hparams_search=optuna", "~hydra.callbacks.validate", f"hydra.sweep.dir={tmp_path}/x"]
    with (
        initialize_config_dir(str(config.CONFIG_DIR), version_base="1.3"),
        pytest.raises(config.ConfigError, match=r"'\.\[optuna\]'"),
    ):
        GlobalHydra.instance().hydra.multirun("train", lambda cfg: 0.0, words)
    assert not list(tmp_path.iterdir())


def test_a_job_of_several_ranks_repeats_the_program_and_not_the_worker_of_a_launcher(tmp_path):
    code = (
        f"import os; from causal_lm import cli; cli.start(lambda: print(os.environ['{PROGRAM}']))"
    )
    script = tmp_path / "mine.py"
    script.write_text(code)
    assert command(str(script)).stdout.split() == [str(script)]
    done = command("-m", "mine", cwd=tmp_path, PYTHONPATH=f"{ROOT}/src:{ROOT}/preflight/src")
    assert done.stdout.split() == ["-m", "mine"]
