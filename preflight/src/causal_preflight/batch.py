"""`AuditBatch`: a batch with what is known of it, and the edits that probes make to it."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from causal_preflight.report import UnexaminableError, require

IGNORE = -100


@dataclass(frozen=True)
class AuditBatch:
    """A batch, of which edits (swap, cut, pad) change all tensors alike.

    Args:
        raw: what the loss is given; `input_ids` is (B, T).
        doc: (B, T) int, number of the document within its row, -1 at PAD.
        slot: (B, T) int, the slot of the user's batch that lies here (row * T + column), or -1.
        pad_id, eos_id: None where unknown.
        writers: entries of `raw` that an edit makes anew of `doc`, as `cu_seqlens`.
        stale: the name of an entry that would no longer fit after an edit.
        noised: (B, T) bool, where the embedding gets noise.
    """

    raw: dict[str, Any]
    doc: Tensor
    slot: Tensor
    pad_id: int | None
    eos_id: int | None
    writers: dict[str, Callable[[Tensor], Any]] = field(default_factory=dict)
    stale: str = ""
    noised: Tensor | None = None

    @property
    def ids(self) -> Tensor:
        """(B, T) token ids."""
        return self.raw["input_ids"]

    @property
    def labels(self) -> Tensor | None:
        """(B, T), or None where the batch has none."""
        return self.raw.get("labels")

    @cached_property
    def real(self) -> Tensor:
        """(B, T) bool, False at PAD."""
        return self.doc >= 0

    @cached_property
    def has_pad(self) -> bool:
        """Whether any slot is PAD."""
        return not bool(self.real.all())

    @cached_property
    def left_pad(self) -> Tensor:
        """(B, T) bool: PAD before the first real token of its row."""
        return (self.real.long().cumsum(1) == 0) & self.real.any(1, keepdim=True)

    @cached_property
    def has_target(self) -> Tensor:
        """(B, T) bool: a real position followed by a real token of the same document."""
        return self.real & (shift(self.doc, 1, -1) == self.doc)

    @cached_property
    def opens(self) -> Tensor:
        """(B, T) bool: real, and the first token of its row or document."""
        return self.real & (shift(self.doc, -1, -2) != self.doc)

    @cached_property
    def opening_eos(self) -> Tensor:
        """(B, T) bool: an EOS that is numbered as the first token of the next document."""
        return (self.ids == self.eos_id) & self.opens & shift(self.real, -1, False)

    @cached_property
    def labels_shifted(self) -> int:
        """0: labels[t] is the token at t; 1: labels[t] is the token at t + 1 already."""
        if self.labels is None:
            return 0
        kept = self.labels != IGNORE
        same = (self.labels == self.ids)[kept].float().mean()
        next_ids = self.labels[:, :-1] == self.ids[:, 1:]
        return int(bool(next_ids[kept[:, :-1]].float().mean() > same))

    @cached_property
    def label_of_next(self) -> Tensor:
        """(B, T): the label that the batch gives the token after t; its id without labels."""
        source = self.ids if self.labels is None else self.labels
        return source if self.labels_shifted else shift(source, 1, IGNORE)

    @cached_property
    def ends(self) -> Tensor:
        """(B, T) bool: real, and followed by PAD or by another document."""
        ends = self.real & (shift(self.doc, 1, -1) != self.doc)
        ends[:, -1] &= self.left_pad.any()  # elsewhere the right edge may cut a document
        return ends

    @cached_property
    def special(self) -> Tensor:
        """PAD, EOS, and any id that opens or closes every document."""
        found = {i for i in (self.pad_id, self.eos_id) if i is not None}
        for tokens in (self.ids[self.opens], self.ids[self.ends]):
            if len(tokens) > 1 and bool((tokens == tokens[0]).all()):
                found.add(int(tokens[0]))
        return torch.tensor(sorted(found), dtype=self.ids.dtype, device=self.ids.device)

    @cached_property
    def ordinary(self) -> Tensor:
        """Ids that can replace one another: seen inside documents, and not special."""
        inner = self.has_target & shift(self.has_target, -1, True)
        top = int(self.ids.max()) + 1  # too few to swap among: take any id that is not special
        for pool in (self.ids[inner].unique(), torch.arange(top).to(self.ids)):
            pool = pool[~torch.isin(pool, self.special)]
            if len(pool) > 2:
                break
        return pool

    @cached_property
    def swappable(self) -> Tensor:
        """(B, T) bool: real and not special (which may mark documents), or last in its row."""
        last = self.real & (self.real.flip(1).long().cumsum(1).flip(1) == 1)
        return self.real & ~torch.isin(self.ids, self.special) | last

    def map_tensors(self, edit: Callable[[str, Tensor], Tensor]) -> "AuditBatch":
        """Apply `edit(name, tensor)` to every tensor of shape (B, ...), `doc` and `slot` too."""
        require(not self.stale, f"`{self.stale}` cannot be kept in step with an edit of the batch")
        rows = len(self.ids)
        tensors = {k: v for k, v in self.raw.items() if isinstance(v, Tensor) and v.ndim}
        edited = {k: edit(k, v) for k, v in tensors.items() if len(v) == rows}
        doc = edit("doc", self.doc)
        edited |= {k: write(doc) for k, write in self.writers.items()}
        return replace(self, raw=self.raw | edited, doc=doc, slot=edit("slot", self.slot))

    def with_tensor(self, name: str, value: Tensor) -> "AuditBatch":
        """The batch with another tensor in `raw`."""
        return replace(self, raw={**self.raw, name: value})

    def rows(self, index: Tensor | list[int]) -> "AuditBatch":
        """The rows of these numbers, in this order; a row may be repeated."""
        index = torch.as_tensor(index, device=self.ids.device)
        return self.map_tensors(lambda _, v: v[index.to(v.device)])

    def halves(self) -> list["AuditBatch"]:
        """The first and the last rows, of which one row gives the first alone."""
        parts = torch.arange(len(self.ids)).split((len(self.ids) + 1) // 2)
        return [replace(self, stale="").rows(part) for part in parts]

    def cols(self, start: int, stop: int) -> "AuditBatch":
        """Columns start to stop - 1."""

        def cut(name: str, v: Tensor) -> Tensor:
            if v.shape[:2] == self.ids.shape:
                return v[:, start:stop]
            square = v.ndim > 2 and v.shape[-1] == v.shape[-2] == self.ids.shape[1]
            return v[..., start:stop, start:stop] if square else v

        return self.map_tensors(cut)

    def unpadded(self, b: int | None = None) -> "AuditBatch":
        """Row b, or the longest row and those padded exactly like it, without their PAD."""
        row = self.real[self.real.sum(1).argmax() if b is None else b]
        alike = (self.real == row).all(1).nonzero()[:, 0].tolist() if b is None else [b]
        start, stop = span(row)
        cut = self.rows(alike).cols(start, stop)
        position = cut.raw.get("position_ids")
        if isinstance(position, Tensor) and start and int(position[0, 0]) == start:
            # They counted every slot: they start at 0 again.
            return cut.with_tensor("position_ids", position - start)
        return cut

    def swap(self, where: Tensor, seed: int, special: bool = False) -> "AuditBatch":
        """Other ordinary tokens at `where`; special ids stay, or that of PAD alone."""
        pool = self.ordinary
        require(len(pool) > 1, "fewer than two ordinary tokens to swap among")
        gen = torch.Generator().manual_seed(seed)
        pick = torch.randint(len(pool), self.ids.shape, generator=gen).to(self.ids.device)
        new = torch.where(pool[pick] == self.ids, pool[(pick + 1) % len(pool)], pool[pick])
        pad = -1 if self.pad_id is None else self.pad_id  # the loss may tell PAD by its id
        may = self.swappable | (special & self.real & (self.ids != pad))
        return self.with_tensor("input_ids", torch.where(where & may, new, self.ids))

    def pad(self, count: int, like: "AuditBatch") -> "AuditBatch":
        """`count` more columns, each a copy of a PAD slot of `like`, on the side of its PAD."""
        left = bool(like.left_pad.any()) and bool(like.real[:, -1].all())
        b, t = (like.left_pad if left else ~like.real).nonzero()[-1].tolist()

        def grow(name: str, v: Tensor) -> Tensor:
            if v.ndim > 2 and v.shape[-1] == v.shape[-2] == self.ids.shape[1]:
                raise UnexaminableError(f"{name} is not (B, T): it cannot be extended by PAD")
            if v.shape[:2] != self.ids.shape:
                return v
            source = like.doc if name in ("doc", "slot") else like.raw[name]  # -1 in both
            block = source[b, t].expand(len(v), count, *v.shape[2:])
            return torch.cat([block, v] if left else [v, block], 1)

        return self.map_tensors(grow)


def like_ids(raw: dict[str, Any], name: str) -> Tensor | None:
    """The entry of this name, if it is a tensor (B, T)."""
    value = raw.get(name)
    return value if isinstance(value, Tensor) and value.shape == raw["input_ids"].shape else None


def shift(x: Tensor, by: int, fill: int | bool) -> Tensor:
    """(B, T) -> (B, T): column t holds column t + `by`, which is 1 or -1; beyond it is `fill`."""
    out = x.roll(-by, 1)
    out[:, min(0, -by)] = fill
    return out


def one_a_row(where: Tensor, sixths: int) -> Tensor:
    """(B, T) bool: in each row one of the True places, after `sixths` / 6 of them."""
    rank = where.long().cumsum(1)
    return where & (rank == 1 + rank[:, -1:] * sixths // 6)


def span(hit: Tensor) -> tuple[int, int]:
    """First and one past the last True of a (T,) bool."""
    places = hit.nonzero()[:, 0]
    return int(places[0]), int(places[-1]) + 1
