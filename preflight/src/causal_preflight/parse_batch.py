"""A raw batch as an `AuditBatch`: check it, find which slots are PAD and where documents end.

Nothing here looks at the model. What the batch says (document_ids, attention_mask) is believed;
what it does not say is inferred from pad_id, from the labels, or from positions that start anew.
"""

from typing import Any

import torch
from torch import Tensor

from causal_preflight.audit_batch import IGNORE, AuditBatch


def parse_batch(batch: dict[str, Any], pad_id: int | None, eos_id: int | None) -> AuditBatch:
    """Raises ValueError, one line that says what to do, where the batch cannot be audited."""
    if not hasattr(batch, "keys") or not isinstance(batch.get("input_ids"), Tensor):
        raise ValueError("batch needs `input_ids`: pass a dict with a (B, T) tensor of token ids")
    ids = batch["input_ids"]
    if ids.ndim != 2 or ids.is_floating_point() or not ids.numel():
        raise ValueError(f"`input_ids` must be integers (B, T), got {ids.dtype} {tuple(ids.shape)}")
    if int(ids.min()) < 0:
        raise ValueError("`input_ids` holds negative ids: -100 belongs in `labels`, not here")
    for key in ("labels", "document_ids"):
        if isinstance(batch.get(key), Tensor) and batch[key].shape != ids.shape:
            raise ValueError(f"`{key}` must have the shape of `input_ids` {tuple(ids.shape)}")
    batch = {k: v.detach() if isinstance(v, Tensor) else v for k, v in batch.items()}
    real, pad_id = _real(batch, pad_id, eos_id)
    slots = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    return AuditBatch(batch, _documents(batch, real), slots, pad_id, eos_id)


def _real(
    batch: dict[str, Any], pad_id: int | None, eos_id: int | None
) -> tuple[Tensor, int | None]:
    """(B, T) bool, and the id at PAD slots where it can be told."""
    ids, mask, docs = batch["input_ids"], batch.get("attention_mask"), batch.get("document_ids")
    marks = [mask != 0] if isinstance(mask, Tensor) and mask.shape == ids.shape else []
    marks += [docs >= 0] if isinstance(docs, Tensor) else []
    real = torch.stack([torch.ones_like(ids).bool(), *marks]).all(0)
    if not marks:
        pad_id = _pad_by_labels(batch) if pad_id is None else pad_id
        run = _edge_runs(ids == (-1 if pad_id is None else pad_id))
        if pad_id == eos_id:  # the first of the closing run ends the document: it is real
            run[:, 1:] &= run[:, :-1].clone() | ~run[:, 1:]
        real = ~run
    if pad_id is None and not bool(real.all()):
        pad_id = int(ids[~real].mode().values)
    return real, pad_id


def _edge_runs(hit: Tensor) -> Tensor:
    """Of a (B, T) bool, the parts that touch the left or the right edge without a gap."""
    leading = hit.long().cumprod(1).bool()
    closing = hit.flip(1).long().cumprod(1).flip(1).bool()
    return leading | closing


def _pad_by_labels(batch: dict[str, Any]) -> int | None:
    """An id that closes (or opens) rows, is ignored there, and is a label nowhere."""
    labels, ids = batch.get("labels"), batch["input_ids"]
    if labels is None or bool((labels == IGNORE).all()):
        return None
    ignored = _edge_runs(labels == IGNORE)
    for edge in (-1, 0):
        candidates = ids[:, edge][ignored[:, edge]].unique()
        if len(candidates) == 1 and not bool((labels == candidates).any()):
            pad = int(candidates)
            return pad if int(_edge_runs(ids == pad).sum(1).max()) > 1 else None
    return None


def _documents(batch: dict[str, Any], real: Tensor) -> Tensor:
    """(B, T): document_ids; else positions that start anew inside a row mark a new document."""
    doc, position = torch.zeros_like(real, dtype=torch.long), batch.get("position_ids")
    if isinstance(batch.get("document_ids"), Tensor):
        doc = batch["document_ids"].long()
    elif isinstance(position, Tensor) and position.shape == real.shape:
        pair = real[:, 1:] & real[:, :-1]
        on = position[:, 1:] == position[:, :-1] + 1
        anew = pair & ~on & (position[:, 1:] == position[real].min())
        # Only if they count by one from where they start: else they are no positions of this kind.
        if bool((on | anew)[pair].all()) and bool((on & pair).any()):
            doc[:, 1:] = anew.long().cumsum(1)
    return torch.where(real, doc, -1)
