"""Set-ups whose logits or documents are placed unusually: last k logits, 1-D boundaries, EOS."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import EOS, PAD, Batch, Tiny, ce, feed, full, left, packed, padded, targets, tokens
from .registry import Cases, case
from .right import ZeroInit, unshifted

PLACEMENT = Cases()
add, add_right = PLACEMENT.add, PLACEMENT.add_right


class Last(Tiny):
    """Makes the logits of `keep` positions alone, the last ones, or those before `omit` others."""

    keep, omit, flat = 6, 0, False

    def forward(self, *a: Any, **k: Any) -> Tensor:
        head, self.head = self.head, nn.Identity()
        x = super().forward(*a, **k)
        self.head = head
        x = self.chosen(x)
        return head(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if self.flat else head(x)

    def chosen(self, x: Tensor) -> Tensor:
        return x[:, -self.keep - self.omit : x.shape[1] - self.omit]


class LastByIndex(Last):
    def chosen(self, x: Tensor) -> Tensor:
        return x[:, torch.arange(x.shape[1] - self.keep, x.shape[1])]


class LastBySplit(Last):
    def chosen(self, x: Tensor) -> Tensor:
        return x.split([x.shape[1] - self.keep, self.keep], 1)[1]


class Halves(Tiny):
    """Mixes in the token before by slices, and applies its head to each half of the row."""

    def forward(self, *a: Any, **k: Any) -> Tensor:
        head, self.head = self.head, nn.Identity()
        x = super().forward(*a, **k)
        self.head = head
        x = x + F.pad(x[:, 1:] - x[:, 1:] + x[:, :-1], (0, 0, 1, 0))
        return torch.cat([head(part) for part in x.split(x.shape[1] // 2, 1)], 1)


class LastOpen(Last):
    def causal(self, t: int) -> Tensor:
        return torch.ones(t, t, dtype=torch.bool)


class LastBySplitOpen(LastBySplit, LastOpen):
    pass


def last(model: nn.Module, batch: Batch, ahead: int = 1) -> Tensor:
    """The loss of as many columns as there are logits; `ahead` 1 is right."""
    z = feed(model, batch)
    source = batch.get("labels", batch["input_ids"])[:, -z.shape[1] :]
    return ce(z[:, : z.shape[1] - ahead], source[:, ahead:])


def before_last(model: nn.Module, batch: Batch, ahead: int = 1) -> Tensor:
    """The logits end before the last column, so that they fit the last labels as they are."""
    z = feed(model, batch)
    width = batch["input_ids"].shape[1]
    start = width - 1 - z.shape[1] + ahead
    return ce(z, batch["input_ids"][:, start : start + z.shape[1]])


def answers(seed: int, count: int = 5) -> Batch:
    """Prompts padded on the left, answers of `count` tokens, and a mask of the answers alone."""
    b = left(seed)
    del b["labels"]
    done = torch.ones(5, count, dtype=torch.long)
    return {**b, "completion_mask": done}


def completions(model: nn.Module, batch: Batch, extra: int = 1) -> Tensor:
    """As policy losses do: one more logit than there are tokens in the answer, without the last."""
    keep = batch["completion_mask"]
    model.keep = keep.shape[1] + extra  # type: ignore[assignment]
    z = feed(model, {k: v for k, v in batch.items() if k != "completion_mask"})
    z = z[:, : z.shape[1] - extra]
    ids = batch["input_ids"][:, -keep.shape[1] :]
    logp = z.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return -(logp * keep).sum() / keep.sum()


def prompted(seed: int) -> Batch:
    """Labels of the last five tokens alone."""
    b = left(seed)
    labels = b["labels"].clone()
    labels[:, :-5] = -100
    return {**b, "labels": labels}


def kept(**options: Any) -> type[Last]:
    return type("Kept", (Last,), options)


last_k = add_right("last_k", case(Last, full, last))
last_k_left = add_right("last_k_left", case(Last, left, last))
last_k_flat = add_right("last_k_flat", case(kept(flat=True), full, last))
last_k_before = add_right("last_k_before", case(kept(omit=1), full, before_last))
last_k_answers = add_right("last_k_answers", case(Last, answers, completions))
last_k_prompt = add_right("last_k_prompt", case(Last, prompted, last))
halves = add_right("halves", case(Halves))
add("shift", halves, "halves_unshifted", case(Halves, loss=unshifted))
add_right("last_k_zero_init", case(type("Z", (Last, ZeroInit), {}), full, last))
last_k_right = add_right("last_k_right_padded", case(kept(keep=9), padded, last))
for name, twin, make, batch, loss in (
    ("last_k_unshifted", last_k, Last, full, lambda m, b: last(m, b, 0)),
    ("last_k_twice", last_k, Last, full, lambda m, b: last(m, b, 2)),
    ("last_k_flat_unshifted", last_k_flat, kept(flat=True), full, lambda m, b: last(m, b, 0)),
    ("last_k_before_unshifted", last_k_before, kept(omit=1), full,
     lambda m, b: before_last(m, b, 0)),
    ("last_k_answers_unshifted", last_k_answers, Last, answers, lambda m, b: completions(m, b, 0)),
):  # fmt: skip
    add("shift", twin, name, case(make, batch, loss))
add("causal", last_k, "last_k_open", case(LastOpen, full, last))
by_index = add_right("last_k_index", case(LastByIndex, full, last))
by_split = add_right("last_k_split", case(LastBySplit, full, last))
add(
    "shift", by_index, "last_k_index_unshifted", case(LastByIndex, full, lambda m, b: last(m, b, 0))
)
add("causal", by_split, "last_k_split_open", case(LastBySplitOpen, full, last))
add("pad", last_k_prompt, "last_k_misses_one", case(kept(keep=5), prompted, last))


def varlen(seed: int, pad_end: int = 0, rows: int = 1) -> Batch:
    """Documents one after another in rows of 18, told by `cu_seqlens` over all rows."""
    gen = torch.Generator().manual_seed(seed)
    lengths = [n for b in range(rows) for n in ((6, 5, 7), (8, 4, 6))[(seed + b) % 2]]
    ids = torch.tensor([t for n in lengths for t in tokens(gen, n)]).view(rows, -1)
    cu = F.pad(torch.tensor(lengths).cumsum(0), (1, pad_end), value=0)
    cu[len(lengths) + 1 :] = ids.numel()
    return {"input_ids": ids, "cu_seqlens": cu.int(), "max_seqlen": max(lengths)}


def of_rows(seed: int) -> Batch:
    return varlen(seed, rows=2)


def lengths_only(seed: int) -> Batch:
    b = varlen(seed, rows=2)
    return {"input_ids": b["input_ids"], "doc_lens": b["cu_seqlens"].diff()}


def lengths_by_row(seed: int) -> Batch:
    """(B, n) lengths of the documents of each row, 0 where a row has fewer."""
    b = packed(seed)
    docs = b["document_ids"]
    lens = torch.stack([(docs == d).sum(1) for d in range(4)], 1)
    return {"input_ids": b["input_ids"], "doc_lens": lens}


def numbers(batch: Batch) -> Batch:
    """`document_ids` and positions that the boundaries of the batch state."""
    ids = batch["input_ids"]
    if "doc_lens" in batch and batch["doc_lens"].ndim == 2:
        ends = batch["doc_lens"].cumsum(1)
        at = torch.arange(ids.shape[1]).expand_as(ids).contiguous()
        doc = torch.searchsorted(ends, at, right=True)
        doc = doc.masked_fill(at >= ends[:, -1:], -1)
    else:
        lens = batch["doc_lens"] if "doc_lens" in batch else batch["cu_seqlens"].diff()
        assert int(lens.sum()) == ids.numel(), "the boundaries do not fit the ids"
        doc = torch.arange(len(lens)).repeat_interleave(lens).view_as(ids)
    same = doc[:, :, None] == doc[:, None]
    start = same.int().argmax(-1)
    return {"document_ids": doc, "position_ids": torch.arange(ids.shape[1]) - start}


class Varlen(Tiny):
    """Reads documents and positions off the boundaries; `sees`, `resets` are its switches."""

    sees = resets = True

    def forward(self, input_ids: Tensor, **k: Any) -> Tensor:  # type: ignore[override]
        n = numbers({"input_ids": input_ids, **k})
        docs = n["document_ids"] if self.sees else torch.zeros_like(input_ids)
        return super().forward(input_ids, None, n["position_ids"] if self.resets else None, docs)


class Blind(Varlen):
    sees = False


class Running(Varlen):
    resets = False


class FirstRow(Varlen):
    """Takes a single row, as a kernel for one flattened row does."""

    def forward(self, input_ids: Tensor, **k: Any) -> Tensor:  # type: ignore[override]
        assert len(input_ids) == 1, "one flattened row is needed"
        return super().forward(input_ids, **k)


class FirstRowBlind(FirstRow, Blind):
    pass


class FirstRowOpen(FirstRow):
    def causal(self, t: int) -> Tensor:
        return torch.ones(t, t, dtype=torch.bool)


def within(model: nn.Module, batch: Batch) -> Tensor:
    return ce(feed(model, batch), targets({**batch, **numbers(batch)}))


def across(model: nn.Module, batch: Batch) -> Tensor:
    return ce(feed(model, batch)[:, :-1], batch["input_ids"][:, 1:])


for name, twin_name, make_batch in (
    ("varlen", "cu_seqlens", varlen), ("varlen_rows", "cu_seqlens_rows", of_rows),
    ("varlen_padded", "cu_seqlens_padded", lambda s: varlen(s, 4)),
    ("lengths", "doc_lens", lengths_only), ("lengths_by_row", "doc_lens_rows", lengths_by_row),
):  # fmt: skip
    twin = add_right(name, case(Varlen, make_batch, within))
    add("causal", twin, f"{twin_name}_not_masked", case(Blind, make_batch, within))
    add("position", twin, f"{twin_name}_running", case(Running, make_batch, within))
    if name != "lengths_by_row":
        add("shift", twin, f"{twin_name}_across", case(Varlen, make_batch, across))
one_row = add_right("varlen_one_row", case(FirstRow, varlen, within))
add("causal", one_row, "cu_seqlens_one_row_not_masked", case(FirstRowBlind, varlen, within))
add("causal", one_row, "cu_seqlens_one_row_open", case(FirstRowOpen, varlen, within))


class RowLengths(Tiny):
    """The real length of each row, as `pack_padded_sequence` wants it."""

    def forward(self, input_ids: Tensor, lengths: Tensor, **k: Any) -> Tensor:  # type: ignore[override]
        assert int(lengths.max()) <= input_ids.shape[1] and len(lengths) == len(input_ids)
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        return super().forward(input_ids, mask)


def row_lengths(seed: int) -> Batch:
    b = padded(seed)
    return {
        "input_ids": b["input_ids"],
        "labels": b["labels"],
        "lengths": b["attention_mask"].sum(1),
    }


add_right("row_lengths", case(RowLengths, row_lengths))


def eos_next(seed: int) -> Batch:
    """Packed rows whose documents are numbered anew at EOS, not after it."""
    b = packed(seed)
    ids, pad = b["input_ids"], b["document_ids"] < 0
    doc = (ids == EOS).long().cumsum(1)
    at = torch.arange(ids.shape[1]).expand_as(ids)
    pos = at - torch.where(ids == EOS, at, 0).cummax(1).values
    return {
        "input_ids": ids, "document_ids": doc.masked_fill(pad, -1),
        "position_ids": pos.masked_fill(pad, 0),
    }  # fmt: skip


def eos_next_positions(seed: int) -> Batch:
    b = eos_next(seed)
    return {"input_ids": b["input_ids"], "position_ids": b["position_ids"]}


def all_real(model: nn.Module, batch: Batch) -> Tensor:
    """Every real token is a target, also the first of a document."""
    ids = batch["input_ids"]
    return ce(feed(model, batch)[:, :-1], ids[:, 1:].masked_fill(ids[:, 1:] == PAD, -100))


class FromPositions(Tiny):
    """Documents begin where positions do."""

    def forward(self, input_ids: Tensor, position_ids: Tensor, **k: Any) -> Tensor:  # type: ignore[override]
        doc = (position_ids == 0).long().cumsum(1)
        return super().forward(input_ids, position_ids=position_ids, document_ids=doc)


class SeesBoth(Tiny):
    """EOS belongs to both documents, and carries the first into the second."""

    def visible(self, ids: Tensor, mask: Tensor | None, docs: Tensor | None) -> Tensor:
        after = docs - (ids == EOS).long()  # type: ignore[operator]
        mixed = torch.where(ids == EOS, after, docs)[:, None, :, None]  # of the query
        return (super().visible(ids, None, None) & (mixed == docs[:, None, None])) | (  # type: ignore[index]
            super().visible(ids, None, docs)
        )


eos_right = add_right("eos_of_next_document", case(batch=eos_next, loss=all_real))
add_right("eos_of_next_by_position", case(FromPositions, eos_next_positions, all_real))
add("eos", eos_right, "eos_of_next_never_counted", case(batch=eos_next))
add("causal", eos_right, "eos_of_next_open", case(SeesBoth, eos_next, all_real))
