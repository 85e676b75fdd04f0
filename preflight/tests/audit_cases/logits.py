"""Set-ups whose logits reach the loss in an unusual way: transformed, in chunks, selected."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .causal import Open
from .parts import Batch, Tiny, ce, feed, targets
from .registry import add, add_right, case


class LogProbs(Tiny):
    def forward(self, *a: Any, **k: Any) -> Tensor:
        return super().forward(*a, **k).log_softmax(-1)


class Capped(Tiny):
    def forward(self, *a: Any, **k: Any) -> Tensor:
        return 5 * torch.tanh(super().forward(*a, **k) / 5)


def chunked_head(model: Any, batch: Batch, shift: int = 1) -> Tensor:
    """The head, applied to three positions at a time, to spare memory."""
    head, model.head = model.head, nn.Identity()
    hidden = feed(model, batch)
    model.head = head
    target = targets(batch) if shift else batch["labels"]
    pairs = zip(hidden.split(3, 1), target.split(3, 1), strict=True)
    total = torch.stack([ce(head(h), t, reduction="sum") for h, t in pairs]).sum()
    return total / (target != -100).sum()


def counted_only(model: Any, batch: Batch) -> Tensor:
    """The head, applied to positions with a target alone."""
    head, model.head = model.head, nn.Identity()
    hidden, target = feed(model, batch), targets(batch)
    model.head = head
    return F.cross_entropy(head(hidden[target != -100]), target[target != -100])


log_probs = add_right("log_probs", case(LogProbs))
capped = add_right("capped", case(Capped))
chunks = add_right("chunked_head", case(loss=chunked_head))
selected = add_right("counted_only", case(loss=counted_only))
add("shift", chunks, "chunked_unshifted", case(loss=lambda m, b: chunked_head(m, b, 0)))
add("causal", chunks, "chunked_open", case(Open, loss=chunked_head))
