"""Stops a run that falls behind the other trials of a search."""

import math
from typing import Any

import lightning as L

from causal_lm import extras


class Pruning(L.Callback):
    """Report ``monitor`` of each evaluation to Optuna; stop, as pruned, where ``pruner`` says so.

    The first rank asks and all ranks stop; the last step, and a value that is not finite, are not
    reported. ``trial`` has the ``storage`` and ``study_name`` where the trial ``number`` is, so the
    run may be any process; the sweeper sets it, and without it nothing is reported.
    """

    stopped_because: str | None = None

    def __init__(self, pruner: Any, monitor: str = "val/loss", trial: Any = None) -> None:
        self.pruner, self.monitor, self.trial = pruner, monitor, trial

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        step, behind = trainer.global_step, False
        if not self.trial or trainer.state.fn != "fit" or step >= pl_module.total_steps:
            return
        value = float(trainer.callback_metrics[self.monitor])
        if trainer.is_global_zero and not trainer.sanity_checking and math.isfinite(value):
            behind = self._is_behind(step, value, **self.trial)
        if trainer.strategy.reduce_boolean_decision(behind, all=False):
            self.stopped_because = f"pruned with {self.monitor}={value:.4f} at step {step}"
            trainer.should_stop = True

    def _is_behind(self, step: int, value: float, number: int, **where: str) -> bool:
        optuna: Any = extras.load("optuna", "optuna")
        study = optuna.load_study(**where, pruner=self.pruner)
        trial = optuna.Trial(study, study.trials[number]._trial_id)
        trial.report(value, step)
        if behind := trial.should_prune():
            study.tell(number, state=optuna.trial.TrialState.PRUNED)
        return behind
