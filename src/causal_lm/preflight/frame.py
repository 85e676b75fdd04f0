"""What a batch means: which slots are real, which documents they belong to, what should count.

A `Frame` is a batch with that knowledge attached, so that an edit (swap, cut, extend, fill) keeps
both in step. Every probe works on edited frames and never on the model's insides.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

IGNORE = -100
_AT_PAD = {"attention_mask": 0, "labels": IGNORE, "document_ids": -1}


class UnexaminableError(Exception):
    """A probe has nothing to look at here; the reason lands in `Report.skipped`."""


@dataclass(frozen=True)
class Frame:
    """A batch and what is known of it.

    Args:
        batch: tensors; `input_ids` is (B, T).
        real: (B, T) bool, False at PAD.
        doc: (B, T) int, the document within the row, -1 at PAD.
        pad_id: the id at PAD slots, None where unknown.
        eos_id: the id that ends a document, None where unknown.
    """

    batch: dict[str, Any]
    real: Tensor
    doc: Tensor
    pad_id: int | None
    eos_id: int | None

    @property
    def ids(self) -> Tensor:
        ids: Tensor = self.batch["input_ids"]
        return ids

    @property
    def labels(self) -> Tensor | None:
        labels = self.batch.get("labels")
        return labels if labels is not None and labels.shape == self.ids.shape else None

    @cached_property
    def has_pad(self) -> bool:
        return not bool(self.real.all())

    @cached_property
    def left(self) -> Tensor:
        """(B, T) bool: PAD before the first real token of its row."""
        return ~self.real & (self.real.long().cumsum(1) == 0) & self.real.any(1, keepdim=True)

    @cached_property
    def next_ok(self) -> Tensor:
        """(B, T) bool: position t has a next real token in its own document."""
        ok = torch.zeros_like(self.real)
        ok[:, :-1] = self.real[:, :-1] & self.real[:, 1:] & (self.doc[:, :-1] == self.doc[:, 1:])
        return ok

    @cached_property
    def labels_ahead(self) -> int:
        """0: labels[t] is the token at t, as it should be; 1: the batch already shifted them."""
        if self.labels is None or self.labels.shape[1] < 2:
            return 0
        kept = self.labels != IGNORE
        same = (self.labels == self.ids)[kept].float().mean()
        ahead = (self.labels[:, :-1] == self.ids[:, 1:])[kept[:, :-1]].float().mean()
        return int(bool(ahead > same))

    @cached_property
    def label_of_next(self) -> Tensor:
        """(B, T): what the batch's labels say about the token after t; the ids without labels."""
        out = torch.full_like(self.ids, IGNORE)
        source = self.ids if self.labels is None else self.labels
        if self.labels is not None and self.labels_ahead:
            return source.clone()
        out[:, :-1] = source[:, 1:]
        return out

    @cached_property
    def ends(self) -> Tensor:
        """(B, T) bool: real, and followed by PAD or by another document."""
        out = torch.zeros_like(self.real)
        out[:, :-1] = self.real[:, :-1] & (self.doc[:, :-1] != self.doc[:, 1:])
        if bool(self.left.any()):  # padded on the left: rows end at the right edge
            out[:, -1] = self.real[:, -1]
        return out

    @cached_property
    def special(self) -> set[int]:
        """PAD, EOS, and what looks like BOS or EOS: one id that opens or closes every document."""
        found = {i for i in (self.pad_id, self.eos_id) if i is not None}
        opens = self.real.clone()
        opens[:, 1:] &= ~self.real[:, :-1] | (self.doc[:, 1:] != self.doc[:, :-1])
        for edge in (opens, self.ends):
            tokens = self.ids[edge]
            if len(tokens) > 1 and bool((tokens == tokens[0]).all()):
                found.add(int(tokens[0]))
        return found

    @cached_property
    def ordinary(self) -> Tensor:
        """Ids that may stand in for another: seen inside documents, and not special."""
        inner = self.next_ok.clone()
        inner[:, 1:] &= self.next_ok[:, :-1]
        pool = [i for i in sorted(set(self.ids[inner].tolist())) if i not in self.special]
        if len(pool) < 3:  # too few to swap among: any id that is no special one
            pool = [i for i in range(int(self.ids.max()) + 1) if i not in self.special]
        return torch.tensor(pool, dtype=self.ids.dtype, device=self.ids.device)

    @cached_property
    def swappable(self) -> Tensor:
        """(B, T) bool: real and not special; documents may hang on special ids."""
        free = self.real.clone()
        for i in self.special:
            free &= self.ids != i
        after = self.real.flip(1).long().cumsum(1).flip(1)
        return free | (self.real & (after == 1))

    # -- edits: each returns a new frame -------------------------------------------------------

    def each(self, edit: Callable[[str, Tensor], Tensor]) -> "Frame":
        """Apply `edit(name, tensor)` to everything of shape (B, ...), `real` and `doc` included."""
        rows = self.ids.shape[0]
        batch = {
            k: edit(k, v) if isinstance(v, Tensor) and v.ndim and v.shape[0] == rows else v
            for k, v in self.batch.items()
        }
        return replace(self, batch=batch, real=edit("real", self.real), doc=edit("doc", self.doc))

    def put(self, name: str, value: Tensor) -> "Frame":
        return replace(self, batch={**self.batch, name: value})

    def rows(self, index: Tensor | list[int]) -> "Frame":
        index = torch.as_tensor(index, device=self.ids.device)
        return self.each(lambda _, v: v[index])

    def cols(self, start: int, stop: int) -> "Frame":
        """Columns start..stop-1."""
        shape = self.ids.shape

        def cut(name: str, v: Tensor) -> Tensor:
            if v.ndim >= 2 and v.shape[:2] == shape:
                return v[:, start:stop]
            if v.ndim >= 3 and v.shape[-1] == shape[1] == v.shape[-2]:
                return v[..., start:stop, start:stop]
            return v

        return self.each(cut)

    def bare(self, b: int) -> "Frame":
        """Row b alone, without its PAD; positions that merely counted all slots begin anew."""
        at = self.real[b].nonzero()[:, 0]
        start = int(at[0])
        row = self.rows([b]).cols(start, int(at[-1]) + 1)
        position = row.batch.get("position_ids")
        if isinstance(position, Tensor) and start and int(position[0, 0]) == start:
            return row.put("position_ids", position - start)
        return row

    def swap(self, where: Tensor, seed: int) -> "Frame":
        """Other ordinary tokens at `where` (B, T); special ids stay."""
        pool = self.ordinary
        if len(pool) < 2:
            raise UnexaminableError("fewer than two ordinary tokens to swap among")
        gen = torch.Generator().manual_seed(seed)
        pick = torch.randint(len(pool), self.ids.shape, generator=gen).to(self.ids.device)
        new = pool[pick]
        new = torch.where(new == self.ids, pool[(pick + 1) % len(pool)], new)
        ids = torch.where(where & self.swappable, new, self.ids)
        return self.put("input_ids", ids)

    def pad(self, count: int, left: bool = False) -> "Frame":
        """`count` more columns of PAD, marked as the batch itself marks them."""
        if self.pad_id is None:
            raise UnexaminableError("no PAD in the batch and no pad_id given")
        shape, pads = self.ids.shape, ~self.real
        if any(k == "attention_mask" and v.ndim != 2 for k, v in self.batch.items()):
            raise UnexaminableError("attention_mask is not (B, T): it cannot be extended by PAD")

        def grow(name: str, v: Tensor) -> Tensor:
            if v.ndim < 2 or v.shape[:2] != shape:
                return v
            block = v[:, :1] if left else v[:, -1:]
            value: int | float | None
            value = {"input_ids": self.pad_id, "real": 0, "doc": -1}.get(name, _AT_PAD.get(name))
            if name not in ("input_ids", "real", "doc", "position_ids") and bool(pads.any()):
                value = v[pads].flatten()[0].item()  # the batch's own habit
            elif value is None and name != "position_ids":
                value = 0
            block = block if value is None else torch.full_like(block, value)
            added = block.repeat(1, count)
            return torch.cat([added, v] if left else [v, added], 1)

        return self.each(grow)

    def filled(self, seed: int) -> "Frame":
        """The same shapes with nothing padded: PAD slots become real tokens of the next document.

        Right PAD continues the row's last document, left PAD is where its first one now begins.
        """
        mask = self.batch.get("attention_mask")
        if mask is not None and mask.ndim != 2:
            raise UnexaminableError("attention_mask is not (B, T): it cannot be filled")
        doc = self.doc.clone()
        for t in range(1, doc.shape[1]):
            doc[:, t] = torch.where(doc[:, t] < 0, doc[:, t - 1], doc[:, t])
        first = torch.where(doc >= 0, doc, doc.max() + 1).min(1, keepdim=True).values
        doc = torch.where(doc < 0, first, doc)
        gen = torch.Generator().manual_seed(seed)
        pick = torch.randint(len(self.ordinary), self.ids.shape, generator=gen)
        ids = torch.where(self.real, self.ids, self.ordinary[pick.to(self.ids.device)])
        new = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "document_ids": doc}
        new |= {"labels": ids, "position_ids": _positions(doc)}
        keep = {"attention_mask", "input_ids", "labels"}
        batch = dict(self.batch)
        for name in new.keys() & batch.keys():
            old, value = batch[name], new[name].to(batch[name].dtype)
            batch[name] = torch.where(self.real, old, value) if name in keep else value
        return replace(self, batch=batch, real=torch.ones_like(self.real), doc=doc)


def _positions(doc: Tensor) -> Tensor:
    """0, 1, 2, ... anew in each document of each row (B, T)."""
    where = torch.arange(doc.shape[1], device=doc.device).expand_as(doc)
    starts = torch.ones_like(doc, dtype=torch.bool)
    starts[:, 1:] = doc[:, 1:] != doc[:, :-1]
    return where - torch.where(starts, where, 0).cummax(1).values
