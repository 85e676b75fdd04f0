"""What a checkpoint carries, which ones are kept, and which may be continued."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

CONFIG, TOKENIZER = "causal_lm_config", "causal_lm_tokenizer"


class CheckpointMetadata(L.Callback):
    """Writes the configuration and the tokenizer into every checkpoint, as plain data."""

    def __init__(self, config: Any, tokenizer: dict[str, Any]) -> None:
        self.config, self.tokenizer = config, tokenizer

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CONFIG] = self.config
        checkpoint[TOKENIZER] = self.tokenizer

    def check_continues(self, path: str) -> int:
        """The step of a checkpoint, unless its weights would mean something else here.

        Raises:
            RefusedError: naming the first key of model or tokenizer that differs.
        """
        saved = read(path)
        for part, before, here in (
            ("model", saved[CONFIG]["model"], self.config["model"]),
            ("tokenizer", saved[TOKENIZER], self.tokenizer),
        ):
            for key in sorted(before.keys() | here.keys()):
                if before.get(key) != here.get(key):
                    raise RefusedError(
                        f"{path} was written with {part}.{key}={_short(before.get(key))}, but this "
                        f"run has {_short(here.get(key))}: set it back, or start without ckpt_path"
                    )
        return saved["global_step"]


class RefusedError(ValueError):
    """A run cannot go on from there; what an earlier run left is not touched."""


def _short(value: Any) -> str:
    """A tokenizer's JSON can be megabytes long."""
    text = str(value)
    return text if len(text) < 100 else f"{text[:100]}…"


class EvalCheckpoint(ModelCheckpoint):
    """``best.ckpt`` or ``steady.ckpt``, of the evaluation with the lowest ``figure`` (of two equal
    ones the later), or ``last.ckpt``, of the latest.

    It is written when the evaluation is over, with what the callbacks made of it. An evaluation
    whose figure is missing or not finite leaves the file as it was.

    ``steady`` goes by ``writing/repetition_spread``: a loss may go on falling while the writing
    turns into loops, but where the rate stands still, the writing is what it was. It does so before
    anything is learned, too, and where all is loops: ``checkpoint/steady`` names the rates.

    ``goes_on``: the files in ``folder`` are of the run that is continued.
    """

    def __init__(
        self, folder: Path, name: str, figure: str, *, goes_on: bool, latest: bool = False
    ) -> None:
        self.folder, self.figure, self.goes_on = folder, figure, goes_on
        monitor = None if latest else figure
        super().__init__(folder, filename=name, monitor=monitor, enable_version_counter=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """A directory that was moved or copied is as good: Lightning would forget the score."""
        if self.goes_on:
            paths = dict.fromkeys(("best_model_path", "last_model_path", "kth_best_model_path"), "")
            state_dict = state_dict | paths | {"dirpath": self.dirpath, "best_k_models": {}}
        super().load_state_dict(state_dict)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """A step was refused before any evaluation was due: the weights in hand are the last."""
        never = "val/loss" not in trainer.callback_metrics
        if self.monitor is None and never and isinstance(exception, FloatingPointError):
            trainer.save_checkpoint(self.folder / f"{self.filename}.ckpt")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if math.isfinite(trainer.callback_metrics.get(self.figure, math.nan)):
            super().on_validation_end(trainer, pl_module)

    def check_monitor_top_k(self, trainer: L.Trainer, current: Any = None) -> bool:
        return self.best_model_score is None or bool(current <= self.best_model_score)


def figures(folder: Path, lowest: float, has_steady: bool) -> dict[str, str]:
    """``checkpoint/*`` of ``summary.json``: of which step each one is, and why it was kept."""
    reasons = {"best": f"val/loss is lowest, {lowest:.4f}", "last": "where the run ended"}
    if has_steady:
        reasons["steady"] = "the last three repetition rates vary least, "
    figures = {}
    for name, reason in reasons.items():
        saved = torch.load(folder / f"{name}.ckpt", mmap=True, weights_only=True)
        if name == "steady":
            reason += ", ".join(
                f"{rate:.4f}" for rate in saved["callbacks"]["SampleMonitor"]["rates"]
            )
        figures[f"checkpoint/{name}"] = f"step {saved['global_step']}: {reason}"
    return figures


def read(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of this project onto the CPU, tensors and plain data only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no checkpoint of this project.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint: it is damaged or of another kind"
        ) from error
    if not isinstance(checkpoint, dict) or CONFIG not in checkpoint:
        raise ValueError(f"{path} carries no configuration: it was not written by this project")
    return checkpoint
