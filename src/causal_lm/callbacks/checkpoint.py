"""What a checkpoint holds beside the weights, and which checkpoints are kept."""

import logging
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from causal_lm.checkpoint_file import CONFIG, TOKENIZER, RefusedError, read
from causal_lm.config import leaves, new_name

log = logging.getLogger(__name__)

FIXED = ("model.", "tokenizer.", "optimizer._target_")
"""Beginnings of keys that must not change when a run is continued."""
KEPT = ("optimizer.",)
"""Beginnings of keys whose values come from the checkpoint, as the optimizer's state has them."""


class CheckpointMetadata(L.Callback):
    """Write the configuration and the tokenizer into every checkpoint, as plain data."""

    def __init__(self, config: Any, tokenizer: dict[str, Any]) -> None:
        self.config, self.tokenizer = config, tokenizer

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint[CONFIG] = self.config
        checkpoint[TOKENIZER] = self.tokenizer

    def check_continues(self, path: str) -> int:
        """The step of a checkpoint that this run can continue; logs which keys have changed.

        Raises:
            RefusedError: a key that must not differ does (:data:`FIXED`).
        """
        saved = read(path)
        before = {new_name(key): value for key, value in leaves(saved[CONFIG])}
        before |= leaves(saved[TOKENIZER], "tokenizer.")
        here = dict(leaves(self.config)) | dict(leaves(self.tokenizer, "tokenizer."))
        changed, kept = [], []
        for key in sorted((before.keys() | here.keys()) - {"ckpt_path"}):
            if before.get(key) == here.get(key):
                continue
            # At most 100 characters, as a tokenizer's JSON can have megabytes.
            old, new = (f"{values.get(key)!s:.100}" for values in (before, here))
            if key.startswith(FIXED):
                written = f"{path} was written with {key}={old}, but this run has {new}"
                raise RefusedError(f"{written}: set it back, or remove ckpt_path")
            if key.startswith(KEPT):
                kept.append(f"{key}={old}")
            else:
                changed.append(f"{key} {old} -> {new}")
        rank_zero_only(log.info)(
            f"continues {path} from step {saved['global_step']}; "
            f"changed: {', '.join(changed) or 'nothing'}; "
            f"kept from the checkpoint: {', '.join(kept) or 'nothing'}"
        )
        return saved["global_step"]


class EvalCheckpoint(ModelCheckpoint):
    """Writes ``{name}.ckpt`` at the evaluation with the lowest ``figure``, or at the latest one.

    Of two equal figures the later evaluation is kept. The file is written when the evaluation is
    over, with what the callbacks logged; one whose figure is missing or not finite writes nothing.

    ``stable`` goes by ``writing/repetition_spread``: the loss may still fall while the samples turn
    into loops, and their repetition rate rises. That rate does not change before anything is
    learned either, nor where all samples are loops: ``checkpoint/stable`` has the rates.

    Args:
        figure: a logged metric, lower is better.
        continued: the files in ``folder`` are of the run that this one continues.
        latest: write at every evaluation.
    """

    def __init__(
        self, folder: Path, name: str, figure: str, *, continued: bool, latest: bool = False
    ) -> None:
        self.folder, self.figure, self.continued = folder, figure, continued
        monitor = None if latest else figure
        super().__init__(folder, filename=name, monitor=monitor, enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the best score in a directory that was moved, where Lightning would drop it."""
        if self.continued:
            paths = dict.fromkeys(("best_model_path", "last_model_path", "kth_best_model_path"), "")
            state_dict = state_dict | paths | {"dirpath": self.dirpath, "best_k_models": {}}
        super().load_state_dict(state_dict)

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Save the current weights if a step was refused before the first evaluation."""
        never = "val/loss" not in trainer.callback_metrics
        if self.monitor is None and never and isinstance(exception, FloatingPointError):
            trainer.save_checkpoint(self.folder / f"{self.filename}.ckpt")

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if math.isfinite(trainer.callback_metrics.get(self.figure, math.nan)):
            super().on_validation_end(trainer, pl_module)

    def check_monitor_top_k(self, trainer: L.Trainer, current: Any = None) -> bool:
        return self.best_model_score is None or bool(current <= self.best_model_score)


def figures(folder: Path, lowest: float, has_stable: bool) -> dict[str, str]:
    """``checkpoint/*`` of ``summary.json``: the step of each checkpoint, and why it was kept."""
    reasons = {"best": f"val/loss is lowest, {lowest:.4f}", "last": "where the run ended"}
    if has_stable:
        reasons["stable"] = "the last three repetition rates vary least, "
    figures = {}
    for name, reason in reasons.items():
        saved = torch.load(folder / f"{name}.ckpt", mmap=True, weights_only=True)
        if name == "stable":
            rates = saved["callbacks"]["SampleMonitor"]["rates"]
            reason += ", ".join(f"{rate:.4f}" for rate in rates)
        figures[f"checkpoint/{name}"] = f"step {saved['global_step']}: {reason}"
    if has_stable:  # under the old name too, for one version
        figures["checkpoint/steady"] = figures["checkpoint/stable"]
    return figures
