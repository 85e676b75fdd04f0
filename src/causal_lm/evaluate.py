"""Loss, perplexity and bits per byte of a checkpoint on any data."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch

from causal_lm.build import instantiate, restore
from causal_lm.checkpoint_file import CONFIG, read_checkpoint
from causal_lm.config import ConfigError, load
from causal_lm.data.datamodule import DataModule


def evaluate(
    checkpoint: str, overrides: Sequence[str], *, split: str = "val", device: str = "cpu",
    trust: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """Loss (nats per token), perplexity and bits per byte, computed as in validation.

    Uses the checkpoint's tokenizer and, unless overridden, its ``data.max_length``. ``overrides``
    are those of train.py, ``data=`` among them; ``split`` is ``val``, ``train``, ``test`` or
    ``all``; ``trust`` is of :func:`causal_lm.build.restore`. Raises ValueError where no data is
    named, its tokenizer is another one, or rows are too long.
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

    every = ["train", "val", "test"] if data.test_windows else ["train", "val"]
    names = every if split == "all" else [split]
    loaders = [getattr(data, f"{name}_dataloader")() for name in names]
    metric = module.to(device).val_metric
    with torch.inference_mode():
        for batch in chain.from_iterable(loaders):
            batch = batch.to(device)
            metric.update(module.token_nll(batch), batch.labels)
    metric.count_text(*(loader.dataset for loader in loaders))
    figures = {name: float(value) for name, value in metric.compute().items()}
    figures |= {"tokens": int(metric.tokens), "bytes": int(metric.bytes)}
    return {"checkpoint": str(checkpoint), "split": split} | figures
