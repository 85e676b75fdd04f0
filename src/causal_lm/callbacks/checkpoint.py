"""What a checkpoint holds beside the weights, and which checkpoints are kept."""

import logging
import math
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only

from causal_lm.checkpoint_file import CONFIG, TOKENIZER, read
from causal_lm.config import leaves
from causal_lm.renamed import new_name

log = logging.getLogger(__name__)

__all__ = ["CONFIG", "TOKENIZER", "CheckpointMetadata", "EvalCheckpoint", "RefusedError", "read"]


FIXED = ("model.*", "tokenizer.*", "optimizer._target_")
"""Keys that must not change when a run is continued."""
KEPT = ("optimizer.*",)
"""Keys whose values are those of the checkpoint, as they are part of the optimizer's state."""
UNREPORTED = ("ckpt_path",)


class CheckpointMetadata(L.Callback):
    """Write the configuration and the tokenizer into every checkpoint, as plain data."""

    def __init__(self, config: Any, tokenizer: dict[str, Any]) -> None:
        self.config, self.tokenizer = config, tokenizer

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CONFIG] = self.config
        checkpoint[TOKENIZER] = self.tokenizer

    def check_continues(self, path: str) -> int:
        """The step of a checkpoint that this run can continue; logs which keys have changed.

        Raises:
            RefusedError: naming the first key that must not differ (:data:`FIXED`).
        """
        saved = read(path)
        before = {new_name(key): value for key, value in leaves(saved[CONFIG])}
        before |= leaves(saved[TOKENIZER], "tokenizer.")
        here = dict(leaves(self.config)) | dict(leaves(self.tokenizer, "tokenizer."))
        differ = [k for k in sorted(before.keys() | here.keys()) if before.get(k) != here.get(k)]
        for key in differ:
            if _matches(key, FIXED):
                raise RefusedError(
                    f"{path} was written with {key}={_short(before.get(key))}, but this run has "
                    f"{_short(here.get(key))}: set it back, or remove ckpt_path"
                )
        changed = ", ".join(
            f"{key} {_short(before.get(key))} -> {_short(here.get(key))}"
            for key in differ
            if not _matches(key, KEPT + UNREPORTED)
        )
        kept = ", ".join(f"{k}={_short(before.get(k))}" for k in differ if _matches(k, KEPT))
        rank_zero_only(log.info)(
            f"continues {path} from step {saved['global_step']}; changed: {changed or 'nothing'}; "
            f"kept from the checkpoint: {kept or 'nothing'}"
        )
        return saved["global_step"]


def _matches(key: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(key, pattern) for pattern in patterns)


class RefusedError(ValueError):
    """A run cannot continue from this checkpoint; no file of the earlier run is changed."""


def _short(value: Any) -> str:
    """A value as text of at most 100 characters (a tokenizer's JSON can have megabytes)."""
    text = str(value)
    return text if len(text) < 100 else f"{text[:100]}…"


class EvalCheckpoint(ModelCheckpoint):
    """``best.ckpt`` or ``stable.ckpt``, of the evaluation with the lowest ``figure``, or
    ``last.ckpt``, of the latest evaluation.

    Of two equal figures the later evaluation is kept. The file is written when the evaluation is
    over, with what the callbacks logged; one whose figure is missing or not finite writes nothing.

    ``stable`` goes by ``writing/repetition_spread``: the loss may still fall while the samples turn
    into loops, but a repetition rate that does not change means samples that do not. The rate does
    not change before anything is learned either, nor where all samples are loops:
    ``checkpoint/stable`` in the summary has the rates.

    Args:
        folder: takes ``{name}.ckpt``.
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

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save the current weights if a step was refused before the first evaluation."""
        never = "val/loss" not in trainer.callback_metrics
        if self.monitor is None and never and isinstance(exception, FloatingPointError):
            trainer.save_checkpoint(self.folder / f"{self.filename}.ckpt")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if math.isfinite(trainer.callback_metrics.get(self.figure, math.nan)):
            super().on_validation_end(trainer, pl_module)

    def check_monitor_top_k(self, trainer: L.Trainer, current: Any = None) -> bool:
        return self.best_model_score is None or bool(current <= self.best_model_score)


def figures(folder: Path, lowest: float, has_stable: bool) -> dict[str, str]:
    """``checkpoint/*`` of ``summary.json``: the step of each checkpoint, and why it was kept.

    ``checkpoint/steady`` is the old name of ``checkpoint/stable``, kept for one version.
    """
    reasons = {"best": f"val/loss is lowest, {lowest:.4f}", "last": "where the run ended"}
    if has_stable:
        reasons["stable"] = "the last three repetition rates vary least, "
    figures = {}
    for name, reason in reasons.items():
        saved = torch.load(folder / f"{name}.ckpt", mmap=True, weights_only=True)
        if name == "stable":
            reason += ", ".join(
                f"{rate:.4f}" for rate in saved["callbacks"]["SampleMonitor"]["rates"]
            )
        figures[f"checkpoint/{name}"] = f"step {saved['global_step']}: {reason}"
    if has_stable:
        figures["checkpoint/steady"] = figures["checkpoint/stable"]
    return figures
