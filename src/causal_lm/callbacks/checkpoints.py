"""What a checkpoint carries, which ones are kept, and which may be continued."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

CONFIG, TOKENIZER = "causal_lm_config", "causal_lm_tokenizer"


class Provenance(L.Callback):
    """Writes the configuration and the tokenizer into every checkpoint, as plain data."""

    def __init__(self, config: Any, tokenizer: dict[str, Any]) -> None:
        self.config, self.tokenizer = config, tokenizer

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[CONFIG] = self.config
        checkpoint[TOKENIZER] = self.tokenizer

    def check_continues(self, path: str) -> None:
        """Refuse to go on from weights that would mean something else here.

        Raises:
            ValueError: naming the first key of model or tokenizer that differs.
        """
        saved = read(path)
        for part, before, here in (
            ("model", saved[CONFIG]["model"], self.config["model"]),
            ("tokenizer", saved[TOKENIZER], self.tokenizer),
        ):
            for key in sorted(before.keys() | here.keys()):
                if before.get(key) != here.get(key):
                    raise ValueError(
                        f"{path} was written with {part}.{key}={_short(before.get(key))}, but this "
                        f"run has {_short(here.get(key))}: set it back, or start without ckpt_path"
                    )


def _short(value: Any) -> str:
    """A tokenizer's JSON can be megabytes long."""
    text = str(value)
    return text if len(text) < 100 else f"{text[:100]}…"


def best(folder: Path) -> ModelCheckpoint:
    """``best.ckpt``, by ``val/loss``."""
    return ModelCheckpoint(
        folder, filename="best", monitor="val/loss", enable_version_counter=False
    )


def last(folder: Path, every: int) -> ModelCheckpoint:
    """``last.ckpt``, every so many optimizer steps."""
    return ModelCheckpoint(
        folder, filename="last", every_n_train_steps=every, enable_version_counter=False
    )


def steady(folder: Path) -> ModelCheckpoint:
    """``steady.ckpt``, of the evaluation whose last three repetition rates vary least.

    A loss may go on falling while the writing turns into loops. Where the rate stands still, the
    writing is what it was. (It does so before anything is learned, too: read the samples.)
    """
    return Steady(
        folder, filename="steady", monitor="writing/repetition_spread", enable_version_counter=False
    )


class Steady(ModelCheckpoint):
    """Waits until its figure is there: the first evaluations have none."""

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.monitor in trainer.callback_metrics:
            super().on_validation_end(trainer, pl_module)


def figures(folder: Path, best: ModelCheckpoint, steady: ModelCheckpoint) -> dict[str, str]:
    """``checkpoint/*`` of ``summary.json``: of which step each one is, and why it was kept."""
    reasons = {"last": "where the run ended"}
    for name, kept, reason in (
        ("best", best, "val/loss is lowest"),
        ("steady", steady, "the last three repetition rates vary least"),
    ):
        if kept.best_model_score is not None:
            reasons[name] = f"{reason}, {float(kept.best_model_score):.4f}"
    steps = {
        name: torch.load(folder / f"{name}.ckpt", mmap=True, weights_only=True)["global_step"]
        for name in reasons
    }
    return {f"checkpoint/{name}": f"step {steps[name]}: {why}" for name, why in reasons.items()}


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
