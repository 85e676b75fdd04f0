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


class Extended(Cached):
    """Makes a cache of its own, a list of ids that it extends in place."""

    def make_cache(self) -> list[Tensor]:
        return []

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, cache: list[Tensor] | None = None, **k: Any
    ) -> Tensor:
        seen = torch.cat(cache, 1) if cache else None
        if cache is not None:
            cache.append(input_ids)
        return super().forward(input_ids, seen)[0]


class ExtendedOff(Extended):
    offset = 1


class Wrapper(nn.Module):
    """Its forward takes a batch and the cache of its model, as a LightningModule may."""

    kind = Extended

    def __init__(self) -> None:
        super().__init__()
        self.model = self.kind()

    def forward(self, batch: Batch, cache: Any = None) -> Tensor:
        at = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        return self.model(batch["input_ids"], position_ids=at, cache=cache)


class WrapperOff(Wrapper):
    kind = ExtendedOff


def of_batch(model: nn.Module, batch: Batch) -> Tensor:
    return ce(model(batch), targets(batch))


extended = add_right("extended", case(Wrapper, loss=of_batch))
add("position", extended, "extended_offset", case(WrapperOff, loss=of_batch))
