"""A sweeper on Optuna's ask and tell, in the package where Hydra looks for plugins.

Hydra imports this file at every start, so Optuna is imported only where the sweeper is used.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from hydra.core.override_parser import types
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from causal_lm import extras
from causal_lm.config import ConfigError
from causal_lm.report.files import write_text

PRUNING = "callbacks.pruning"  # the callback that reports to a trial


@dataclass
class OptunaSweeper(Sweeper):
    """Samples configurations with Optuna. The study is a file; the same command continues it.

    Trial N is the job N of the sweep, and fails where the job returns NaN. One that was cut short
    is launched again with its values and ``ckpt_path=auto``, so it continues from its checkpoint.
    ``configs/hparams_search/optuna.yaml`` says what the keys mean.
    """

    n_trials: int
    n_jobs: int = 1
    direction: str = "minimize"
    study_name: str = "search"
    storage: str | None = None  # None: in memory, without pruning
    sampler: Any = None
    params: Any = None

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """Raise ConfigError where a number is not valid, or Optuna is not installed."""
        for key in ("n_trials", "n_jobs"):
            if not isinstance(value := getattr(self, key), int) or value < 1:
                raise ConfigError(f"hydra.sweeper.{key} must be 1 or more, not {value!r}")
        try:
            self.optuna: Any = extras.load("optuna", "optuna")
        except ModuleNotFoundError as error:
            raise ConfigError(str(error)) from error
        self.optuna.logging.set_verbosity(self.optuna.logging.WARNING)
        self.cfg, self.parser = config, OverridesParser.create(hydra_context.config_loader)
        self.launch = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        ).launch  # fmt: skip

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Launch trials until the study has ``n_trials``; write and print the best one.

        Raises ConfigError, before a directory is made, where an axis or the sampler is not valid.
        """
        words = [*(f"{key}={axis}" for key, axis in (self.params or {}).items()), *arguments]
        overrides = {o.get_key_element(): o for o in self.parser.parse_overrides(words)}
        axes = {k: self._distribution(o) for k, o in overrides.items() if o.is_sweep_override()}
        self.fixed = [str(o.input_line) for key, o in overrides.items() if key not in axes]
        sampler = instantiate(self.sampler) if self.sampler else None
        folder = Path(self.cfg.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.cfg, folder / "multirun.yaml")
        try:
            with FileLock(folder / ".search.lock", timeout=0):
                returns = self._run(self._open(sampler), axes)
        except Timeout:
            raise ConfigError(f"another search is running in {folder}") from None
        for job in returns:
            _ = job.return_value  # raises the error of a job that raised
        return returns

    def _distribution(self, override: types.Override) -> Any:
        """What Optuna samples from for an axis. Raises ConfigError for bounds that it refuses."""
        axis: Any = override.value()
        make = self.optuna.distributions
        try:
            if override.is_interval_sweep() or override.is_range_sweep():
                is_range = override.is_range_sweep()  # 1, 4, 7 of range(1,9,3), as in a sweep
                values = sorted(axis.range()) if is_range else [axis.start, axis.end]
                is_int = all(isinstance(value, int) for value in values)
                kind = make.IntDistribution if is_int else make.FloatDistribution
                step = {"step": abs(axis.step)} if is_range else {}
                return kind(values[0], values[-1], log="log" in axis.tags, **step)
            # Numbers stay numbers; anything else is kept as it is written in an override.
            options = override.sweep_iterator(
                lambda x: x if isinstance(x, int | float) else types.Transformer.str(x)
            )
            return make.CategoricalDistribution(list(options))
        except ValueError as error:
            raise ConfigError(f"{override.input_line} is no axis of a search: {error}") from error

    def _open(self, sampler: Any) -> Any:
        """The study, made or read. Raises ValueError where the storage cannot be opened, or where
        its study has another direction."""
        with extras.reading(f"hydra.sweeper.storage={self.storage} cannot be used"):
            study = self.optuna.create_study(
                storage=self.storage, sampler=sampler, study_name=self.study_name,
                direction=self.direction, load_if_exists=True,
            )  # fmt: skip
            if (direction := study.direction.name.lower()) != self.direction:
                raise ValueError(f"{self.study_name} is there, with direction={direction}")
        if study.trials:
            study.sampler.reseed_rng()  # the seed would repeat its first values
        return study

    def _run(self, study: Any, axes: dict[str, Any]) -> list[JobReturn]:
        cut_short = [trial for trial in study.trials if trial.state.name == "RUNNING"]
        returns = []
        for i in range(0, len(cut_short), self.n_jobs):
            returns += self._launch(study, cut_short[i : i + self.n_jobs], ["ckpt_path=auto"])
        while (left := self.n_trials - len(study.trials)) > 0:
            changed = f"the axes of {self.study_name} have changed: set hydra.sweeper.study_name"
            with extras.reading(changed):
                trials = [study.ask(axes) for _ in range(min(left, self.n_jobs))]
            returns += self._launch(study, trials)
        states = [trial.state.name.lower() for trial in study.trials]
        print(f"\n{self.study_name}:", *(f"{states.count(s)} {s}" for s in sorted(set(states))))
        if "complete" in states:
            best = study.best_trial
            found = {"name": "optuna", "best_params": best.params, "best_value": best.value}
            path = Path(self.cfg.hydra.sweep.dir, "optimization_results.yaml")
            write_text(path, text := OmegaConf.to_yaml(found))
            print(f"{text}in {path}, of trial {best.number}")
        return returns

    def _launch(self, study: Any, trials: list[Any], more: Sequence[str] = ()) -> list[JobReturn]:
        """Run trials as the jobs of their numbers, and tell Optuna how they ended."""
        returns: list[JobReturn] = []
        failed = self.optuna.trial.TrialState.FAIL
        for _, group in groupby(enumerate(trials), lambda pair: pair[1].number - pair[0]):
            batch = [trial for _, trial in group]  # of consecutive numbers
            jobs = [[*self.fixed, *more, *self._overrides(trial)] for trial in batch]
            returns += self.launch(jobs, initial_job_idx=batch[0].number)
        for trial, job in zip(trials, returns, strict=True):
            value = job.return_value if job.status == JobStatus.COMPLETED else math.nan
            told = (None, failed) if math.isnan(value) else (value,)
            try:  # one that was pruned is finished
                study.tell(trial.number, *told, skip_if_finished=True)
            except RuntimeError:  # once told, a sampler that has tried all values stops the study
                self.n_trials = 0
        return returns

    def _overrides(self, trial: Any) -> Iterator[str]:
        yield from (f"{key}={value}" for key, value in trial.params.items())
        if self.storage and OmegaConf.select(self.cfg, PRUNING):
            quote = types.Quote.single
            where = {"storage": self.storage, "study_name": self.study_name}
            words = [f"{k}:{types.QuotedString(v, quote).with_quotes()}" for k, v in where.items()]
            yield f"{PRUNING}.trial={{{','.join(words)},number:{trial.number}}}"
