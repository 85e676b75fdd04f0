"""Models whose forward returns the loss alone: the logits are made inside one function of it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .causal import Convolved, ConvolvedBoth, OffByOne, Open
from .pad import Inverted, NoSelf
from .parts import BOS, Batch, Tiny, full, left, padded
from .registry import Cases, Setup, case


class ChunkedLoss(torch.autograd.Function):
    """Head and cross-entropy in chunks; the gradients are made in the forward pass (Liger)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, w: Tensor, bias: Tensor, target: Tensor) -> Tensor:
        count, total = (target != -100).sum().clamp_min(1), h.new_zeros(())
        grads = [torch.zeros_like(x) for x in (h, w, bias)]
        for at in range(0, len(h), 8):
            part, y = h[at : at + 8], target[at : at + 8]
            z, keep = F.linear(part, w, bias), (y != -100)[:, None]
            total += F.cross_entropy(z, y, reduction="sum", ignore_index=-100) / count
            d = z.softmax(-1) - F.one_hot(y.clamp_min(0), len(w))
            d = torch.where(keep, d, 0.0) / count
            grads[0][at : at + 8] = d @ w
            grads[1] += d.T @ part
            grads[2] += d.sum(0)
        ctx.save_for_backward(*grads)
        return total

    @staticmethod
    def backward(ctx: Any, up: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return (*(up * g for g in ctx.saved_tensors), None)


Loss = Callable[[nn.Linear, Tensor, Tensor], Tensor]


def at_once(head: nn.Linear, h: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(h, head.weight, head.bias), y)


def chunked(head: nn.Linear, h: Tensor, y: Tensor) -> Tensor:
    return ChunkedLoss.apply(h, head.weight, head.bias, y)  # type: ignore[no-any-return]


def recomputed(head: nn.Linear, h: Tensor, y: Tensor, reentrant: bool = False) -> Tensor:
    """The head as a module, in chunks that are computed again in the backward pass."""

    def part(h: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(head(h), y, reduction="sum")

    parts = zip(h.split(16), y.split(16), strict=True)
    sums = [checkpoint(part, *p, use_reentrant=reentrant) for p in parts]
    return torch.stack(sums).sum() / (y != -100).sum()  # type: ignore[arg-type]


def reentrant(head: nn.Linear, h: Tensor, y: Tensor) -> Tensor:
    return recomputed(head, h, y, True)


class Fused(Tiny):
    """Labels are those of the batch, or made of the ids; `ahead` is 1 where the shift is right."""

    ahead = 1

    def __init__(self, ahead: int = 1, loss: Loss = chunked) -> None:
        super().__init__()
        self.ahead, self.loss = ahead, loss

    def hidden(self, *args: Any, **kw: Any) -> Tensor:
        head, self.head = self.head, nn.Identity()  # type: ignore[assignment]
        try:
            return super().forward(*args, **kw)
        finally:
            self.head = head

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **kw: Any) -> Tensor:
        h = self.hidden(input_ids, **kw)
        if labels is None:
            mask = kw.get("attention_mask", torch.ones_like(input_ids))
            labels = input_ids.masked_fill(mask == 0, -100)
        n = h.shape[1] - self.ahead
        return self.loss(self.head, h[:, :n].flatten(0, 1), labels[:, self.ahead :].flatten())


def call(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch)  # type: ignore[no-any-return]


def unlabeled(seed: int) -> Batch:
    batch = padded(seed)
    del batch["labels"]
    return batch


def no_bos(batch: Batch) -> Batch:
    """BOS is no target: a PAD in front of it would be trained on it."""
    return {**batch, "labels": batch["labels"].masked_fill(batch["input_ids"] == BOS, -100)}


class Bare(Tiny):
    """No module returns the last hidden states: without a norm, or with a function for it."""

    last: Any = staticmethod(lambda x: x)

    def __init__(self, **kw: Any) -> None:
        super().__init__(**kw)
        del self.final

    def final(self, x: Tensor) -> Tensor:
        return self.last(x)  # type: ignore[no-any-return]


class BareNorm(Bare):
    last = staticmethod(lambda x: F.rms_norm(x, x.shape[-1:]))


class InvertedBare(Tiny):
    """Real keys are hidden, PAD is not; no query is left its own key."""

    def visible(self, ids: Tensor, mask: Tensor | None, docs: Tensor | None) -> Tensor:
        return self.causal(ids.shape[1]) & (mask == 0)[:, None, None]  # type: ignore[union-attr]


def of(base: type[Tiny], ahead: int = 1, loss: Loss = chunked) -> Callable[[], nn.Module]:
    made = type("Made", (Fused, base), {})
    return lambda: made(ahead, loss)


def fused(batch: Callable[[int], Batch], *args: Any) -> Callable[[int], Setup]:
    return case(of(*args), batch, call)


def pad_counts(seed: int) -> Batch:
    return {**padded(seed), "labels": padded(seed)["input_ids"].clone()}


def from_left(seed: int) -> Batch:
    return no_bos(left(seed))


FUSED = Cases()
for loss in (at_once, chunked, recomputed, reentrant):
    for batch in (padded, unlabeled):
        FUSED.pair(
            f"{loss.__name__} {batch.__name__}",
            fused(batch, Tiny, 1, loss),
            causal=fused(batch, Open, 1, loss),
            shift=fused(batch, Tiny, 0, loss),
            shift_twice=fused(batch, Tiny, 2, loss),
        )
for base in (Bare, BareNorm):
    FUSED.pair(
        base.__name__,
        fused(padded, base),
        causal=case(of(type("OpenBare", (base, Open), {})), padded, call),
        shift=fused(padded, base, 0),
        shift_twice=fused(padded, base, 2),
    )
FUSED.pair("stream", fused(full, Tiny), causal=fused(full, Open), shift=fused(full, Tiny, 0))
FUSED.pair("convolved", fused(padded, Convolved), causal=fused(padded, ConvolvedBoth))
FUSED.pair(
    "left",
    fused(from_left, Tiny),
    causal=fused(from_left, OffByOne),
    pad_no_key=fused(from_left, NoSelf),
    pad_nan=fused(from_left, InvertedBare),
)
FUSED.pair(
    "key mask",
    fused(padded, Tiny),
    causal=fused(padded, OffByOne),
    pad_labels=fused(pad_counts, Tiny),
    pad_inverted=fused(padded, Inverted),
    pad_nan=fused(padded, InvertedBare),
    pad_nan_unlabeled=fused(unlabeled, InvertedBare),
)
