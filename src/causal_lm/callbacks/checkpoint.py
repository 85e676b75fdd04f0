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
from lightning.pytorch.callbacks import Checkpoint, WeightAveraging
from lightning.pytorch.utilities import rank_zero_only

from causal_lm.checkpoint_file import CONFIG, TOKENIZER, RefusedError, read_checkpoint
from causal_lm.config import leaves

log = logging.getLogger(__name__)

VALIDATION = "causal_lm_validation"  # key of a checkpoint: which documents its best score is of
SCORE = "best_model_score"  # key of an EvalCheckpoint's state

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
    every checkpoint, as plain data; and the trained weights, where averaged ones replace them."""

    def __init__(self, config: Any, tokenizer: dict[str, Any], validation: list[int]) -> None:
        self.config, self.tokenizer, self.validation = config, tokenizer, validation
        self.forget_best = False  # the checkpoint's best scores are of other documents, or files
        self.trained: dict[str, torch.Tensor] | None = None

    def on_train_end(self, trainer: Any, pl_module: L.LightningModule) -> None:
        if any(isinstance(c, WeightAveraging) for c in trainer.callbacks):
            self.trained = {name: w.clone() for name, w in pl_module.state_dict().items()}

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = self.trained or checkpoint["state_dict"]
        checkpoint |= {CONFIG: self.config, TOKENIZER: self.tokenizer, VALIDATION: self.validation}

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.forget_best:
            states = checkpoint["callbacks"]
            checkpoint["callbacks"] = {k: s for k, s in states.items() if SCORE not in s}

    def check_continues(self, path: str, may_be_complete: bool) -> int:
        """The step of a checkpoint that this run can continue; logs which keys have changed.

        ``config`` takes the values that are kept. Raises RefusedError where a key differs that must
        not, or no step is left to train (one need not be, where it ``may_be_complete``).
        """
        saved = read_checkpoint(path)
        before = dict(leaves(saved[CONFIG])) | dict(leaves(saved[TOKENIZER], "tokenizer."))
        here = dict(leaves(self.config)) | dict(leaves(self.tokenizer, "tokenizer."))
        found: dict[str, list[str]] = {FREE: [], KEPT: []}
        keys = (before.keys() | here.keys()) - {"ckpt_path", "paths.output_dir"}
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
        step, trainer = saved["global_step"], self.config["trainer"]
        for unit, done in (("step", step), ("epoch", saved.get("epoch", 0))):
            last = trainer.get(f"max_{unit}s", -1)
            if last != -1 and (done > last or (done == last and not may_be_complete)):
                todo = f"raise trainer.max_{unit}s={last} above it"
                raise RefusedError(f"{path} is at {unit} {done}: {todo}")
        self.config["optimizer"] = saved[CONFIG].get("optimizer", self.config["optimizer"])
        words = [f"{action}: {', '.join(names) or 'nothing'}" for action, names in found.items()]
        if saved.get(VALIDATION, self.validation) != self.validation:
            self.forget_best = True
            words.append("other validation documents: best scores are forgotten")
        rank_zero_only(log.info)("; ".join([f"continues {path} from step {step}", *words]))
        return step


class EvalCheckpoint(Checkpoint):
    """Writes a checkpoint after the evaluation with the lowest ``metric``, of equal ones the later;
    none if the metric is missing or not finite.

    ``stable.ckpt`` uses ``writing/repetition_spread``: the loss may still fall while the samples
    turn into loops, and their repetition rate rises. That rate is also constant before training and
    where every sample is a loop, so ``checkpoint/stable`` in the summary lists the rates.
    """

    def __init__(self, path: Path, metric: str) -> None:
        self.path, self.metric = path, metric
        self.lowest, self.step = math.inf, -1  # of the checkpoint

    @property
    def state_key(self) -> str:
        return self._generate_state_key(monitor=self.metric)

    def state_dict(self) -> dict[str, Any]:
        return {SCORE: self.lowest, "step": self.step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.lowest, self.step = float(state_dict[SCORE]), state_dict["step"]

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        value = _evaluated(trainer, self.metric)
        if math.isfinite(value) and value <= self.lowest and self.step != trainer.global_step:
            self.lowest, self.step = value, trainer.global_step
            trainer.save_checkpoint(self.path)


def _evaluated(trainer: L.Trainer, metric: str) -> float:
    """What an evaluation logged as ``metric``; NaN if nothing, or in Lightning's sanity check."""
    value = trainer.callback_metrics.get(metric, math.nan)
    return math.nan if trainer.sanity_checking else float(value)


class StepCheckpoint(Checkpoint):
    """Writes ``last.ckpt`` at each evaluation in the fit, and between two optimizer steps.

    :class:`causal_lm.callbacks.stop.StopAfterStep` calls it between steps, as all ranks must save
    together: ``every_minutes`` since the latest checkpoint or the start, and ``every_n_steps`` of
    the optimizer; None: never. An evaluation whose loss is not finite is not saved.
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
        self._record(trainer)  # also where the weights are not worth saving
        if trainer.state.fn == "fit" and math.isfinite(_evaluated(trainer, "val/loss")):
            self.save(trainer)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save the weights if the first non-finite step comes before the first evaluation."""
        is_evaluated = "val/loss" in trainer.callback_metrics
        if isinstance(exception, FloatingPointError) and not is_evaluated:
            trainer.save_checkpoint(self.path)

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


def figures(best: EvalCheckpoint, stable: EvalCheckpoint) -> dict[str, str]:
    """``checkpoint/best`` and ``stable`` of ``summary.json``: the step of each, and the reason."""
    found = {}
    if best.lowest < math.inf:
        found["checkpoint/best"] = f"step {best.step}: val/loss is lowest, {best.lowest:.4f}"
    if stable.lowest < math.inf:
        saved = torch.load(stable.path, mmap=True, weights_only=True)
        rates = ", ".join(f"{rate:.4f}" for rate in saved["callbacks"]["SampleMonitor"]["rates"])
        reason = "the spread of repetition_4 is lowest"
        found["checkpoint/stable"] = f"step {stable.step}: {reason}, {rates}"
    return found
