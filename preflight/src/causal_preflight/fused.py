"""Without logits (a fused loss): perturb labels instead, and see what the loss depends on."""

import torch
from torch import Tensor

from causal_preflight.audit_batch import IGNORE, AuditBatch, UnexaminableError, ahead, need
from causal_preflight.context import Context, Move
from causal_preflight.report import Finding


def labels(ctx: Context) -> list[Finding]:
    """Which labels count, and on which inputs does a label's share of the loss hang?

    Changing the label at s from a to b changes the loss by w (z_b - z_a), z the logits that it was
    compared with. If this difference moves with the input at s itself, the logits have seen their
    own target: the labels are not shifted, or the model sees the future. If it does not move with
    the input at s - 1, a token that it must see is hidden: they are shifted twice.

    Limits: weights, and targets that are made from `input_ids`, cannot be read this way.
    """
    frame, given = ctx.work, ctx.work.labels
    if given is None:
        raise UnexaminableError("no logits were found and the batch has no labels to perturb")
    places = (frame.next_ok & frame.swappable & ahead(frame.swappable, False)).nonzero()
    need(len(places) > 2, "rows too short to perturb labels")
    b, t = places[len(places) // 2].tolist()  # its target is the token at t + 1

    def run(edited: AuditBatch, labels: Tensor) -> float:
        return float(ctx.subject.run(edited.put("labels", labels)).detach())

    def share(swapped: int | None) -> float:
        """Loss with one label against loss with another, with one input swapped or none."""
        where, this, that = torch.zeros_like(frame.real), given.clone(), given.clone()
        where[b, slice(0) if swapped is None else swapped] = True
        this[b, t + 1 - frame.labels_ahead], that[b, t + 1 - frame.labels_ahead] = frame.ordinary[
            :2
        ]
        edited = frame.swap(where, ctx.seed)
        return run(edited, this) - run(edited, that)

    with ctx.weights(True):
        # PAD slots as the batch labels them, against PAD slots labelled -100
        loss, clean = run(frame, given), run(frame, given.masked_fill(~frame.real, IGNORE))
        if abs(loss - clean) > 1e-5 * abs(loss):
            seen = f"the loss goes from {loss:.4g} to {clean:.4g} once the labels at PAD are -100"
            return [ctx.finding("pad", seen, "pad targets", Move(abs(loss - clean)))]
        plain, own, before = share(None), share(t + 1), share(t)
    need(plain != 0.0, "the loss does not depend on the labels of the batch")
    if abs(own - plain) > 1e-3 * abs(plain):
        what = "depends on that token as input"
    elif abs(before - plain) <= 1e-3 * abs(plain):
        what = "does not depend on the token before it"
    else:
        return []
    seen = f"row {{row}}: the loss on the token after position {{t}} {what}"
    return [ctx.finding("shift", seen, "targets", Move(abs(plain), int(frame.at[b, t])))]
