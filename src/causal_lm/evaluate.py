"""Loss, perplexity and bits per byte of a checkpoint on any data."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import lightning as L
import torch

from causal_lm.build import instantiate, restore
from causal_lm.checkpoint_file import CONFIG, read_checkpoint
from causal_lm.config import ConfigError, load
from causal_lm.data.datamodule import DataModule


class _MetricReader(L.Callback):
    """Reads the metric before the module resets it."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        metric = pl_module.val_metric
        self.figures = {name: float(value) for name, value in metric.compute().items()}
        self.figures |= {"tokens": int(metric.tokens), "bytes": int(metric.bytes)}


def evaluate(
    checkpoint: str, overrides: Sequence[str], *, split: str = "val", device: str = "cpu",
    trust: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Loss (nats per token), perplexity and bits per byte, computed as in validation.

    Uses the checkpoint's tokenizer and, unless overridden, its ``data.max_length``. ``overrides``
    are those of train.py, ``data=`` among them; ``split`` is ``val``, ``train`` or ``all``;
    ``trust`` is of :func:`causal_lm.build.restore`.

    Raises:
        ValueError: no data is named, its tokenizer is another one, or rows are too long.
    """
    if not any(word.startswith("data=") for word in overrides):
        raise ConfigError("no data is named: add data=docstrings, or data=text data.path=…")
    saved = read_checkpoint(checkpoint)[CONFIG]
    cfg = load([f"data.max_length={saved['data']['max_length']}", *overrides])
    module, tokenizer, _ = restore(checkpoint, trust=[*trust, cfg.model._target_])
    limit, length = saved["model"].get("max_positions"), cfg.data.max_length
    if limit is not None and length > limit:
        raise ConfigError(f"data.max_length={length}: this model has {limit} positions")
    own = {"tokenizer": tokenizer} if "tokenizer" in cfg.data else {}
    data: DataModule = instantiate(cfg.data, shuffle=False, **own)
    if data.load().tokenizer.state() != tokenizer.state():
        raise ValueError(f"the tokenizer of {checkpoint} differs from that of this data")

    loaders = {"val": [data.val_dataloader], "train": [data.train_dataloader]}
    loaders["all"] = loaders["train"] + loaders["val"]
    place, reader = torch.device(device), _MetricReader()
    trainer = L.Trainer(
        accelerator=place.type, devices=1 if place.index is None else [place.index],
        callbacks=[reader], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    batches = chain.from_iterable(loader() for loader in loaders[split])
    trainer.validate(module, batches, verbose=False)
    return {"checkpoint": str(checkpoint), "split": split} | reader.figures
