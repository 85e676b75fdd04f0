"""The canonical figures of a checkpoint on any data."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from lightning.fabric.utilities.apply_func import move_data_to_device

from causal_lm import config
from causal_lm.data.datamodule import DataModule
from causal_lm.run import build, restore


def evaluate(
    checkpoint: str, overrides: Sequence[str], *, split: str = "val", device: str = "cpu"
) -> dict[str, Any]:
    """Loss, perplexity and bits per byte, as validation in training computes them.

    The checkpoint's own tokenizer reads the data, and rows are as long as in its training, unless
    ``data.max_length`` says otherwise.

    Args:
        checkpoint: a file that train.py wrote; nothing else of its run is needed.
        overrides: of train.py, ``data=`` among them.
        split: ``val``, ``train``, or ``all`` documents.

    Raises:
        ValueError: no data is named, the tokenizer cannot read it, or rows are too long.
    """
    if not any(word.startswith("data=") for word in overrides):
        raise config.ConfigError("say on which data: data=docstrings, or data=text data.path=…")
    module, tokenizer, saved = restore(checkpoint)
    cfg = config.load([f"data.max_length={saved['data']['max_length']}", *overrides])
    longest = saved["model"].get("max_positions", cfg.data.max_length)
    if cfg.data.max_length > longest:
        raise config.ConfigError(
            f"data.max_length={cfg.data.max_length}: this model has positions up to {longest}"
        )
    own = {"tokenizer": tokenizer} if "tokenizer" in cfg.data else {}
    data: DataModule = build(cfg.data, shuffle=False, **own)
    if data.load().tokenizer.state() != tokenizer.state():
        raise ValueError(f"{checkpoint} was trained on other tokens than this data is made of")

    loaders = {"val": [data.val_dataloader], "train": [data.train_dataloader]}
    loaders["all"] = loaders["train"] + loaders["val"]
    module.to(device).eval()
    with torch.inference_mode():
        for n, batch in enumerate(chain.from_iterable(loader() for loader in loaders[split])):
            module.validation_step(move_data_to_device(batch, torch.device(device)), n)
    figures = {name: float(value) for name, value in module.val_metric.compute().items()}
    counts = {"tokens": int(module.val_metric.tokens), "bytes": int(module.val_metric.bytes)}
    return {"checkpoint": str(checkpoint), "split": split} | counts | figures
