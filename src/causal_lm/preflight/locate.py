"""Which slots of the batch does a call of the model hold? Matched by content, not by trust."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from causal_lm.preflight.frame import IGNORE, Frame

NOWHERE = -1
_CLOSE = 0.6  # share of equal ids at which a shifted or altered copy still counts as the batch


@dataclass(frozen=True)
class Slots:
    """Row and column in the batch of every slot of a call, (b, t); NOWHERE for none."""

    rows: Tensor
    cols: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.rows.shape

    def flat(self) -> "Slots":
        return Slots(self.rows.reshape(1, -1), self.cols.reshape(1, -1))

    def columns(self, start: int, stop: int) -> "Slots":
        return Slots(self.rows[:, start:stop], self.cols[:, start:stop])


def place(slots: Slots, shapes: list[torch.Size], frame: Frame) -> list[Slots] | None:
    """Slots for the logits (b', t', V) that one call of the model gave, in one piece or several.

    Several pieces, as of a head applied chunk by chunk, follow each other in time. Fewer logits
    than ids are the first ones, more are the last; flat ones (1, n, V) are all slots, all but the
    last column, or only those that are real or have a target.
    """
    b, t = slots.shape
    total = sum(s[1] for s in shapes)
    flat = b > 1 and all(s[0] == 1 for s in shapes)
    if flat:
        wanted = frame.next_ok & (frame.label_of_next != IGNORE)
        masks = [m[slots.rows, slots.cols] for m in (wanted, frame.next_ok, frame.real)]
        options = [slots.flat(), slots.columns(0, t - 1).flat()]
        options += [Slots(slots.rows[m][None], slots.cols[m][None]) for m in masks]
        fits = [o for o in options if o.shape[1] == total]
        if not fits:
            return None
        slots = fits[0]
    elif total > t:
        blank = torch.full((b, total - t), NOWHERE, device=slots.rows.device)
        slots = Slots(torch.cat([blank, slots.rows], 1), torch.cat([blank, slots.cols], 1))
    out, at = [], 0
    for s in shapes:
        out.append(slots.columns(at, at + s[1]))
        at += s[1]
    return out


def integers(value: Any, depth: int = 0) -> Iterator[Tensor]:
    """Integer tensors of one or two dimensions anywhere in the arguments of a call."""
    if isinstance(value, Tensor):
        if not value.is_floating_point() and value.dtype != torch.bool and value.ndim in (1, 2):
            yield value
    elif depth < 3 and isinstance(value, (tuple, list, dict)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from integers(v, depth + 1)


def locate(t: Tensor, ids: Tensor, real: Tensor, used: set[tuple[int, int]]) -> Slots | None:
    """Find `t` in the batch's `ids` (B, T), or None.

    Tried in turn: the whole batch; rows in any order and any window of columns; transposed;
    flattened, with or without PAD; nearly the batch (a BOS put in front, a few ids altered).
    Rows not yet `used` come first, so that equal rows in several calls are told apart.
    """
    rows = torch.arange(ids.shape[0], device=ids.device)[:, None].expand_as(ids)
    cols = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    if t.shape == ids.shape and torch.equal(t, ids):
        return Slots(rows, cols)
    if t.ndim == 2 and t.shape[1] <= ids.shape[1]:
        hit = _window(t, ids, used)
        if hit is not None:
            return hit
    if t.ndim == 2 and t.shape == ids.T.shape and torch.equal(t, ids.T):
        return Slots(rows.T, cols.T)
    flat = t.reshape(-1)
    if t.ndim == 1 or t.shape[0] == 1:
        for part in (torch.ones_like(real), real):
            if flat.numel() == int(part.sum()) and torch.equal(flat, ids[part]):
                return Slots(rows[part][None], cols[part][None])
    if t.ndim == 2 and t.shape[0] == ids.shape[0]:
        return _nearly(t, ids)
    return None


def _window(t: Tensor, ids: Tensor, used: set[tuple[int, int]]) -> Slots | None:
    """Rows in any order, at the first start where none was used before (or the fewest were)."""
    b, n = t.shape
    best: tuple[int, int, list[int]] | None = None
    for start in range(ids.shape[1] - n + 1):
        same = (ids[:, start : start + n][None] == t[:, None]).all(-1)  # (b, B)
        if not bool(same.any(1).all()):
            continue
        rows: list[int] = []
        for fits in (line.nonzero()[:, 0].tolist() for line in same):
            taken = {r: (r in rows, (r, start) in used) for r in fits}
            rows.append(min(taken, key=taken.__getitem__))
        overlap = len(used & {(r, start) for r in rows})
        if best is None or overlap < best[0]:
            best = overlap, start, rows
        if not overlap:
            break
    if best is None:
        return None
    _, start, rows = best
    used.update((r, start) for r in rows)
    at = torch.tensor(rows, device=ids.device)[:, None].expand(b, n)
    return Slots(at, torch.arange(start, start + n, device=ids.device).expand(b, n))


def _nearly(t: Tensor, ids: Tensor) -> Slots | None:
    """Rows in order, moved by up to two columns."""
    width = ids.shape[1]
    best, hit = _CLOSE, None
    for shift in (0, -1, 1, -2, 2):
        cols = torch.arange(t.shape[1], device=ids.device) + shift
        inside = (cols >= 0) & (cols < width)
        if not bool(inside.any()):
            continue
        share = float((t[:, inside] == ids[:, cols[inside]]).float().mean())
        if share > best:
            rows = torch.arange(ids.shape[0], device=ids.device)[:, None].expand(t.shape)
            at = torch.where(inside, cols, NOWHERE).expand(t.shape)
            best, hit = share, Slots(torch.where(inside, rows, NOWHERE), at)
    return hit


def canonical(shape: torch.Size, ids: torch.Size, need: int) -> list[str]:
    """Layouts in which a tensor may be the logits of a call with ids (b, t) over >= need ids."""
    b, t = ids
    out = []
    if len(shape) == 3:
        if shape[0] == b and shape[2] >= need:
            out.append("btv")
        if shape[0] == b and shape[1] >= need and shape[2] in (t, t - 1):
            out.append("bvt")
        if shape[1] == b and shape[0] in (t, t - 1) and shape[2] >= need and t != b:
            out.append("tbv")
    elif shape[1] >= need and shape[0] <= b * t:
        out.append("nv")
    return out
