"""Rows of real length, and masks that leak at few places of them."""

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .parts import PAD, Batch, Tiny, V, tokens

Opened = Callable[[int], Tensor]
"""Width T -> (T, T) bool: what is opened over a causal mask."""


class Long(Tiny):
    """Sees what is `opened` besides the past."""

    def __init__(self, opened: Opened) -> None:
        super().__init__()
        self.pos, self.opened = nn.Embedding(512, self.d), opened

    def visible(self, ids: Tensor, *a: Any) -> Tensor:
        return super().visible(ids, *a) | self.opened(ids.shape[1])


def nothing(t: int) -> Tensor:
    return torch.zeros(t, t, dtype=torch.bool)


def pair(seed: int, width: int) -> Opened:
    """One query that sees one later key, at a random place."""
    gen = random.Random(seed)
    query = gen.randrange(1, width - 2)
    key = gen.randrange(query + 1, width)

    def opened(t: int) -> Tensor:
        see = nothing(t)
        see[query : query + 1, key : key + 1] = True
        return see

    return opened


def sinks(seed: int, width: int) -> Opened:
    """Every query sees the first four keys."""
    return lambda t: (torch.arange(t) < 4).expand(t, t)


def chunks(seed: int, width: int) -> Opened:
    """The first query of each chunk of an eighth of the row sees its whole chunk."""
    size = width // 8

    def opened(t: int) -> Tensor:
        at = torch.arange(t)
        return (at[:, None] % size == 0) & (at[:, None] // size == at // size)

    return opened


def long_padded(seed: int, width: int) -> Batch:
    gen = torch.Generator().manual_seed(seed)
    ids = torch.full((4, width), PAD)
    for b in range(4):
        n = width - b * width // 6
        ids[b, :n] = torch.tensor(tokens(gen, n))
    mask = (ids != PAD).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def long_full(seed: int, width: int) -> Batch:
    gen = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, V, (4, width), generator=gen)}


def long_packed(seed: int, width: int) -> Batch:
    """Documents of an eighth to a third of the row, PAD after the last."""
    gen, sizes = torch.Generator().manual_seed(seed), random.Random(seed)
    ids, doc = torch.full((4, width), PAD), torch.full((4, width), -1)
    pos = torch.zeros_like(ids)
    for b in range(4):
        at = d = 0
        while at < width - 4:
            n = min(width - at, sizes.randrange(max(4, width // 8), width // 3))
            here = slice(at, at + n)
            ids[b, here], doc[b, here], pos[b, here] = (
                torch.tensor(tokens(gen, n)),
                d,
                torch.arange(n),
            )
            at, d = at + n, d + 1
    return {"input_ids": ids, "document_ids": doc, "position_ids": pos}
