"""Held-out set-ups in the style of 2024 to 2026, right and wrong: batches and objectives."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .fused import Fused, at_once, call, chunked
from .parts import Batch, Tiny, ce, feed, full, left, nll, packed, padded, targets
from .practice import run, run_open
from .registry import Cases, case

BATCHES = Cases()


def dense(seed: int, way: str = "right") -> Batch:
    """A mask (B, 1, T, T) made by the collator; a key mask beside it."""
    b = padded(seed)
    t = b["input_ids"].shape[1]
    causal = torch.ones(t, t, dtype=torch.bool).tril(3 if way == "ahead" else 0)
    see = causal & (b["attention_mask"][:, None, None] > 0)
    see = see | torch.eye(t, dtype=torch.bool)
    if way == "open":
        see = (b["attention_mask"][:, None, None] > 0).expand(-1, 1, t, t)
    return {**b, "mask": see}


class GivenMask(Tiny):
    """Attends as the mask of the batch says."""

    def forward(self, input_ids: Tensor, mask: Tensor, **_: Any) -> Tensor:
        self.given = mask
        return super().forward(input_ids)

    def visible(self, ids: Tensor, mask: Tensor | None, docs: Tensor | None) -> Tensor:
        return self.given


BATCHES.pair(
    "dense mask",
    run(GivenMask, dense),
    causal_open=run(GivenMask, lambda s: dense(s, "open")),
    causal_ahead=run(GivenMask, lambda s: dense(s, "ahead")),
)


def flat_positions(seed: int) -> Batch:
    b = padded(seed)
    return {**b, "position_ids": torch.arange(b["input_ids"].shape[1])}


BATCHES.pair("positions (T,)", case(batch=flat_positions))


def weighted_rows(seed: int) -> Batch:
    return {**padded(seed), "sample_weight": torch.tensor([1.0, 0.5, 2.0, 1.5, 0.25])}


def by_row(model: nn.Module, batch: Batch, goal: Any = targets) -> Tensor:
    b = {k: v for k, v in batch.items() if k != "sample_weight"}
    t = goal(b)
    w = batch["sample_weight"][:, None] * (t != -100)
    return (nll(feed(model, b), t) * w).sum() / w.sum()


def not_shifted(batch: Batch) -> Tensor:
    return batch["labels"]


BATCHES.pair(
    "weights of rows",
    case(batch=weighted_rows, loss=by_row),
    shift=case(batch=weighted_rows, loss=lambda m, b: by_row(m, b, not_shifted)),
)


def policy(model: nn.Module, batch: Batch, goal: Any = targets) -> Tensor:
    """A ratio to the policy that sampled, times an advantage for each row (GRPO)."""
    t = goal(batch)
    log_p = -nll(feed(model, {k: batch[k] for k in ("input_ids", "attention_mask")}), t)
    ratio = (log_p - log_p.detach()).exp() * (t != -100)
    return -(ratio * batch["advantages"][:, None]).sum() / (t != -100).sum()


def grouped(seed: int) -> Batch:
    return {**padded(seed), "advantages": torch.tensor([1.0, -1.0, 0.5, -0.5, 0.8])}


BATCHES.pair("ratio and advantage", case(batch=grouped, loss=policy),
             shift=case(batch=grouped, loss=lambda m, b: policy(m, b, not_shifted)))  # fmt: skip


class OwnFocal(Tiny):
    """Returns logits and a focal loss of them, as models of transformers do."""

    ahead = 1

    def forward(self, input_ids: Tensor, labels: Any = None, **kw: Any) -> Any:
        z = super().forward(input_ids, **kw)
        n = z.shape[1] - self.ahead
        y = labels[:, self.ahead :]
        each = nll(z[:, :n], y)
        loss = ((1 - (-each).exp()) * each).sum() / (y != -100).sum()
        return {"loss": loss, "logits": z}


def own(model: nn.Module, batch: Batch) -> Tensor:
    return model(**batch)["loss"]  # type: ignore[no-any-return]


BATCHES.pair(
    "focal loss of its own",
    run(OwnFocal, padded, own),
    shift=run(OwnFocal, padded, own, ahead=0),
    causal=run_open(OwnFocal, batch=padded, loss=own),
)


class Wide(Fused):
    """A fused loss of more channels than tokens in the vocabulary, its head tied."""

    def __init__(self, ahead: int = 1) -> None:
        Tiny.__init__(self, d=32)
        self.ahead, self.loss = ahead, chunked
        self.head = nn.Linear(32, 29, bias=False)
        self.head.weight = self.tok.weight

    def forward(self, input_ids: Tensor, labels: Any = None, **kw: Any) -> Tensor:
        h = self.hidden(input_ids, **kw)
        n = h.shape[1] - self.ahead
        y = labels[:, self.ahead :].flatten()
        return at_once(self.head, h[:, :n].flatten(0, 1), y)


BATCHES.pair("tied, fused", run(Wide, padded, call), causal=run_open(Wide, batch=padded, loss=call),
             shift=case(lambda: Wide(0), padded, call))  # fmt: skip


class Scaled(Fused):
    """The fused loss divides the logits by a temperature."""

    def forward(self, input_ids: Tensor, labels: Any = None, **kw: Any) -> Tensor:
        h = self.hidden(input_ids, **kw) / 8
        return at_once(self.head, h[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


BATCHES.pair(
    "scaled, fused", run(Scaled, padded, call), causal=run_open(Scaled, batch=padded, loss=call)
)


class Summed(Fused):
    """The fused loss is a sum, which is divided afterwards."""

    by = "targets"

    def forward(self, input_ids: Tensor, labels: Any = None, **kw: Any) -> Tensor:
        h, y = self.hidden(input_ids, **kw)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        total = F.cross_entropy(F.linear(h, self.head.weight, self.head.bias), y, reduction="sum")
        return total / {"targets": (y != -100).sum(), "slots": y.numel()}[self.by]


BATCHES.pair("divided afterwards, fused", run(Summed, padded, call),
             reduction=run(Summed, padded, call, by="slots"))  # fmt: skip


def micro(model: Any, batch: Batch, by_token: bool = True) -> Tensor:
    """Two rows at a time through a model that makes its own loss."""
    parts = [{k: v[i : i + 2] for k, v in batch.items()} for i in range(0, len(batch["labels"]), 2)]
    counts = torch.tensor([int((p["labels"][:, model.ahead :] != -100).sum()) for p in parts])
    weights = counts / counts.sum() if by_token else torch.ones(len(parts)) / len(parts)
    return (torch.stack([model(**part) for part in parts]) * weights).sum()


BATCHES.pair(
    "micro-batches, fused",
    case(Fused, padded, micro),
    causal=run_open(Fused, batch=padded, loss=micro),
    shift=case(lambda: Fused(0), padded, micro),
    reduction=case(Fused, padded, lambda m, b: micro(m, b, False)),
)


class SmoothFused(Fused):
    """The fused loss smooths its labels."""

    def forward(self, input_ids: Tensor, labels: Any = None, **kw: Any) -> Tensor:
        h, y = self.hidden(input_ids, **kw)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        z = F.linear(h, self.head.weight, self.head.bias)
        return F.cross_entropy(z, y, label_smoothing=0.1)


BATCHES.pair("smoothed, fused", run(SmoothFused, padded, call))


def per_document(model: nn.Module, batch: Batch, rows: bool = False) -> Tensor:
    t = targets(batch)
    each, doc = nll(feed(model, batch), t), batch["document_ids"]
    means = [
        each[b][(doc[b] == d) & (t[b] != -100)].mean() for b in range(len(t)) for d in range(3)
    ]
    return torch.stack(means).mean()


BATCHES.pair("mean of documents", case(batch=packed, loss=per_document))
BATCHES.pair(
    "stream",
    case(batch=full),
    shift=case(batch=full, loss=lambda m, b: ce(feed(m, b), b["input_ids"])),
)
BATCHES.pair("left", case(batch=left), shift_twice=case(
    batch=left, loss=lambda m, b: ce(feed(m, b)[:, :-1], targets(b)[:, 1:])))  # fmt: skip
