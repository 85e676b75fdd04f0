"""Set-ups whose logits depend on padding, row or packing slot; and caches."""

from typing import Any

import torch
from torch import Tensor, nn

from .parts import Batch, Tiny, ce, left, packed, padded, targets
from .registry import add, add_right, case
from .right import left_padded, packed_rows, plain


class Counting(Tiny):
    def positions(self, ids: Tensor, given: Tensor | None) -> Tensor:
        return super().positions(ids, None)


class FromTheEnd(Tiny):
    def positions(self, ids: Tensor, given: Tensor | None) -> Tensor:
        return super().positions(ids, None).flip(1)


class AlongBatch(Tiny):
    def positions(self, ids: Tensor, given: Tensor | None) -> Tensor:
        return self.pos(torch.arange(len(ids)))[:, None]


def running(seed: int) -> Batch:
    b = packed(seed)
    return {**b, "position_ids": torch.arange(18).expand_as(b["input_ids"])}


def plain_arange(seed: int) -> Batch:
    b = padded(seed, "left")
    return {**b, "position_ids": torch.arange(14).expand_as(b["input_ids"])}


add("position", left_padded, "left_pad_arange", case(Counting, left))
add("position", left_padded, "left_pad_arange_in_batch", case(batch=plain_arange))
add("position", packed_rows, "pack_not_reset", case(Counting, packed))
add("position", packed_rows, "pack_not_reset_in_batch", case(batch=running))
add("position", plain, "along_the_batch", case(AlongBatch))
add("position", plain, "from_the_end", case(FromTheEnd))


class Cached(Tiny):
    """Keeps the ids seen so far as its cache: slow, and right."""

    offset = 0

    def forward(self, input_ids: Tensor, cache: Tensor | None = None, **k: Any) -> Any:
        if cache is None:
            return super().forward(input_ids, **k), input_ids
        ids = torch.cat([cache, input_ids], 1)
        at = torch.arange(ids.shape[1]).expand_as(ids)
        at = torch.where(at >= cache.shape[1], at - self.offset, at)
        z = super().forward(ids, position_ids=at)
        return z[:, -input_ids.shape[1] :], ids


class CacheOff(Cached):
    offset = 1


def first(model: nn.Module, batch: Batch) -> Tensor:
    return ce(model(batch["input_ids"])[0], targets(batch))


cached = add_right("cached", case(Cached, loss=first))
add("position", cached, "cache_offset", case(CacheOff, loss=first))
