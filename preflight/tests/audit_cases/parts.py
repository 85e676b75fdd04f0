"""Batches, a small transformer with seams, and losses: what the cases are put together from."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

V, PAD, BOS, EOS = 29, 0, 1, 2
Batch = dict[str, Any]


def tokens(gen: torch.Generator, n: int) -> list[int]:
    """A document of n tokens: BOS … EOS."""
    return [BOS, *torch.randint(3, V, (n - 2,), generator=gen).tolist(), EOS]


def padded(seed: int, side: str = "right", rows: int = 5, width: int = 14, pad: int = PAD) -> Batch:
    """Rows of unequal length, none of them empty; `labels` ignore PAD."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.full((rows, width), pad)
    mask = torch.zeros_like(ids)
    for b in range(rows):
        n = width - (b % 4) * 2 - (1 if side == "both" else 0)
        at = {"right": 0, "left": width - n, "both": 1 if b % 2 else 0}[side]
        ids[b, at : at + n] = torch.tensor(tokens(gen, n))
        mask[b, at : at + n] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def left(seed: int, **kw: Any) -> Batch:
    """Padded on the left, with positions that count real tokens."""
    b = padded(seed, "left", **kw)
    return {**b, "position_ids": (b["attention_mask"].cumsum(1) - 1).clamp_min(0)}


def full(seed: int, rows: int = 4, width: int = 12) -> Batch:
    """No PAD, documents cut anywhere: rows of a stream."""
    gen = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, V, (rows, width), generator=gen)}


def packed(seed: int, rows: int = 3, width: int = 18) -> Batch:
    """Several documents a row, positions anew in each, PAD at the end."""
    gen = torch.Generator().manual_seed(seed)
    ids, doc = torch.full((rows, width), PAD), torch.full((rows, width), -1)
    pos = torch.zeros_like(ids)
    for b in range(rows):
        at = 0
        for d, n in enumerate((6 + b, 5, 4)):
            ids[b, at : at + n] = torch.tensor(tokens(gen, n))
            doc[b, at : at + n], pos[b, at : at + n] = d, torch.arange(n)
            at += n
    return {"input_ids": ids, "document_ids": doc, "position_ids": pos}


class Tiny(nn.Module):
    """A decoder in which every step that can go wrong is a method to override."""

    def __init__(self, d: int = 16, heads: int = 2, layers: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.d, self.heads = d, heads
        self.tok, self.pos = nn.Embedding(V, d), nn.Embedding(64, d)
        self.qkv = nn.ModuleList(nn.Linear(d, 3 * d) for _ in range(layers))
        self.out = nn.ModuleList(nn.Linear(d, d) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(d), nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
            for _ in range(layers)
        )
        self.ln = nn.ModuleList(nn.LayerNorm(d) for _ in range(layers))
        self.final, self.head = nn.LayerNorm(d), nn.Linear(d, V)
        self.drop = nn.Dropout(dropout)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        document_ids: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        see = self.visible(input_ids, attention_mask, document_ids)
        x = self.tok(input_ids) + self.positions(input_ids, position_ids)
        for i in range(len(self.qkv)):
            x = x + self.drop(self.out[i](self.attend(self.ln[i](x), i, see)))
            x = x + self.drop(self.mix(self.mlp[i](x)))
        return self.head(self.final(x))

    def positions(self, ids: Tensor, given: Tensor | None) -> Tensor:
        return self.pos(torch.arange(ids.shape[1]).expand_as(ids) if given is None else given)

    def causal(self, t: int) -> Tensor:
        return torch.ones(t, t, dtype=torch.bool).tril()

    def visible(self, ids: Tensor, mask: Tensor | None, docs: Tensor | None) -> Tensor:
        """(B, 1, T, T), True = may attend; a query may always attend to itself."""
        t = ids.shape[1]
        see = self.causal(t)[None, None].expand(len(ids), 1, t, t)
        if mask is not None:
            see = see & mask.bool()[:, None, None]
        if docs is not None:
            see = see & (docs[:, None, :, None] == docs[:, None, None])
        return see | torch.eye(t, dtype=torch.bool)

    def attend(self, x: Tensor, i: int, see: Tensor) -> Tensor:
        q, k, v = (self.split(z) for z in self.qkv[i](x).chunk(3, -1))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        return self.merge(self.weights(scores, see) @ v)

    def split(self, z: Tensor) -> Tensor:
        return z.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def merge(self, z: Tensor) -> Tensor:
        return z.transpose(1, 2).flatten(2)

    def weights(self, scores: Tensor, see: Tensor) -> Tensor:
        return scores.masked_fill(~see, -math.inf).softmax(-1)

    def mix(self, x: Tensor) -> Tensor:
        return x


def feed(model: nn.Module, batch: Batch) -> Tensor:
    """Logits, from whatever the batch holds but labels."""
    return model(**{k: v for k, v in batch.items() if k != "labels"})


def targets(batch: Batch) -> Tensor:
    """(B, T): the next token of the same document, -100 where there is none."""
    ids = batch["input_ids"]
    keep = torch.ones_like(ids, dtype=torch.bool)
    if "attention_mask" in batch:
        keep = batch["attention_mask"].bool()
    docs = batch.get("document_ids", torch.zeros_like(ids))
    keep = keep & (docs >= 0)
    out = torch.full_like(ids, -100)
    ok = keep[:, 1:] & keep[:, :-1] & (docs[:, 1:] == docs[:, :-1])
    source = batch.get("labels", ids)
    out[:, :-1] = source[:, 1:].masked_fill(~ok, -100)
    return out


def nll(logits: Tensor, target: Tensor, **kw: Any) -> Tensor:
    """(B, T) nats, 0 where ignored."""
    return F.cross_entropy(logits.transpose(1, 2), target, reduction="none", **kw)


def ce(logits: Tensor, target: Tensor, **kw: Any) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), target.flatten(), **kw)


def token_mean(model: nn.Module, batch: Batch) -> Tensor:
    return ce(feed(model, batch), targets(batch))
