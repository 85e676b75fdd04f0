"""Loss, perplexity and bits per byte of a checkpoint on any data."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import lightning as L
import torch

from causal_lm.build import instantiate, restore
from causal_lm.checkpoint_file import CONFIG, read
from causal_lm.config import ConfigError, load
from causal_lm.data.datamodule import DataModule


class _Totals(L.Callback):
    """Takes the figures and the counts before the module resets them."""

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        metric = pl_module.val_metric
        self.figures = {name: float(value) for name, value in metric.compute().items()}
        self.figures |= {"tokens": int(metric.tokens), "bytes": int(metric.bytes)}


def evaluate(
    checkpoint: str, overrides: Sequence[str], *, split: str = "val", device: str = "cpu",
    trust: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Loss (nats per token), perplexity and bits per byte, as validation in training has them.

    The checkpoint's own tokenizer reads the data; rows are as long as in its training by default.

    ``overrides`` are those of train.py, ``data=`` among them; ``split`` is ``val``, ``train`` or
    ``all``; ``trust`` is of :func:`causal_lm.build.restore`.

    Raises:
        ValueError: no data is named, the tokenizer cannot read it, or rows are too long.
    """
    if not any(word.startswith("data=") for word in overrides):
        raise ConfigError("name the data: data=docstrings, or data=text data.path=…")
    saved = read(checkpoint)[CONFIG]
    cfg = load([f"data.max_length={saved['data']['max_length']}", *overrides])
    longest = saved["model"].get("max_positions", cfg.data.max_length)
    if cfg.data.max_length > longest:
        length = f"data.max_length={cfg.data.max_length}"
        raise ConfigError(f"{length}: this model has {longest} positions")
    module, tokenizer, _ = restore(checkpoint, trust=[*trust, cfg.model._target_])
    own = {"tokenizer": tokenizer} if "tokenizer" in cfg.data else {}
    data: DataModule = instantiate(cfg.data, shuffle=False, **own)
    if data.load().tokenizer.state() != tokenizer.state():
        raise ValueError(f"{checkpoint} was trained with another tokenizer than that of this data")

    loaders = {"val": [data.val_dataloader], "train": [data.train_dataloader]}
    loaders["all"] = loaders["train"] + loaders["val"]
    where, totals = torch.device(device), _Totals()
    trainer = L.Trainer(
        accelerator=where.type, devices=1 if where.index is None else [where.index],
        callbacks=[totals], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    batches = chain.from_iterable(loader() for loader in loaders[split])
    trainer.validate(module, batches, verbose=False)
    return {"checkpoint": str(checkpoint), "split": split} | totals.figures
