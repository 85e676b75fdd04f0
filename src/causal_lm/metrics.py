"""Loss, perplexity and bits per byte from exact sums over tokens.

torchmetrics' own ``Perplexity`` computes a softmax in the dtype of the logits (``inf`` at a gap of
about 110 in float32, 18 in float16), reads -100 as an index unless told otherwise, and rounds its
counts in a ``bfloat16`` module. This one keeps nats in float64 and counts in int64.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from causal_lm.objective import IGNORE


class TokenPerplexity(Metric):
    """Loss, perplexity and bits per byte over every counted label, on every rank.

    >>> metric = TokenPerplexity()
    >>> metric.update(torch.tensor([[2.0, 4.0, 0.0]]), torch.tensor([[7, 8, IGNORE]]))
    >>> {name: round(float(value), 4) for name, value in metric.compute().items()}
    {'loss': 3.0, 'ppl': 20.0855, 'bpb': nan}
    """

    full_state_update = False
    nats: Tensor
    tokens: Tensor
    bytes: Tensor

    def __init__(self, token_bytes: Tensor | None = None) -> None:
        """token_bytes: (V,) UTF-8 bytes of each token, 0 for special ones; None where they do not
        add up to those of the text (bits per byte is NaN without :meth:`count_text`)."""
        super().__init__()
        for name, dtype in ("nats", torch.float64), ("tokens", torch.int64), ("bytes", torch.int64):
            self.add_state(name, torch.zeros((), dtype=dtype), dist_reduce_fx="sum")
        self.token_bytes = token_bytes

    def update(self, nll: Tensor, labels: Tensor) -> None:
        """Add nll (B, T) in nats and labels (B, T); 0 and IGNORE where not counted."""
        if nll.shape != labels.shape:
            raise ValueError(f"nll {tuple(nll.shape)} and labels {tuple(labels.shape)} differ")
        counted = labels != IGNORE
        self.nats += nll.sum(dtype=self.nats.dtype)
        self.tokens += counted.sum()
        if self.token_bytes is not None:
            self.token_bytes = self.token_bytes.to(labels.device)
            self.bytes += self.token_bytes[labels[counted]].sum()

    def count_text(self, *documents: Any) -> None:
        """Without ``token_bytes``, count the text of the ``Documents`` that were measured, in
        proportion where these were not all of their targets."""
        sizes = [getattr(part, "text_bytes", 0) for part in documents]
        if self.token_bytes is None and all(sizes):
            targets = sum(part.count_targets() for part in documents)
            self.bytes += round(sum(sizes) * int(self.tokens) / targets)

    def compute(self) -> dict[str, Tensor]:
        """``loss`` in nats per token, ``ppl`` = exp(loss), ``bpb`` in bits per UTF-8 byte: *all*
        nats, those of EOS included, over the bytes of the text."""
        loss = self.nats / self.tokens
        bpb = self.nats / math.log(2) / self.bytes if self.bytes > 0 else loss * math.nan
        return {"loss": loss, "ppl": loss.exp(), "bpb": bpb}

    def _apply(self, fn: Callable, exclude_state=()) -> "TokenPerplexity":
        """Move the states with the module, but keep their dtype (MPS has no float64: float32)."""
        super()._apply(fn, ("nats", *exclude_state))  # ``fn`` may cast to another dtype
        dtype = torch.float32 if self.tokens.device.type == "mps" else torch.float64
        self.nats = self.nats.cpu().to(dtype).to(self.tokens.device)
        self._defaults["nats"] = torch.zeros_like(self.nats)
        return self
