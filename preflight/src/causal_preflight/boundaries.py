"""Entries of a batch that state by numbers where its documents begin: `cu_seqlens`, `doc_lens`.

They hold the lengths of the documents of all rows, one after another, or their cumulative sum.
"""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def entries(raw: dict[str, Any]) -> dict[str, Tensor]:
    """Integers (n,)."""
    flat = {k: v for k, v in raw.items() if isinstance(v, Tensor) and v.ndim == 1 and v.numel()}
    return {k: v for k, v in flat.items() if not v.is_floating_point() and v.dtype != torch.bool}


def documents_of(raw: dict[str, Any], real: Tensor) -> Tensor | None:
    """(B, T) numbers of the documents, ascending, that an entry states; None if none does."""
    for value in entries(raw).values():
        for lens, on in product((value, value.diff()), (real, torch.ones_like(real))):
            if bool((lens >= 0).all()) and int(lens.sum()) == int(on.sum()):
                doc = torch.full_like(real, -1, dtype=torch.long)
                doc[on] = torch.arange(len(lens)).to(lens).long().repeat_interleave(lens)
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
    run = torch.cat([row.unique_consecutive(return_counts=True)[1] for row in kept])
    run = F.pad(run.cumsum(0), (1, 0)) if cumulative else run
    size = max(len(like) * filled, len(run))
    return F.pad(run, (0, size - len(run)), value=int(run[-1]) * cumulative).to(like)
