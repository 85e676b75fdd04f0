"""Find which slots of the batch a call of the model holds, by comparing token ids.

A slot is a place in the flattened batch, row * T + column; -1 stands for none.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from causal_preflight.audit_batch import IGNORE, AuditBatch

_CLOSE = 0.6  # fraction of equal ids from which a shifted or altered copy counts as the batch


def iter_integer_tensors(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Integer tensors of one or two dimensions anywhere in the arguments of a call."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() and value.dtype != torch.bool and value.ndim in (1, 2):
            yield value
    elif depth < 3 and isinstance(value, (tuple, list, dict)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from iter_integer_tensors(v, depth + 1)


def locate(t: Tensor, batch: AuditBatch, used: set[int]) -> Tensor | None:
    """The slots (b, t) that a tensor of ids holds, or None if it is not part of the batch.

    Tried in turn: the whole batch; rows in any order and any window of columns; transposed;
    flattened, with or without PAD; nearly the batch (a BOS put in front, a few ids altered).
    Windows not yet in `used` come first, so that equal rows in several calls are told apart.
    """
    ids = batch.ids
    slots = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    if t.shape == ids.shape and torch.equal(t, ids):
        return slots
    if t.ndim == 2 and t.shape[1] <= ids.shape[1]:
        hit = _window(t, ids, slots, used)
        if hit is not None:
            return hit
    if t.shape == ids.T.shape and torch.equal(t, ids.T):
        return slots.T
    if t.ndim == 1 or t.shape[0] == 1:
        for part in (torch.ones_like(batch.real), batch.real):
            if torch.equal(t.reshape(-1), ids[part]):
                return slots[part][None]
    return _nearly(t, ids, slots) if t.ndim == 2 and len(t) == len(ids) else None


def _window(t: Tensor, ids: Tensor, slots: Tensor, used: set[int]) -> Tensor | None:
    """Rows in any order, at the first start where none was used before (or the fewest were)."""
    n = t.shape[1]
    best: tuple[int, Tensor] | None = None
    for start in range(ids.shape[1] - n + 1):
        same = (ids[:, start : start + n][None] == t[:, None]).all(-1)  # (b, B)
        if not bool(same.any(1).all()):
            continue
        first = slots[:, start].tolist()
        rows: list[int] = []
        for fits in (line.nonzero()[:, 0].tolist() for line in same):
            taken = {r: (r in rows, first[r] in used) for r in fits}
            rows.append(min(taken, key=taken.__getitem__))
        overlap = len(used & {first[r] for r in rows})
        if best is None or overlap < best[0]:
            best = overlap, slots[rows, start : start + n]
        if not overlap:
            break
    if best is None:
        return None
    used.update(best[1][:, 0].tolist())
    return best[1]


def _nearly(t: Tensor, ids: Tensor, slots: Tensor) -> Tensor | None:
    """Rows in order, moved by up to two columns, most ids equal."""
    best, hit = _CLOSE, None
    for shift in (0, -1, 1, -2, 2):
        cols = torch.arange(t.shape[1], device=ids.device) + shift
        inside = (cols >= 0) & (cols < ids.shape[1])
        cols = cols.clamp(0, ids.shape[1] - 1)
        equal = float((t == ids[:, cols])[:, inside].float().mean())
        if equal > best:
            best, hit = equal, torch.where(inside, slots[:, cols], -1)
    return hit


def place(slots: Tensor, shapes: list[torch.Size], batch: AuditBatch) -> list[Tensor] | None:
    """Slots for the logits (b', t', V) that one call of the model gave, in one piece or several.

    Several pieces, as of a head applied chunk by chunk, follow each other in time. Fewer logits
    than ids are the first ones, more are the last. Flat ones (1, n, V) are all slots, all but the
    last column, or only those that are real or have a target. None: the slots cannot be told.
    """
    (b, t), widths = slots.shape, [s[1] for s in shapes]
    total = sum(widths)
    if b > 1 and all(s[0] == 1 for s in shapes):
        wanted = batch.has_target & (batch.label_of_next != IGNORE)
        masks = [m.flatten()[slots] for m in (wanted, batch.has_target, batch.real)]
        options = [slots.flatten(), slots[:, : t - 1].flatten(), *(slots[m] for m in masks)]
        slots = next((o[None] for o in options if len(o) == total), slots[:, :0])
    elif total > t:
        slots = torch.cat([slots.new_full((b, total - t), -1), slots], 1)
    return list(slots[:, :total].split(widths, 1)) if slots.shape[1] >= total else None
