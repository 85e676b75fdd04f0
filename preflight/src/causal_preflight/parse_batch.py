"""Make an `AuditBatch` of a raw batch: check it, find its PAD slots and its documents.

`document_ids` and `attention_mask` are used as given. The rest is inferred from pad_id,
the labels, or positions that restart.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from causal_preflight.batch import IGNORE, AuditBatch
from causal_preflight.boundaries import documents_of, entries, writer


def named_tensors(
    batch: Any, input_key: str = "input_ids", labels_key: str = "labels"
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """Name the parts of a batch `input_ids`, `labels`, ...; and the way back to its own type.

    A dataclass is rebuilt by its constructor, so that a property cached on the original is computed
    anew from edited tensors.

    Raises:
        ValueError: no (B, T) token ids are found in it; one line that names what was found.
    """
    own = {"input_ids": input_key, "labels": labels_key}
    if isinstance(batch, Tensor):
        return {"input_ids": batch}, lambda raw: raw["input_ids"]
    if type(batch) in (tuple, list) and batch and isinstance(batch[0], Tensor):
        second = getattr(batch[-1] if len(batch) == 1 else batch[1], "shape", None)
        labels = "labels" if second == batch[0].shape else "1"
        keys = ["input_ids", labels, *map(str, range(2, len(batch)))][: len(batch)]
        return dict(zip(keys, batch, strict=True)), lambda raw: type(batch)(raw[k] for k in keys)
    if isinstance(batch, Mapping):
        fields, make = dict(batch), lambda **parts: parts
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        names = [f.name for f in dataclasses.fields(batch) if f.init]
        fields, make = {name: getattr(batch, name) for name in names}, type(batch)
    elif hasattr(batch, "_asdict"):
        fields, make = batch._asdict(), type(batch)
    else:
        kind = type(batch).__name__
        raise ValueError(f"a batch of type {kind} cannot be audited: pass a dict with `input_ids`")
    if input_key not in fields:
        has = ", ".join(map(str, fields)) or "nothing"
        raise ValueError(f"batch needs `{input_key}`, but has {has}: pass input_key=, labels_key=")
    to_ours = {theirs: ours for ours, theirs in own.items()}
    raw = {to_ours.get(k, k): v for k, v in fields.items()}
    return raw, lambda raw: make(**{own.get(k, k): v for k, v in raw.items()})


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
        if isinstance(raw.get(key), Tensor) and raw[key].shape != ids.shape:
            raise ValueError(f"`{key}` must have the shape of `input_ids` {tuple(ids.shape)}")
    raw = {k: v.detach() if isinstance(v, Tensor) else v for k, v in raw.items()}
    real, pad_id = _real(raw, pad_id, eos_id)
    slots = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    doc = _documents(raw, real)
    ways = {name: writer(v, doc) for name, v in entries(raw, doc).items()}
    stale = next((k for k, way in ways.items() if not way and len(raw[k]) != len(ids)), "")
    writers = {k: way for k, way in ways.items() if way}
    return AuditBatch(raw, doc, slots, pad_id, eos_id, writers, stale)


def _real(raw: dict[str, Any], pad_id: int | None, eos_id: int | None) -> tuple[Tensor, int | None]:
    """(B, T) bool, and the id at PAD slots where it can be told."""
    ids, mask, docs = raw["input_ids"], raw.get("attention_mask"), raw.get("document_ids")
    stated = [mask != 0] if isinstance(mask, Tensor) and mask.shape == ids.shape else []
    stated += [docs >= 0] if isinstance(docs, Tensor) else []
    real = torch.stack([torch.ones_like(ids).bool(), *stated]).all(0)
    if not stated:
        pad_id = _pad_by_labels(raw) if pad_id is None else pad_id
        run = _edge_runs(ids == (-1 if pad_id is None else pad_id))
        if pad_id == eos_id:  # the first of the closing run is the EOS of the document, and real
            run[:, 1:] &= run[:, :-1].clone() | ~run[:, 1:]
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
    doc, position = torch.zeros_like(real, dtype=torch.long), raw.get("position_ids")
    mask = raw.get("attention_mask")
    if isinstance(raw.get("document_ids"), Tensor):
        doc = raw["document_ids"].long()
    elif isinstance(mask, Tensor) and mask.shape == real.shape and int(mask.max()) > 1:
        doc = mask.long() - 1
    elif (stated := documents_of(raw, real)) is not None:
        doc = stated
    elif isinstance(position, Tensor) and position.shape == real.shape:
        pair = real[:, 1:] & real[:, :-1]
        on = position[:, 1:] == position[:, :-1] + 1
        restart = pair & ~on & (position[:, 1:] == position[real].min())
        # Used only if positions count by one between restarts: else they mean something else.
        if bool((on | restart)[pair].all()) and bool((on & pair).any()):
            doc[:, 1:] = restart.long().cumsum(1)
    return torch.where(real, doc, -1)
