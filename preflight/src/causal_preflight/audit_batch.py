"""What a batch means: which slots are real, which documents they belong to, what should count.

A `AuditBatch` is a batch with that knowledge attached, so that an edit (swap, cut, fill) keeps
both in step. Every probe works on edited frames and never on the model's insides.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

IGNORE = -100


class UnexaminableError(Exception):
    """A probe has nothing to look at here; the reason lands in `Report.skipped`."""


def need(condition: object, otherwise: str) -> None:
    """Raises UnexaminableError, which says `otherwise`, unless the condition holds."""
    if not condition:
        raise UnexaminableError(otherwise)


@dataclass(frozen=True)
class AuditBatch:
    """A batch and what is known of it.

    Args:
        batch: tensors; `input_ids` is (B, T).
        doc: (B, T) int, the document within the row, -1 at PAD.
        at: (B, T) int, which slot of the audited batch lies here (row * T + column), -1 for none.
        pad_id: the id at PAD slots, None where unknown.
        eos_id: the id that ends a document, None where unknown.
    """

    batch: dict[str, Any]
    doc: Tensor
    at: Tensor
    pad_id: int | None
    eos_id: int | None

    @property
    def ids(self) -> Tensor:
        ids: Tensor = self.batch["input_ids"]
        return ids

    @property
    def labels(self) -> Tensor | None:
        return self.batch.get("labels")

    @cached_property
    def real(self) -> Tensor:
        """(B, T) bool, False at PAD."""
        return self.doc >= 0

    @cached_property
    def has_pad(self) -> bool:
        return not bool(self.real.all())

    @cached_property
    def left(self) -> Tensor:
        """(B, T) bool: PAD before the first real token of its row."""
        return (self.real.long().cumsum(1) == 0) & self.real.any(1, keepdim=True)

    @cached_property
    def next_ok(self) -> Tensor:
        """(B, T) bool: position t has a next real token in its own document."""
        return self.real & (ahead(self.doc, -1) == self.doc)

    @cached_property
    def labels_ahead(self) -> int:
        """0: labels[t] is the token at t, as it should be; 1: the batch already shifted them."""
        if self.labels is None:
            return 0
        kept = self.labels != IGNORE
        same = (self.labels == self.ids)[kept].float().mean()
        shifted = (self.labels == ahead(self.ids, IGNORE))[:, :-1][kept[:, :-1]].float().mean()
        return int(bool(shifted > same))

    @cached_property
    def label_of_next(self) -> Tensor:
        """(B, T): what the batch's labels say about the token after t; the ids without labels."""
        source = self.ids if self.labels is None else self.labels
        return source if self.labels_ahead else ahead(source, IGNORE)

    @cached_property
    def ends(self) -> Tensor:
        """(B, T) bool: real, and followed by PAD or by another document."""
        ends = self.real & (ahead(self.doc, -1) != self.doc)
        ends[:, -1] &= self.left.any()  # only rows padded on the left surely end at the right edge
        return ends

    @cached_property
    def special(self) -> set[int]:
        """PAD, EOS, and what looks like BOS or EOS: one id that opens or closes every document."""
        found = {i for i in (self.pad_id, self.eos_id) if i is not None}
        opens = self.real & (ahead(self.doc.flip(1), -1).flip(1) != self.doc)
        for tokens in (self.ids[opens], self.ids[self.ends]):
            if len(tokens) > 1 and bool((tokens == tokens[0]).all()):
                found.add(int(tokens[0]))
        return found

    @cached_property
    def ordinary(self) -> Tensor:
        """Ids that may stand in for another: seen inside documents, and not special."""
        inner = self.next_ok.clone()
        inner[:, 1:] &= self.next_ok[:, :-1]
        pool = set(self.ids[inner].tolist()) - self.special
        if len(pool) < 3:  # too few to swap among: any id that is no special one
            pool = set(range(int(self.ids.max()) + 1)) - self.special
        return torch.tensor(sorted(pool), dtype=self.ids.dtype, device=self.ids.device)

    @cached_property
    def swappable(self) -> Tensor:
        """(B, T) bool: real and not special, or last; documents may hang on special ids."""
        special = torch.tensor(sorted(self.special), device=self.ids.device)
        last = self.real & (self.real.flip(1).long().cumsum(1).flip(1) == 1)
        return self.real & ~torch.isin(self.ids, special) | last

    # -- edits: each returns a new frame -------------------------------------------------------

    def each(self, edit: Callable[[str, Tensor], Tensor]) -> "AuditBatch":
        """Apply `edit(name, tensor)` to everything of shape (B, ...), what is known included."""
        rows = len(self.ids)
        batch = {
            k: edit(k, v) if isinstance(v, Tensor) and v.ndim and len(v) == rows else v
            for k, v in self.batch.items()
        }
        return replace(self, batch=batch, doc=edit("doc", self.doc), at=edit("at", self.at))

    def put(self, name: str, value: Tensor) -> "AuditBatch":
        return replace(self, batch={**self.batch, name: value})

    def rows(self, index: Tensor | list[int]) -> "AuditBatch":
        index = torch.as_tensor(index, device=self.ids.device)
        return self.each(lambda _, v: v[index])

    def cols(self, start: int, stop: int) -> "AuditBatch":
        """Columns start..stop-1."""
        shape = self.ids.shape

        def cut(name: str, v: Tensor) -> Tensor:
            if v.ndim >= 2 and v.shape[:2] == shape:
                return v[:, start:stop]
            if v.ndim >= 3 and v.shape[-1] == shape[1] == v.shape[-2]:
                return v[..., start:stop, start:stop]
            return v

        return self.each(cut)

    def bare(self, b: int) -> "AuditBatch":
        """Row b alone, without its PAD; positions that merely counted all slots begin anew."""
        row = self.rows([b]).cols(*span(self.real[b]))
        position, start = row.batch.get("position_ids"), span(self.real[b])[0]
        if isinstance(position, Tensor) and start and int(position[0, 0]) == start:
            return row.put("position_ids", position - start)
        return row

    def unpadded(self) -> "AuditBatch":
        """The longest row, and those that have as many PAD on each side; freed of their PAD."""
        longest = self.real[self.real.sum(1).argmax()]
        rows = (self.real == longest).all(1).nonzero()[:, 0]
        return self.rows(rows).cols(*span(longest))

    def swap(self, where: Tensor, seed: int) -> "AuditBatch":
        """Other ordinary tokens at `where` (B, T); special ids stay."""
        pool = self.ordinary
        need(len(pool) > 1, "fewer than two ordinary tokens to swap among")
        gen = torch.Generator().manual_seed(seed)
        pick = torch.randint(len(pool), self.ids.shape, generator=gen).to(self.ids.device)
        new = torch.where(pool[pick] == self.ids, pool[(pick + 1) % len(pool)], pool[pick])
        return self.put("input_ids", torch.where(where & self.swappable, new, self.ids))

    def pad(self, count: int, left: bool, like: "AuditBatch") -> "AuditBatch":
        """`count` more columns of PAD, each a copy of a PAD slot of `like`."""
        b, t = (like.left if left else ~like.real).nonzero()[-1].tolist()
        shape = self.ids.shape

        def grow(name: str, v: Tensor) -> Tensor:
            if v.ndim > 2 and v.shape[-1] == v.shape[-2] == shape[1]:
                raise UnexaminableError(f"{name} is not (B, T): it cannot be extended by PAD")
            if v.ndim < 2 or v.shape[:2] != shape:
                return v
            source = like.doc if name in ("doc", "at") else like.batch[name]  # -1, both
            block = source[b, t].expand(len(v), count, *v.shape[2:])
            return torch.cat([block, v] if left else [v, block], 1)

        return self.each(grow)


def ahead(x: Tensor, fill: int | bool) -> Tensor:
    """(B, T): what stands one column further, `fill` in the last."""
    out = x.roll(-1, 1)
    out[:, -1] = fill
    return out


def span(hit: Tensor) -> tuple[int, int]:
    """First and one past the last place of a (T,) bool."""
    at = hit.nonzero()[:, 0]
    return int(at[0]), int(at[-1]) + 1
