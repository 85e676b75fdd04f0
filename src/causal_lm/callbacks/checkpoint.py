"""What a checkpoint has besides the weights, and which checkpoints are kept."""

import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from causal_lm.checkpoint_file import CONFIG, TOKENIZER, RefusedError, read_checkpoint
from causal_lm.config import leaves, new_name

log = logging.getLogger(__name__)

# Beginnings of keys, for a run that is continued.
MUST_NOT_CHANGE = ("model.", "tokenizer.", "optimizer._target_")
FROM_CHECKPOINT = ("optimizer.",)  # keep the saved values, as the optimizer's state has them


class CheckpointMetadata(L.Callback):
    """Write the configuration and the tokenizer into every checkpoint, as plain data."""

    def __init__(self, config: Any, tokenizer: dict[str, Any]) -> None:
        self.config, self.tokenizer = config, tokenizer

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint |= {CONFIG: self.config, TOKENIZER: self.tokenizer}

    def check_continues(self, path: str) -> int:
        """The step of a checkpoint that this run can continue; logs which keys have changed.

        Raises:
            RefusedError: a key that must not differ does (:data:`MUST_NOT_CHANGE`).
        """
        saved = read_checkpoint(path)
        before = {new_name(key): value for key, value in leaves(saved[CONFIG])}
        before |= leaves(saved[TOKENIZER], "tokenizer.")
        here = dict(leaves(self.config)) | dict(leaves(self.tokenizer, "tokenizer."))
        changed, kept = [], []
        for key in sorted((before.keys() | here.keys()) - {"ckpt_path"}):
            if before.get(key) == here.get(key):
                continue
            # At most 100 characters, as a tokenizer's JSON can have megabytes.
            old, new = (f"{values.get(key)!s:.100}" for values in (before, here))
            if key.startswith(MUST_NOT_CHANGE):
                written = f"{path} was written with {key}={old}, but this run has {new}"
                raise RefusedError(f"{written}: set it back, or remove ckpt_path")
            if key.startswith(FROM_CHECKPOINT):
                kept.append(f"{key}={old}")
            else:
                changed.append(f"{key} {old} -> {new}")
        changes, constants = (", ".join(keys) or "nothing" for keys in (changed, kept))
        continues = f"continues {path} from step {saved['global_step']}; changed: {changes}"
        rank_zero_only(log.info)(f"{continues}; kept from the checkpoint: {constants}")
        return saved["global_step"]


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
