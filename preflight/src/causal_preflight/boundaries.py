"""Entries of a batch that state by numbers where its documents begin: `cu_seqlens`, `doc_lens`.

They hold the lengths of the documents or their cumulative sum, (n,) for all rows or (B, n).
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def entries(raw: dict[str, Any], like: Tensor) -> dict[str, Tensor]:
    """Integers (n,) or (B, n) that are not as wide as the rows (B, T)."""
    tensors = {k: v for k, v in raw.items() if isinstance(v, Tensor) and v.ndim in (1, 2)}
    whole = {k: v for k, v in tensors.items() if not v.is_floating_point() and v.numel()}
    return {k: v for k, v in whole.items() if v.shape != like.shape and v.dtype != torch.bool}


def documents_of(raw: dict[str, Any], real: Tensor) -> Tensor | None:
    """(B, T) numbers of the documents, ascending, that an entry states; None if none does."""
    for value in entries(raw, real).values():
        table = value if value.ndim == 2 else value[None]
        for lens, on in product((table, table.diff()), (real, torch.ones_like(real))):
            slots = on.sum(1) if value.ndim == 2 else on.sum()[None]
            if bool((lens >= 0).all()) and torch.equal(lens.sum(1), slots):
                doc = torch.full_like(real, -1, dtype=torch.long)
                number = torch.arange(lens.numel()).to(lens).long()
                doc[on] = number.repeat_interleave(lens.flatten())
                if bool((doc[:, 1:] != doc[:, :-1])[real[:, 1:] & real[:, :-1]].any()):
                    return doc
    return None


def writer(value: Tensor, doc: Tensor) -> Callable[[Tensor], Tensor] | None:
    """What makes the entry of document numbers (B, T), -1 at PAD; None if it is not made of them.

    PAD may be left out, or be a document.
    """
    options = product((False, True), (False, True), (False, True))
    ways = (partial(_write, value, *option) for option in options)
    return next((way for way in ways if torch.equal(way(doc), value)), None)


def _write(like: Tensor, cumulative: bool, filled: bool, with_pad: bool, doc: Tensor) -> Tensor:
    """`filled`: up to the size of `like`, with 0 or the last sum."""
    kept = [row if with_pad else row[row >= 0] for row in doc]
    runs = [row.unique_consecutive(return_counts=True)[1] for row in kept]
    runs = [run if len(run) else run.new_zeros(1) for run in runs]
    runs = runs if like.ndim == 2 else [torch.cat(runs)]
    if cumulative:
        runs = [F.pad(run.cumsum(0), (1, 0)) for run in runs]
    size = max(like.shape[-1] * filled, *map(len, runs))
    rows = [F.pad(r, (0, size - len(r)), value=int(r[-1]) * cumulative) for r in runs]
    return (torch.stack(rows) if like.ndim == 2 else rows[0]).to(like)
