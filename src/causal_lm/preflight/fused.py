"""Without logits (a fused loss): perturb labels instead, and see what the loss depends on."""

import torch
from torch import Tensor

from causal_lm.preflight.context import Context
from causal_lm.preflight.frame import IGNORE, Frame, Unexaminable
from causal_lm.preflight.readout import PAD_REMEDY, SHIFT_REMEDY
from causal_lm.preflight.report import Finding


def labels(ctx: Context) -> list[Finding]:
    """Which labels count, and on which inputs does a label's share of the loss hang?

    Changing the label at s from a to b changes the loss by w (z_b - z_a), z the logits that it was
    compared with. If this difference moves with the input at s itself, the logits have seen their
    own target: the labels are not shifted, or the model sees the future. If it does not move with
    the input at s - 1, a token that it must see is hidden: they are shifted twice.

    Limits: weights, and targets that are made from `input_ids`, cannot be read this way.
    """
    frame = ctx.work
    if frame.labels is None:
        raise Unexaminable("no logits were found and the batch has no labels to perturb")
    with ctx.subject.box.woken(ctx.seed):
        return _padding(ctx, frame) or _offset(ctx, frame)


def _relabel(frame: Frame, where: Tensor, value: Tensor | int) -> Frame:
    changed = torch.where(where, torch.as_tensor(value, device=where.device), frame.batch["labels"])
    return frame.each(lambda k, v: changed.to(v.dtype) if k == "labels" else v)


def _padding(ctx: Context, frame: Frame) -> list[Finding]:
    """PAD slots as the batch labels them, against PAD slots labelled -100."""
    if not frame.has_pad:
        return []
    plain = float(ctx.subject.run(frame).detach())
    ignored = float(ctx.subject.run(_relabel(frame, ~frame.real, IGNORE)).detach())
    if abs(plain - ignored) <= 1e-5 * abs(plain):
        return []
    seen = f"the loss goes from {plain:.4g} to {ignored:.4g} once the labels at PAD are -100"
    return [Finding("pad", "labels", seen, PAD_REMEDY, abs(plain - ignored))]


def _offset(ctx: Context, frame: Frame) -> list[Finding]:
    ahead = frame.labels_ahead
    ok = frame.next_ok & frame.swappable
    ok[:, :-2] &= frame.swappable[:, 1:-1]
    ok[:, -2:] = False
    places = ok.any(0).nonzero()[:, 0]
    if len(places) < 3:
        raise Unexaminable("rows too short to perturb labels")
    t = int(places[len(places) // 2])  # its target is the token at t + 1
    b = int(ok[:, t].nonzero()[0])
    one = torch.zeros_like(frame.real)
    one[b, t + 1 - ahead] = True
    inputs = {}
    for place in (t, t + 1):
        at = torch.zeros_like(frame.real)
        at[b, place] = True
        inputs[place] = frame.swap(at, ctx.seed)
    share = _share(ctx, frame, one)
    size = abs(share) + 1e-12
    row, token = ctx.rows[b], int(frame.ids[b, t])
    if share == 0.0:
        raise Unexaminable("the loss does not depend on the labels of the batch")
    if abs(_share(ctx, inputs[t + 1], one) - share) > 1e-3 * size:
        seen = (
            f"row {row}: the loss on the token at position {t + 1} depends on that token as input"
        )
        return [Finding("shift", "labels", seen, SHIFT_REMEDY, size, row, t, token)]
    if abs(_share(ctx, inputs[t], one) - share) <= 1e-3 * size:
        seen = f"row {row}: the loss on the token at position {t + 1} does not depend on token {t}"
        return [Finding("shift", "labels", seen, SHIFT_REMEDY, size, row, t, token)]
    return []


def _share(ctx: Context, frame: Frame, one: Tensor) -> float:
    """Loss with one label against loss with another, everything else equal."""
    a, b = ctx.work.ordinary[:2].tolist()
    first, second = (ctx.subject.run(_relabel(frame, one, v)).detach() for v in (a, b))
    return float(first.double() - second.double())
