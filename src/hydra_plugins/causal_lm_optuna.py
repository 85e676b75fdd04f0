"""A sweeper on Optuna's ask and tell; in the package where Hydra looks for its plugins.

Hydra imports this file whenever it starts, so Optuna is imported only where the sweeper is used.
"""

import logging
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import (
    IntervalSweep,
    Override,
    Quote,
    QuotedString,
    RangeSweep,
    Transformer,
)
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from causal_lm import extras
from causal_lm.config import ConfigError
from causal_lm.report.files import write_text
from causal_lm.schema import integer, one_of

log = logging.getLogger(__name__)

RULES = {"n_trials": integer(1), "n_jobs": integer(1), "direction": one_of("minimize", "maximize")}
LOCK = ".optuna.lock"  # in the directory of a sweep, held while it runs
SWEEP_DIR = "sweep_dir"  # attribute of a trial: where that lock is
PRUNING = "callbacks.pruning"  # the callback that reports to a trial


class OptunaSweeper(Sweeper):
    """Samples configurations with Optuna. The study is a file; the same command continues it.

    Trial N is the job N of the sweep. A trial whose sweep was killed is launched again with its
    values and ``ckpt_path=auto``, so it continues from its checkpoint in the same directory.

    Args:
        params: key -> axis in Hydra's syntax of sweeps; an axis of the command line comes before.
        n_trials: trials of the study, those of earlier sweeps included.
        n_jobs: trials that the launcher gets at once.
        direction: ``minimize`` or ``maximize`` what a job returns; NaN is a failed trial.
        storage: URL of the study, as Optuna takes it; None: in memory, without pruning.
        sampler: node with the ``_target_`` of a sampler; None: the default of Optuna.
    """

    def __init__(
        self,
        params: DictConfig | None,
        n_trials: int,
        n_jobs: int = 1,
        direction: str = "minimize",
        study_name: str = "search",
        storage: str | None = None,
        sampler: DictConfig | None = None,
    ) -> None:
        self.params, self.n_trials, self.n_jobs = params or {}, n_trials, n_jobs
        self.direction, self.study_name = direction, study_name
        self.storage, self.sampler = storage, sampler

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Raise ConfigError where a key is not valid, or Optuna is not installed."""
        for name, rule in RULES.items():
            if not rule.accepts(value := getattr(self, name)):
                raise ConfigError(
                    f"hydra.sweeper.{name} must be {rule.description}, not {value!r}"
                )
        try:
            self.optuna: Any = extras.load("optuna", "optuna")
        except ModuleNotFoundError as error:
            raise ConfigError(str(error)) from error
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        self.hydra_context, self.config = hydra_context, config
        self.folder = Path(config.hydra.sweep.dir).absolute()
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Launch trials until the study has ``n_trials``; write and print the best one.

        Raises ConfigError, before a directory is made, where an axis or the sampler is not valid.
        """
        words = [*(f"{key}={axis}" for key, axis in self.params.items()), *arguments]
        parser = OverridesParser.create(self.hydra_context.config_loader)
        overrides = {o.get_key_element(): o for o in parser.parse_overrides(words)}
        axes = {k: self._distribution(o) for k, o in overrides.items() if o.is_sweep_override()}
        self.fixed = [o.input_line or "" for k, o in overrides.items() if k not in axes]
        sampler = instantiate(self.sampler) if self.sampler else None
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, self.folder / "multirun.yaml")
        try:
            with FileLock(self.folder / LOCK, timeout=0):
                return self._run(self._open(sampler), axes)
        except Timeout:
            raise ConfigError(f"another sweep is running in {self.folder}") from None

    def _distribution(self, override: Override) -> Any:
        """What Optuna samples from for one axis. Raises ConfigError for bounds that it refuses."""
        axis, make = override.value(), self.optuna.distributions
        try:
            if isinstance(axis, IntervalSweep | RangeSweep):
                low, options = axis.start, {"log": "log" in axis.tags}
                high = axis.end if isinstance(axis, IntervalSweep) else list(axis.range())[-1]
                if isinstance(axis, RangeSweep):
                    low, high = sorted((axis.start, high))
                    options["step"] = abs(axis.step)
                integers = all(isinstance(bound, int) for bound in (low, high))
                kind = make.IntDistribution if integers else make.FloatDistribution
                return kind(low, high, **options)
            # Numbers stay numbers; anything else is kept as it is written in an override.
            written = override.sweep_iterator(
                lambda x: x if isinstance(x, int | float) else Transformer.str(x)
            )
            return make.CategoricalDistribution(list(written))
        except (ValueError, IndexError) as error:  # IndexError: an empty range
            raise ConfigError(f"{override.input_line} is no axis of a search: {error}") from error

    def _open(self, sampler: Any) -> Any:
        """The study, made or read. Raises ValueError where the storage cannot be opened, or where
        its study has another direction."""
        with extras.reading(f"hydra.sweeper.storage={self.storage} cannot be used"):
            study = self.optuna.create_study(
                storage=self.storage, sampler=sampler, study_name=self.study_name,
                direction=self.direction, load_if_exists=True,
            )  # fmt: skip
            if (found := study.direction.name.lower()) != self.direction:
                raise ValueError(f"its study {self.study_name} is one to {found}")
            if study.get_trials(deepcopy=False):
                study.sampler.reseed_rng()  # a seed would repeat the first values
        return study

    def _run(self, study: Any, axes: dict[str, Any]) -> list[JobReturn]:
        states = self.optuna.trial.TrialState
        running = study.get_trials(states=(states.RUNNING,))
        killed = [trial for trial in running if self._is_killed(trial)]
        returns = []
        for i in range(0, len(killed), self.n_jobs):
            returns += self._launch(study, killed[i : i + self.n_jobs], ["ckpt_path=auto"])
        while (left := self.n_trials - self._count(study)) > 0:
            trials = []
            for _ in range(min(left, self.n_jobs)):
                try:
                    trials.append(study.ask(axes))
                except ValueError as error:  # the values of a choice have changed
                    todo = "set another hydra.sweeper.study_name"
                    raise ConfigError(f"study {self.study_name}: {error}: {todo}") from error
                trials[-1].set_user_attr(SWEEP_DIR, str(self.folder))
            returns += self._launch(study, trials)
        self._report(study)
        for result in returns:
            _ = result.return_value  # raises the error of a job that raised
        return returns

    def _count(self, study: Any) -> int:
        """The trials of the study, but for those that are still to be asked for."""
        waiting = self.optuna.trial.TrialState.WAITING
        return sum(trial.state != waiting for trial in study.get_trials(deepcopy=False))

    def _is_killed(self, trial: Any) -> bool:
        """Whether the sweep of a running trial has ended, as its lock is free."""
        folder = Path(trial.user_attrs.get(SWEEP_DIR, "/nowhere"))
        if folder == self.folder or not folder.is_dir():
            return folder == self.folder
        try:
            with FileLock(folder / LOCK, timeout=0):
                return True
        except Timeout:
            return False

    def _launch(self, study: Any, trials: list[Any], more: Sequence[str] = ()) -> list[JobReturn]:
        """Run trials as the jobs of their numbers, and tell Optuna how they ended."""
        returns: list[JobReturn] = []
        for _, group in groupby(enumerate(trials), lambda pair: pair[1].number - pair[0]):
            batch = [trial for _, trial in group]
            jobs = [[*self.fixed, *more, *self._overrides(trial)] for trial in batch]
            self.validate_batch_is_legal(jobs)
            returns += self.launcher.launch(jobs, initial_job_idx=batch[0].number)
        states = self.optuna.trial.TrialState
        for trial, result in zip(trials, returns, strict=True):
            value = result.return_value if result.status == JobStatus.COMPLETED else None
            failed = value is None or math.isnan(value)
            told = (None, states.FAIL) if failed else (value, states.COMPLETE)
            study.tell(trial.number, *told, skip_if_finished=True)  # pruned: told by the callback
        return returns

    def _overrides(self, trial: Any) -> Iterator[str]:
        yield from (f"{key}={value}" for key, value in trial.params.items())
        if self.storage and OmegaConf.select(self.config, PRUNING):
            for key, value in (("storage", self.storage), ("study_name", self.study_name)):
                yield f"{PRUNING}.{key}={QuotedString(value, Quote.single).with_quotes()}"
            yield f"{PRUNING}.trial={trial.number}"

    def _report(self, study: Any) -> None:
        """Write ``optimization_results.yaml`` and print the best trial, if one was completed."""
        trials = study.get_trials(deepcopy=False)
        states = [trial.state.name.lower() for trial in trials]
        counts = ", ".join(f"{states.count(state)} {state}" for state in sorted(set(states)))
        print(f"\nstudy {self.study_name}: {counts}")
        if "complete" in states:
            best = study.best_trial
            found = {"name": "optuna", "best_params": best.params, "best_value": best.value}
            write_text(self.folder / "optimization_results.yaml", OmegaConf.to_yaml(found))
            values = " ".join(f"{key}={value}" for key, value in best.params.items())
            print(f"best: trial {best.number}, {best.value:.4f}, with {values}")
