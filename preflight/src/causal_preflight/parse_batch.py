"""Make an `AuditBatch` of a raw batch: check it, find its PAD slots and its documents.

`document_ids` and `attention_mask` are used as given. The rest is inferred from pad_id, the labels,
from numbers that state where documents begin (`cu_seqlens`, `doc_lens`), or positions that restart.
"""

import dataclasses
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from causal_preflight.batch import IGNORE, AuditBatch, like_ids


def named_tensors(
    batch: Any, input_key: str = "input_ids", labels_key: str = "labels"
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """Name the parts of a batch `input_ids`, `labels`, ...; and the way back to its own type.

    A dataclass is rebuilt by its constructor, so that cached properties are computed anew; a
    mapping by its own, or as a dict where that takes no dict.

    Raises:
        ValueError: no token ids are found in it; one line that names what was found.
    """
    if isinstance(batch, Tensor):
        return {"input_ids": batch}, lambda raw: raw["input_ids"]
    if type(batch) in (tuple, list) and batch and isinstance(batch[0], Tensor):
        keys = ["input_ids", *map(str, range(1, len(batch)))]
        second = batch[1] if len(batch) > 1 else None
        if isinstance(second, Tensor) and second.shape == batch[0].shape:
            is_mask = not batch[0].le(1).all() and set(second.unique().tolist()) <= {0, 1}
            keys[1] = "attention_mask" if is_mask else "labels"
        elif getattr(second, "shape", None) == batch[0].shape:  # of NumPy: refused as labels
            keys[1] = "labels"
        return dict(zip(keys, batch, strict=True)), lambda raw: type(batch)(raw[k] for k in keys)
    make: Callable[..., Any] = type(batch)
    if isinstance(batch, Mapping):
        fields, make = dict(batch), partial(_mapping, make)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.init}
    elif hasattr(batch, "_asdict"):
        fields = batch._asdict()
    else:
        kind = type(batch).__name__
        raise ValueError(f"a batch of type {kind} cannot be audited: pass a dict with `input_ids`")
    if input_key not in fields:
        has = ", ".join(map(str, fields)) or "nothing"
        raise ValueError(f"batch needs `{input_key}`, but has {has}: pass input_key=, labels_key=")
    swap = {"input_ids": input_key, "labels": labels_key}  # both ways: a batch may have both names
    swap |= {input_key: "input_ids", labels_key: "labels"}
    raw = {swap.get(k, k): v for k, v in fields.items()}
    return raw, lambda raw: make(**{swap.get(k, k): v for k, v in raw.items()})


def _mapping(kind: Callable[..., Any], /, **fields: Any) -> Any:
    """A mapping of this kind with these fields, or a dict where its constructor gives another."""
    with suppress(Exception):
        if dict(made := kind(fields)).keys() == fields.keys():
            return made
    return fields


def parse_batch(raw: dict[str, Any], pad_id: int | None, eos_id: int | None) -> AuditBatch:
    """Check the batch and infer what it does not state.

    Raises:
        ValueError: it cannot be audited; one line that says what to change.
    """
    ids = raw["input_ids"]
    if not isinstance(ids, Tensor):
        raise ValueError(f"`input_ids` must be a (B, T) tensor of ids, got {type(ids).__name__}")
    if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        raise ValueError(f"`input_ids` must be integers (B, T), got {ids.dtype} {tuple(ids.shape)}")
    if int(ids.min()) < 0:
        raise ValueError("`input_ids` holds negative ids: -100 belongs in `labels`, not here")
    for key in ("labels", "document_ids"):
        if raw.get(key) is not None and like_ids(raw, key) is None:
            raise ValueError(f"`{key}` must be a tensor of the shape {tuple(ids.shape)} of the ids")
    raw = {k: v.detach() if isinstance(v, Tensor) else v for k, v in raw.items()}
    real, pad_id = _real(raw, pad_id, eos_id)
    slots = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    doc = torch.where(real, _documents(raw, real), -1)
    ways = {name: writer(v, doc) for name, v in _boundaries(raw, doc).items()}
    stale = next((k for k, way in ways.items() if not way and len(raw[k]) != len(ids)), "")
    writers = {k: way for k, way in ways.items() if way}
    return AuditBatch(raw, doc, slots, pad_id, eos_id, writers, stale)


def _real(raw: dict[str, Any], pad_id: int | None, eos_id: int | None) -> tuple[Tensor, int | None]:
    """(B, T) bool, and the id at PAD slots where it can be told."""
    ids, mask, docs = raw["input_ids"], like_ids(raw, "attention_mask"), raw.get("document_ids")
    real = torch.ones_like(ids).bool() if mask is None else mask != 0
    if isinstance(docs, Tensor):
        real &= docs >= 0
    elif mask is None:
        pad_id = _pad_by_labels(raw) if pad_id is None else pad_id
        run = _edge_runs(ids == (-1 if pad_id is None else pad_id))
        if pad_id == eos_id and ids.shape[1] > 1:
            if not bool((run[:, :2].all(1) & ~run.all(1)).any()):  # no PAD on the left
                run[:, 0] &= run[:, 1]  # it is a BOS of the same id
            run[:, 1:] &= run[:, :-1].clone()  # the first that closes a document is its EOS
        real = ~run
    if pad_id is None and not bool(real.all()):
        pad_id = int(ids[~real].mode().values)
    return real, pad_id


def _edge_runs(hit: Tensor) -> Tensor:
    """(B, T) bool: the runs of True that touch the left or the right edge."""
    leading, closing = hit.long().cumprod(1), hit.flip(1).long().cumprod(1).flip(1)
    return (leading | closing).bool()


def _pad_by_labels(raw: dict[str, Any]) -> int | None:
    """An id that closes (or opens) rows, is ignored there, and is a label nowhere."""
    labels, ids = raw.get("labels"), raw["input_ids"]
    if labels is None or bool((labels == IGNORE).all()):
        return None
    for edge in (-1, 0):
        candidates = ids[:, edge][labels[:, edge] == IGNORE].unique()
        if len(candidates) == 1 and not bool((labels == candidates).any()):
            pad = int(candidates)
            return pad if int(_edge_runs(ids == pad).sum(1).max()) > 1 else None
    return None


def _documents(raw: dict[str, Any], real: Tensor) -> Tensor:
    """(B, T): document_ids, or an attention_mask of 1, 1, 2, 2, 3 that numbers the documents.

    Else boundaries such as `cu_seqlens`; else a position that restarts begins a new document.
    """
    if isinstance(raw.get("document_ids"), Tensor):
        return raw["document_ids"].long()
    mask, position = like_ids(raw, "attention_mask"), like_ids(raw, "position_ids")
    if mask is not None and int(mask.max()) > 1:
        return mask.long() - 1
    if (stated := documents_of(raw, real)) is not None:
        return stated
    doc = torch.zeros_like(real, dtype=torch.long)
    if position is not None and bool(real.any()):
        pair = real[:, 1:] & real[:, :-1]
        on = position[:, 1:] == position[:, :-1] + 1
        restart = pair & ~on & (position[:, 1:] == position[real].min())
        # Used only if positions count by one between restarts: else they mean something else.
        if bool((on | restart)[pair].all()) and bool((on & pair).any()):
            doc[:, 1:] = restart.long().cumsum(1)
    return doc


def _boundaries(raw: dict[str, Any], like: Tensor) -> dict[str, Tensor]:
    """Integers (n,) or (B, n) that are not as wide as the rows (B, T).

    They may be the lengths of the documents, or their cumulative sum, of all rows or of each.
    """
    tensors = {k: v for k, v in raw.items() if isinstance(v, Tensor) and v.ndim in (1, 2)}
    whole = {k: v for k, v in tensors.items() if not v.is_floating_point() and v.numel()}
    return {k: v for k, v in whole.items() if v.shape != like.shape and v.dtype != torch.bool}


def documents_of(raw: dict[str, Any], real: Tensor) -> Tensor | None:
    """(B, T) numbers of the documents, ascending, that an entry states; None if none does."""
    for value in _boundaries(raw, real).values():
        table = value if value.ndim == 2 else value[None]
        for lens, on in product((table, table.diff()), (real, torch.ones_like(real))):
            slots = on.sum(1) if value.ndim == 2 else on.sum()[None]
            if bool((lens >= 0).all()) and torch.equal(lens.sum(1), slots):
                doc = torch.full_like(real, -1, dtype=torch.long)
                number = torch.arange(lens.numel()).to(lens).long()
                doc[on] = number.repeat_interleave(lens.flatten())
                if bool((doc[:, 1:] != doc[:, :-1])[real[:, 1:] & real[:, :-1]].any()):
                    return doc
    return None


def writer(value: Tensor, doc: Tensor) -> Callable[[Tensor], Tensor] | None:
    """What makes the entry of document numbers (B, T), -1 at PAD; None if it is not made of them.

    PAD may be left out, or be a document.
    """
    options = product((False, True), (False, True), (False, True))
    ways = (partial(_write, value, *option) for option in options)
    return next((way for way in ways if torch.equal(way(doc), value)), None)


def _write(like: Tensor, cumulative: bool, filled: bool, with_pad: bool, doc: Tensor) -> Tensor:
    """`filled`: up to the size of `like`, with 0 or the last sum."""
    kept = [row if with_pad else row[row >= 0] for row in doc]
    runs = [row.unique_consecutive(return_counts=True)[1] for row in kept]
    runs = [run if len(run) else run.new_zeros(1) for run in runs]
    runs = runs if like.ndim == 2 else [torch.cat(runs)]
    if cumulative:
        runs = [F.pad(run.cumsum(0), (1, 0)) for run in runs]
    size = max(like.shape[-1] * filled, *map(len, runs))
    rows = [F.pad(r, (0, size - len(r)), value=int(r[-1]) * cumulative) for r in runs]
    return (torch.stack(rows) if like.ndim == 2 else rows[0]).to(like)
