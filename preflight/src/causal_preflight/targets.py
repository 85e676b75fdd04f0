"""Probes of targets that are left out, and of those that are distributions, as of a teacher."""

import torch
from torch import Tensor

from causal_preflight.batch import IGNORE, one_a_row, shift_left
from causal_preflight.context import Context, Move
from causal_preflight.readout import SOFT, offset_of
from causal_preflight.report import Finding, UnexaminableError, require

_MOVED = 0.02  # fraction of the largest move of a row that counts as one
_OWN = ("input_ids", "labels", "attention_mask", "document_ids", "position_ids")


def dropped(ctx: Context) -> list[Finding]:
    """A real target that the batch labels must count; without labels, the ends of rows must.

    Right are: what another entry of the batch is zero at; what follows an EOS; a selection by the
    loss itself; the last k logits of rows labeled in full; and EOS, which has a probe of its own.
    """
    known = {"shift", "pad target", "soft targets"} & ctx.explained
    require(not known, "which targets count cannot be told")
    batch, counted = ctx.full, ctx.readout(True).trained | ctx.readout(False).trained
    missing = batch.has_target & (batch.label_of_next != IGNORE) & ~counted
    missing &= batch.ids != batch.eos_id
    ends = shift_left(batch.ends | torch.isin(batch.ids, batch.special), False)
    missing &= ~ends | (counted & ends).any()
    if batch.labels is None:  # a prompt may be left out by any rule; the ends of all rows may not
        tail = (counted.any(0).flip(0).long().cumsum(0) == 0).flip(0)
        missing &= tail & bool(tail[:-1].sum() > 1)
    elif bool((batch.label_of_next != IGNORE)[batch.has_target].all()) and bool(missing.any()):
        missing &= ctx.model.observe(batch).made.long().cumsum(1) > 0
    for name, v in batch.raw.items():
        if name not in _OWN and isinstance(v, Tensor) and v.shape == counted.shape:
            for mask in (v, shift_left(v, 0)):
                missing &= bool(mask[missing].any()) or not bool(mask[counted].all())
    if not bool(missing.any()):
        return []
    if not torch.equal(ctx.model.readout(batch, True, -1.0).trained, ctx.readout(True).trained):
        return []
    ctx.explained.add("pad target")
    seen = f"{int(missing.sum())} real targets never count, {int(counted.sum())} do; the first of "
    seen += "them is that of row {row}, position {t}"
    return [ctx.finding_at("pad", seen, "dropped", missing, float(missing.sum()))]


def soft(ctx: Context) -> list[Finding]:
    """Targets that are distributions must be those of the same position, and none may be at PAD."""
    r = ctx.readout(True)
    require(r.residual > SOFT, "every target is a token")
    seen = f"{r.residual:.0%} of the loss's gradient is not that of one target a position"
    ctx.report.remarks.append(f"{seen} (soft targets?)")
    k, ahead = offset_of(ctx.full, r), _ahead(ctx) if ctx.model.head.replaceable else None
    if ahead is None:
        raise UnexaminableError("no targets that move with a token or with logits of the batch")
    ctx.explained.add("soft targets")
    if ahead or k not in (None, 1):
        seen += f"; at position t it is that of soft targets of position t {ahead:+d}"
        seen += "" if k in (None, 1) else f" and of token t {k:+d}"
        ctx.explained.add("shift")
        return [ctx.finding("shift", seen, "targets", Move(r.residual))]
    pad = (r.max_abs_grad > 1e-6 * r.max_abs_grad.max()) & ~ctx.full.real
    seen, size = "PAD has soft targets, at first at row {row}, position {t}", float(pad.sum())
    return [ctx.finding_at("pad", seen, "pad targets", pad, size)] if size else []


def _ahead(ctx: Context) -> int | None:
    """How far the soft targets are ahead of the logits (0 is right); None without soft targets.

    With logits held fixed, the gradient at a position moves with its targets alone. Those of a
    teacher that reads the row up to token t move with token t, but not with token t + 1.
    """
    batch = ctx.full
    inner = batch.swappable & batch.has_target
    inner[:, :2] = inner[:, -3:] = False
    one = one_a_row(inner, 3)
    require(one.any(), "rows too short to move soft targets")
    rows, at = one.nonzero().T
    swapped = batch.swap(one, ctx.seed)
    base, other = (ctx.model.gradients(edit, True)[1] for edit in (batch, swapped))
    two = torch.stack([batch.ids, swapped.ids], -1)[rows, at][:, None].expand(-1, one.shape[1], -1)
    vocab = other[0][2].shape[-1]
    change = torch.zeros(one.numel(), vocab, device=one.device)
    for (slots, _, g), (_, _, before) in zip(other, base, strict=True):
        change.index_add_(0, slots[slots >= 0], (g - before)[slots >= 0].float())
    change = change.view(*one.shape, vocab)[rows].scatter(-1, two, 0.0)  # not of hard targets
    size = change.norm(dim=-1)
    moved = size > _MOVED * size.amax(1, keepdim=True).clamp_min(1e-30)
    found = set((at - moved.long().argmax(1)).tolist())
    return found.pop() if bool(moved.any(1).all()) and len(found) == 1 else None
