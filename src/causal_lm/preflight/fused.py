"""Without logits (a fused loss): perturb labels instead, and see what the loss depends on."""

import torch
from torch import Tensor

from causal_lm.preflight.context import Context
from causal_lm.preflight.frame import IGNORE, Frame, UnexaminableError
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
    if ctx.work.labels is None:
        raise UnexaminableError("no logits were found and the batch has no labels to perturb")
    with ctx.weights(True):
        return _padding(ctx, ctx.work, ctx.work.labels) or _offset(ctx, ctx.work, ctx.work.labels)


def _padding(ctx: Context, frame: Frame, given: Tensor) -> list[Finding]:
    """PAD slots as the batch labels them, against PAD slots labelled -100."""
    ignored = frame.put("labels", given.masked_fill(~frame.real, IGNORE))
    plain, clean = (float(ctx.subject.run(f).detach()) for f in (frame, ignored))
    if abs(plain - clean) <= 1e-5 * abs(plain):
        return []
    seen = f"the loss goes from {plain:.4g} to {clean:.4g} once the labels at PAD are -100"
    return [Finding("pad", "labels", seen, PAD_REMEDY, abs(plain - clean))]


def _offset(ctx: Context, frame: Frame, given: Tensor) -> list[Finding]:
    ok = frame.next_ok & frame.swappable
    ok[:, :-2] &= frame.swappable[:, 1:-1]
    ok[:, -2:] = False
    places = ok.any(0).nonzero()[:, 0]
    if len(places) < 3:
        raise UnexaminableError("rows too short to perturb labels")
    t = int(places[len(places) // 2])  # its target is the token at t + 1
    b = int(ok[:, t].nonzero()[0])

    def share(swapped: int | None = None) -> float:
        """Loss with one label against loss with another, with one input swapped or none."""
        where = torch.zeros_like(frame.real)
        where[b, slice(0) if swapped is None else swapped] = True
        losses = []
        for value in frame.ordinary[:2]:
            relabelled = given.clone()
            relabelled[b, t + 1 - frame.labels_ahead] = value
            edited = frame.swap(where, ctx.seed).put("labels", relabelled)
            losses.append(ctx.subject.run(edited).detach().cpu().double())
        return float(losses[0] - losses[1])

    plain = share()
    size = abs(plain) + 1e-12
    if plain == 0.0:
        raise UnexaminableError("the loss does not depend on the labels of the batch")
    if abs(share(t + 1) - plain) > 1e-3 * size:
        what = "depends on that token as input"
    elif abs(share(t) - plain) <= 1e-3 * size:
        what = "does not depend on the token before it"
    else:
        return []
    seen = f"row {{row}}: the loss on the token after position {{t}} {what}"
    return [ctx.finding("shift", "labels", seen, SHIFT_REMEDY, (size, b, t))]
