"""Held-out set-ups in the style of 2024 to 2026, right and wrong: attention and its masks."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .causal import BatchNormed
from .parts import Batch, Tiny, left, packed, padded, token_mean
from .registry import Cases, case
from .right import _prompt

ATTENTION = Cases()


def kinds(base: type[nn.Module], **values: Any) -> Callable[[], nn.Module]:
    """The class with other values of its class attributes."""
    return type(base.__name__, (base,), values)


def run(base: type[nn.Module], batch: Any = padded, loss: Any = token_mean, **values: Any) -> Any:
    return case(kinds(base, **values), batch, loss)


def run_open(base: type[nn.Module], **values: Any) -> Any:
    """The class with no causal mask."""
    return run(base, causal=lambda self, t: torch.ones(t, t, dtype=torch.bool), **values)


class Windowed(Tiny):
    """Sliding window of `width` keys, and `sinks` first ones; `ahead` columns of the future."""

    width, sinks, ahead, hole, over = 4, 0, 0, 0, False

    def causal(self, t: int) -> Tensor:
        age = torch.arange(t)[:, None] - torch.arange(t)
        see = (age >= -self.ahead) & (age < self.width) & ((age <= 0) | (age > self.hole))
        sink = (torch.arange(t) < self.sinks)[None].expand(t, t)
        return see | (sink if self.over else sink & (age >= 0))


ATTENTION.pair(
    "sliding window",
    run(Windowed),
    causal_both_sides=run(Windowed, ahead=3),
    causal_one_ahead=run(Windowed, ahead=1),
    causal_hole=run(Windowed, hole=2),
)
ATTENTION.pair(
    "window and sinks",
    run(Windowed, sinks=2),
    causal_sinks_over_the_mask=run(Windowed, sinks=2, over=True),
    causal_window=run(Windowed, sinks=2, ahead=2),
)


class SinkLogit(Tiny):
    """A learned logit per head in the softmax that no value belongs to."""

    side = 0

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.zeros(2))

    def weights(self, scores: Tensor, see: Tensor) -> Tensor:
        sink = self.sink[None, :, None, None].expand(len(scores), 2, scores.shape[2], 1)
        scores = torch.cat([sink, scores], -1)
        see = F.pad(see, (1, 0) if self.side == 0 else (0, 1), value=True)
        return scores.masked_fill(~see, -math.inf).softmax(-1)[..., 1:]


ATTENTION.pair("sink logit", run(SinkLogit), causal_mask_beside_it=run(SinkLogit, side=1))


class Capped(Tiny):
    """A soft cap of the scores, before the mask or after it."""

    after = False

    def weights(self, scores: Tensor, see: Tensor) -> Tensor:
        if self.after:
            return (4 * torch.tanh(scores.masked_fill(~see, -1e9) / 4)).softmax(-1)
        return super().weights(4 * torch.tanh(scores / 4), see)

    def forward(self, *args: Any, **kw: Any) -> Tensor:
        return 10 * torch.tanh(super().forward(*args, **kw) / 10)


ATTENTION.pair("soft caps", run(Capped), causal_cap_after_the_mask=run(Capped, after=True))


class Shared(Tiny):
    """The second layer takes keys and values of the first; `lean` rolls them along time."""

    lean, pooled = 0, False

    def attend(self, x: Tensor, i: int, see: Tensor) -> Tensor:
        q, k, v = (self.split(z) for z in self.qkv[i](x).chunk(3, -1))
        if i == 0:
            self.kept = (k, v)
        k, v = (z.roll(-self.lean, 2) if i else z for z in self.kept)
        if self.pooled:
            v = v + 0.1 * v.mean(2, keepdim=True)
        return self.merge(self.weights(q @ k.mT / 3, see) @ v)


ATTENTION.pair(
    "keys and values shared by layers",
    run(Shared),
    causal_rolled=run(Shared, lean=1),
    causal_pooled=run(Shared, pooled=True),
)


class Grouped(Tiny):
    """Four query heads share two heads of keys and values."""

    way = "interleave"

    def __init__(self) -> None:
        super().__init__(heads=4)
        self.q = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.kv = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))
        self.qkv = nn.ModuleList(nn.Identity() for _ in range(2))

    def attend(self, x: Tensor, i: int, see: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, kv = self.split(self.q[i](x)), self.kv[i](x).unflatten(-1, (2, 8))
        k, v = kv.chunk(2, -1)  # (b, t, 2, 4)
        if self.way == "viewed":
            k, v = (z.reshape(b, 2, t, 4) for z in (k, v))
        else:
            k, v = (z.transpose(1, 2) for z in (k, v))
        if self.way == "batch":
            k, v = (z.repeat(2, 1, 1, 1).reshape(b, 4, t, 4) for z in (k, v))
        elif self.way == "tiled":
            k, v = (z.repeat(1, 2, 1, 1) for z in (k, v))
        else:
            k, v = (z.repeat_interleave(2, 1) for z in (k, v))
        return self.merge(self.weights(q @ k.mT / 2, see) @ v)


ATTENTION.pair(
    "grouped queries",
    run(Grouped),
    causal_viewed=run(Grouped, way="viewed"),
    causal_repeated_over_rows=run(Grouped, way="batch"),
)
ATTENTION.pair("grouped queries, heads in another order", run(Grouped, way="tiled"))


class Rotary(Tiny):
    """Rotary positions, of the slot or as given; `axis` 0 counts rows instead."""

    axis, given = 1, True

    def positions(self, ids: Tensor, given: Tensor | None) -> Tensor:
        at = torch.arange(ids.shape[self.axis])
        at = at.expand_as(ids) if self.axis else at[:, None].expand_as(ids)
        self.at = given if given is not None and self.given else at
        return torch.zeros(())

    def attend(self, x: Tensor, i: int, see: Tensor) -> Tensor:
        q, k, v = (self.split(z) for z in self.qkv[i](x).chunk(3, -1))
        angle = self.at[:, None, :, None] / 10 ** torch.arange(4)

        def turn(z: Tensor) -> Tensor:
            a, b = z.chunk(2, -1)
            sin, cos = angle.sin(), angle.cos()
            return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

        return self.merge(self.weights(turn(q) @ turn(k).mT / 3, see) @ v)


class AllKeys(Rotary):
    """PAD keys are seen as well."""

    def visible(self, ids: Tensor, mask: Tensor | None, docs: Tensor | None) -> Tensor:
        return super().visible(ids, None, docs)


class BySlot(Tiny):
    """Positions count slots, whatever the batch says."""

    def positions(self, ids: Tensor, given: Tensor | None) -> Tensor:
        return super().positions(ids, None)


ATTENTION.pair("rotary", run(Rotary), causal=run_open(Rotary))
ATTENTION.pair("rotary left", run(Rotary, left), pad_keys=run(AllKeys, left))
ATTENTION.pair("rotary packed, counted on", run(Rotary, packed, given=False))
ATTENTION.pair("learned positions left", run(Tiny, left), position_by_slot=run(BySlot, left))


class Fused(Tiny):
    """`scaled_dot_product_attention`, which takes a mask or `is_causal`."""

    way = "both"

    def attend(self, x: Tensor, i: int, see: Tensor) -> Tensor:
        q, k, v = (self.split(z) for z in self.qkv[i](x).chunk(3, -1))
        keys = see.any(2, keepdim=True).expand_as(see)  # without the causal part
        if self.way == "inverted":
            see = ~see | torch.eye(see.shape[-1], dtype=torch.bool)
        mask = {"both": see, "keys": keys, "inverted": see}[self.way]
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


ATTENTION.pair(
    "sdpa",
    run(Fused),
    causal_key_mask_alone=run(Fused, way="keys"),
    causal_inverted=run(Fused, way="inverted"),
)


class Encoder(nn.Module):
    """`nn.TransformerEncoder`: True = masked out."""

    mask = "right"

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.pos = nn.Embedding(29, 16), nn.Embedding(64, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 29)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        t = input_ids.shape[1]
        future = torch.ones(t, t, dtype=torch.bool).triu(1)
        if self.mask == "inverted":
            future = torch.ones(t, t, dtype=torch.bool).tril(-1)
        x = self.tok(input_ids) + self.pos(torch.arange(t))
        keys = None if self.mask == "none" else attention_mask == 0
        return self.head(self.body(x, future if self.mask != "none" else None, keys))


ATTENTION.pair(
    "nn.TransformerEncoder",
    run(Encoder),
    causal_inverted=run(Encoder, mask="inverted"),
    causal_none=run(Encoder, mask="none"),
)


class Registers(Tiny):
    """Two learned vectors in front of the row; their outputs are dropped."""

    drop = slice(2, None)

    def __init__(self) -> None:
        super().__init__()
        self.registers = nn.Parameter(torch.randn(2, 16))

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
        x = self.tok(input_ids) + self.pos(torch.arange(input_ids.shape[1]))
        x = torch.cat([self.registers.expand(len(x), -1, -1), x], 1)
        keys = F.pad(attention_mask, (2, 0), value=1)
        see = self.visible(keys, keys, None)
        for i in range(2):
            x = x + self.out[i](self.attend(self.ln[i](x), i, see))
            x = x + self.mlp[i](x)
        return self.head(self.final(x))[:, self.drop]


ATTENTION.pair(
    "registers",
    run(Registers),
    causal_open=run_open(Registers),
)


class Patches(Tiny):
    """Means of patches of two tokens are added to the tokens of the next patch."""

    late = 1

    def mix(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        means = F.pad(x, (0, 0, 0, n % 2)).unflatten(1, (-1, 2)).mean(2)
        means = F.pad(means, (0, 0, self.late, 0))[:, : means.shape[1]]
        return x + means.repeat_interleave(2, 1)[:, :n]


ATTENTION.pair("patches", run(Patches), causal_own_patch=run(Patches, late=0))


class Prefix(Tiny):
    """The first five tokens see each other."""

    def causal(self, t: int) -> Tensor:
        see = super().causal(t)
        see[:5, :5] = True
        return see


ATTENTION.pair("prefix", run(Prefix, lambda s: _prompt(padded(s))), causal_scored=run(Prefix))


class Checkpointed(Tiny):
    """Each attention is computed again in the backward pass."""

    again = False

    def attend(self, x: Tensor, i: int, see: Tensor) -> Tensor:
        return checkpoint(super().attend, x, i, see, use_reentrant=self.again)  # type: ignore


for again in (False, True):
    ATTENTION.pair(
        f"checkpointed {again}",
        run(Checkpointed, again=again),
        causal=run_open(Checkpointed, again=again),
    )


class Frozen(BatchNormed):
    """BatchNorm whose statistics stay as they are."""

    def __init__(self) -> None:
        super().__init__()
        self.train()

    def train(self, mode: bool = True) -> nn.Module:
        super().train(mode)
        self.bn.eval()
        return self


ATTENTION.pair("frozen BatchNorm", run(Frozen), causal_live=run(BatchNormed))


class Alibi(Tiny):
    """A bias by distance; `both` leaves out the mask, since the bias is there."""

    both = False

    def positions(self, ids: Tensor, given: Tensor | None) -> Tensor:
        return torch.zeros(())

    def weights(self, scores: Tensor, see: Tensor) -> Tensor:
        age = torch.arange(scores.shape[-1])[:, None] - torch.arange(scores.shape[-1])
        if self.both:
            return (scores - 0.5 * age.abs()).softmax(-1)
        return super().weights(scores - 0.5 * age.abs(), see)


ATTENTION.pair("ALiBi", run(Alibi), causal_no_mask=run(Alibi, both=True))


class Cached(Tiny):
    """Takes and returns a cache of keys and values."""

    offset, lower_right = True, True

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None,
                past_key_values: Any = None, use_cache: bool = False, **_: Any) -> Any:  # fmt: skip
        past = 0 if past_key_values is None else past_key_values[0][0].shape[2]
        t = input_ids.shape[1]
        see = torch.ones(t, past + t, dtype=torch.bool).tril(past if self.lower_right else 0)
        see = see[None, None].expand(len(input_ids), 1, t, past + t)
        if attention_mask is not None and not past:
            see = see & attention_mask.bool()[:, None, None] | torch.eye(t, dtype=torch.bool)
        at = torch.arange(t) + (past if self.offset else 0)
        x, cache = self.tok(input_ids) + self.pos(at), []
        for i in range(2):
            q, k, v = (self.split(z) for z in self.qkv[i](self.ln[i](x)).chunk(3, -1))
            if past:
                k, v = (
                    torch.cat([a, b], 2) for a, b in zip(past_key_values[i], (k, v), strict=True)
                )
            cache.append((k, v))
            x = x + self.out[i](self.merge(self.weights(q @ k.mT / 3, see) @ v))
            x = x + self.mlp[i](x)
        z = self.head(self.final(x))
        return {"logits": z, "past_key_values": cache}


def of_dict(model: nn.Module, batch: Batch) -> Tensor:
    return token_mean(lambda **kw: model(**kw)["logits"], batch)  # type: ignore[arg-type]


ATTENTION.pair(
    "cache",
    run(Cached, padded, of_dict),
    position_not_offset=run(Cached, padded, of_dict, offset=False),
    causal_upper_left=run(Cached, padded, of_dict, lower_right=False),
)
