"""What a checkpoint has besides the weights, and which checkpoints are kept."""

import logging
import math
import re
import time
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from causal_lm.checkpoint_file import CONFIG, TOKENIZER, RefusedError, read_checkpoint
from causal_lm.config import leaves, new_name

log = logging.getLogger(__name__)

VALIDATION = "causal_lm_validation"  # key of a checkpoint: which documents its best score is of

REFUSED, KEPT, FREE = "refused", "kept from the checkpoint", "changed"
CONTINUED_KEYS = {  # the first pattern (of ``fnmatch``) that matches a key decides
    "seed": REFUSED, "data.seed": REFUSED, "data.shuffle": REFUSED,  # the order of documents
    "optimizer._*": REFUSED, "optimizer.*.*": REFUSED, "optimizer.*": KEPT,
    "model.dropout": FREE, "model.checkpoint_activations": FREE,
    "model.*": REFUSED, "tokenizer.*": REFUSED,  # the weights
    "*": FREE,  # data, batch size, layout, ranks, loss, schedule, trainer, samples, …
}  # fmt: skip
"""What a continued run does with a value that is not the checkpoint's: refuse it, use the
checkpoint's, or use the new one. Other training documents begin a new epoch, other validation
documents a new search for the best checkpoint; a schedule goes on at the step it has reached.
"""


class CheckpointMetadata(L.Callback):
    """Write the configuration, the tokenizer and a fingerprint of the validation documents into
    every checkpoint, as plain data."""

    def __init__(self, config: Any, tokenizer: dict[str, Any], validation: list[int]) -> None:
        self.config, self.tokenizer, self.validation = config, tokenizer, validation
        self.forget_best = False

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {CONFIG: self.config, TOKENIZER: self.tokenizer, VALIDATION: self.validation}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        for state in checkpoint["callbacks"].values():
            if self.forget_best and "best_model_score" in state:
                state["best_model_score"] = None

    def check_continues(self, path: str, may_be_complete: bool) -> int:
        """The step of a checkpoint that this run can continue; logs which keys have changed.

        ``config`` takes the values that are kept. ``may_be_complete``: no step need be left.

        Raises:
            RefusedError: a key differs that must not, or no step is left to train.
        """
        saved = read_checkpoint(path)
        before = {new_name(key): value for key, value in leaves(saved[CONFIG])}
        before |= leaves(saved[TOKENIZER], "tokenizer.")
        here = dict(leaves(self.config)) | dict(leaves(self.tokenizer, "tokenizer."))
        found: dict[str, list[str]] = {FREE: [], KEPT: []}
        keys = (before.keys() | here.keys()) - {"ckpt_path"}
        for key in sorted(keys, key=lambda key: (key.count("."), key)):  # seed before data.seed
            if before.get(key) == here.get(key):
                continue
            action = next(act for pattern, act in CONTINUED_KEYS.items() if fnmatch(key, pattern))
            # At most 100 characters, as a tokenizer's JSON can have megabytes.
            old, new = (f"{values.get(key)!s:.100}" for values in (before, here))
            # Hydra would resolve or build what a kept value says.
            if action == REFUSED or (action == KEPT and re.search("[${]", str(before.get(key)))):
                written = f"{path} was written with {key}={old}, but this run has {new}"
                raise RefusedError(f"{written}: set it back, or remove ckpt_path")
            found[action].append(f"{key}={old}" if action == KEPT else f"{key} {old} -> {new}")
        step, last = saved["global_step"], self.config["trainer"]["max_steps"]
        if step > last or (step == last and not may_be_complete):
            raise RefusedError(f"{path} is at step {step}: raise trainer.max_steps={last} above it")
        self.config["optimizer"] = saved[CONFIG].get("optimizer", self.config["optimizer"])
        self.forget_best = saved.get(VALIDATION, self.validation) != self.validation
        words = [f"{action}: {', '.join(names) or 'nothing'}" for action, names in found.items()]
        words += ["other validation documents: best scores are forgotten"] * self.forget_best
        rank_zero_only(log.info)("; ".join([f"continues {path} from step {step}", *words]))
        return step


class EvalCheckpoint(ModelCheckpoint):
    """Writes ``{name}.ckpt`` at the evaluation with the lowest ``metric``, or at the latest one.

    Of two equal ones the later is kept. The file is written after the evaluation, with what the
    callbacks logged, and not written if the metric is missing or not finite.

    ``stable`` uses ``writing/repetition_spread``: the loss may still fall while the samples turn
    into loops, and their repetition rate rises. That rate is also constant before training and
    where every sample is a loop, so ``checkpoint/stable`` in the summary lists the rates.

    Args:
        metric: a logged metric, lower is better.
        continued: this run continues the one whose files are in ``folder``.
        latest: write at every evaluation.
    """

    def __init__(
        self, folder: Path, name: str, metric: str, *, continued: bool, latest: bool = False
    ) -> None:
        self.folder, self.metric, self.continued = folder, metric, continued
        monitor = None if latest else metric
        super().__init__(folder, filename=name, monitor=monitor, enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the best score if the directory was moved; Lightning would drop it."""
        if self.continued:
            paths = dict.fromkeys(("best_model_path", "last_model_path", "kth_best_model_path"), "")
            state_dict = state_dict | paths | {"dirpath": self.dirpath, "best_k_models": {}}
        super().load_state_dict(state_dict)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save the weights if the first non-finite step comes before the first evaluation."""
        never = "val/loss" not in trainer.callback_metrics
        if self.monitor is None and never and isinstance(exception, FloatingPointError):
            trainer.save_checkpoint(self.folder / f"{self.filename}.ckpt")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if math.isfinite(trainer.callback_metrics.get(self.metric, math.nan)):
            super().on_validation_end(trainer, pl_module)

    def check_monitor_top_k(self, trainer: L.Trainer, current: Any = None) -> bool:
        return self.best_model_score is None or bool(current <= self.best_model_score)


class StepCheckpoint(L.Callback):
    """Writes ``last.ckpt`` between two optimizer steps, besides those of evaluations.

    :class:`causal_lm.callbacks.stop.StopAfterStep` calls it, as all ranks must save together.

    Args:
        every_minutes: from the latest checkpoint on, or from the start; None: never.
        every_n_steps: optimizer steps; None: never.
    """

    def __init__(
        self, path: Path, every_minutes: float | None = 10, every_n_steps: int | None = None
    ) -> None:
        self.path, self.every_minutes, self.every_n_steps = path, every_minutes, every_n_steps

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        self._record(trainer)
        limits = {"minutes of training": self.every_minutes, "steps": self.every_n_steps}
        costs = [f"{limit} {unit}" for unit, limit in limits.items() if limit]
        most = f"at most {' or '.join(costs)}, or " if costs else ""
        rank_zero_only(log.info)(f"a kill costs {most}what came since the last evaluation")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        self._record(trainer)  # an evaluation writes its own checkpoint

    def _record(self, trainer: L.Trainer) -> None:
        self.step, self.time = trainer.global_step, time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether to save now, after so many optimizer steps."""
        by_time = self.every_minutes and time.monotonic() - self.time >= 60 * self.every_minutes
        by_step = self.every_n_steps and step % self.every_n_steps == 0
        return step != self.step and bool(by_time or by_step)

    def save(self, trainer: L.Trainer) -> None:
        """Save; all ranks must call it. A batch that was fetched and not begun is not counted. The
        loggers are flushed, so that a kill loses no row of a saved step."""
        for logger in trainer.loggers:
            logger.save()
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress
        before = progress.state_dict()
        progress.is_last_batch &= progress.current.ready == progress.current.started
        for counters in (progress.total, progress.current):
            counters.ready = counters.started
        trainer.save_checkpoint(self.path)
        progress.load_state_dict(before)
        self._record(trainer)


def figures(folder: Path, lowest: float, has_stable: bool) -> dict[str, str]:
    """``checkpoint/*`` of ``summary.json``: the step of each checkpoint, and why it was kept."""
    names = [*(["best"] if lowest < math.inf else []), "last", *(["stable"] if has_stable else [])]
    files = {n: torch.load(folder / f"{n}.ckpt", mmap=True, weights_only=True) for n in names}
    reasons = {"best": f"val/loss is lowest, {lowest:.4f}", "last": "the end of the run"}
    if has_stable:
        rates = (f"{rate:.4f}" for rate in files["stable"]["callbacks"]["SampleMonitor"]["rates"])
        reasons["stable"] = f"the spread of repetition_4 is lowest, {', '.join(rates)}"
    found = {f"checkpoint/{n}": f"step {files[n]['global_step']}: {reasons[n]}" for n in names}
    return found | ({"checkpoint/steady": found["checkpoint/stable"]} if has_stable else {})
