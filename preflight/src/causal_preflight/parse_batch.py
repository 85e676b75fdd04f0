"""Make an `AuditBatch` of a raw batch: check it, find its PAD slots and its documents.

What the batch states (document_ids, attention_mask) is believed. What it does not state is inferred
from pad_id, from the labels, or from positions that restart. The model is not looked at.
"""

from typing import Any

import torch
from torch import Tensor

from causal_preflight.audit_batch import IGNORE, AuditBatch


def parse_batch(raw: dict[str, Any], pad_id: int | None, eos_id: int | None) -> AuditBatch:
    """Check the batch and infer what it does not state.

    Raises:
        ValueError: it cannot be audited; one line that says what to change.
    """
    if not hasattr(raw, "keys") or not isinstance(raw.get("input_ids"), Tensor):
        raise ValueError("batch needs `input_ids`: pass a dict with a (B, T) tensor of token ids")
    ids = raw["input_ids"]
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
    return AuditBatch(raw, _documents(raw, real), slots, pad_id, eos_id)


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
    leading = hit.long().cumprod(1).bool()
    closing = hit.flip(1).long().cumprod(1).flip(1).bool()
    return leading | closing


def _pad_by_labels(raw: dict[str, Any]) -> int | None:
    """An id that closes (or opens) rows, is ignored there, and is a label nowhere."""
    labels, ids = raw.get("labels"), raw["input_ids"]
    if labels is None or bool((labels == IGNORE).all()):
        return None
    ignored = _edge_runs(labels == IGNORE)
    for edge in (-1, 0):
        candidates = ids[:, edge][ignored[:, edge]].unique()
        if len(candidates) == 1 and not bool((labels == candidates).any()):
            pad = int(candidates)
            return pad if int(_edge_runs(ids == pad).sum(1).max()) > 1 else None
    return None


def _documents(raw: dict[str, Any], real: Tensor) -> Tensor:
    """(B, T): document_ids; else a position that restarts inside a row begins a new document."""
    doc, position = torch.zeros_like(real, dtype=torch.long), raw.get("position_ids")
    if isinstance(raw.get("document_ids"), Tensor):
        doc = raw["document_ids"].long()
    elif isinstance(position, Tensor) and position.shape == real.shape:
        pair = real[:, 1:] & real[:, :-1]
        on = position[:, 1:] == position[:, :-1] + 1
        restart = pair & ~on & (position[:, 1:] == position[real].min())
        # Believed only if positions count by one between restarts: else they mean something else.
        if bool((on | restart)[pair].all()) and bool((on & pair).any()):
            doc[:, 1:] = restart.long().cumsum(1)
    return torch.where(real, doc, -1)
