"""Stops a run that Optuna's pruner finds behind the other trials of a search."""

import math
from typing import Any

import lightning as L

from causal_lm import extras


class Pruning(L.Callback):
    """Report ``monitor`` at each evaluation of the fit to a trial, and stop where it falls behind.

    The trial is reached through its storage, so the run may be a process on another machine. The
    first rank asks, all ranks stop. Optuna is told that the trial is pruned; one at its last step,
    or with a value that is not finite, is not.

    Args:
        pruner: of Optuna; steps are optimizer steps.
        storage: URL of the study. ``study_name`` and ``trial`` (a number) are set by the sweeper;
            without a trial, nothing is reported.
    """

    stopped_because: str | None = None

    def __init__(
        self,
        pruner: Any,
        storage: str | None = None,
        study_name: str | None = None,
        trial: int | None = None,
        monitor: str = "val/loss",
    ) -> None:
        self.pruner, self.storage, self.study_name = pruner, storage, study_name
        self.trial, self.monitor = trial, monitor

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self.trial is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        step, behind = trainer.global_step, False
        value = float(trainer.callback_metrics[self.monitor])
        if trainer.is_global_zero and step < pl_module.total_steps and math.isfinite(value):
            behind = self._is_behind(step, value)
        if trainer.strategy.reduce_boolean_decision(behind, all=False):
            self.stopped_because = f"pruned at step {step}: {self.monitor}={value:.4f}"
            trainer.should_stop = True

    def _is_behind(self, step: int, value: float) -> bool:
        optuna: Any = extras.load("optuna", "optuna")
        study = optuna.load_study(
            study_name=self.study_name, storage=self.storage, pruner=self.pruner
        )
        trial = optuna.Trial(study, study.get_trials(deepcopy=False)[self.trial]._trial_id)
        trial.report(value, step)
        behind = trial.should_prune()
        if behind:
            study.tell(self.trial, state=optuna.trial.TrialState.PRUNED)
        return behind
