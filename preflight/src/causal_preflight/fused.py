"""Probe for losses that hand out no logits: perturb labels, and see what the loss depends on."""

import torch
from torch import Tensor

from causal_preflight.audit_batch import IGNORE, AuditBatch, UnexaminableError, require, shift_left
from causal_preflight.context import Context, Move
from causal_preflight.report import Finding


def labels(ctx: Context) -> list[Finding]:
    """Do the labels at PAD matter, and on which inputs does the loss of one label depend?

    Changing the label at s from a to b changes the loss by w (z_b - z_a), with z the logits that it
    is compared with. If this difference moves with the input at s itself, the logits have seen
    their own target: the labels are not shifted, or the model sees the future. If it does not move
    with the input at s - 1, the labels are shifted twice.

    Limits: weights, and targets that are made from `input_ids`, cannot be read this way.
    """
    batch, given = ctx.work, ctx.work.labels
    if given is None:
        raise UnexaminableError("no logits were found and the batch has no labels to perturb")
    places = batch.has_target & batch.swappable & shift_left(batch.swappable, False)
    index = places.nonzero()
    require(len(index) > 2, "rows too short to perturb labels")
    b, t = index[len(index) // 2].tolist()  # its target is the token at t + 1
    one, two = batch.ordinary[:2]

    def loss(edited: AuditBatch, labels: Tensor) -> float:
        return float(ctx.model.run(edited.put("labels", labels)).detach())

    def difference(*swapped: int) -> float:
        """Loss with one label minus loss with another, with these inputs of row b swapped."""
        where, this, that = torch.zeros_like(batch.real), given.clone(), given.clone()
        where[b, list(swapped)] = True
        this[b, t + 1 - batch.labels_shifted], that[b, t + 1 - batch.labels_shifted] = one, two
        edited = batch.swap(where, ctx.seed)
        return loss(edited, this) - loss(edited, that)

    with ctx.weights(True):
        before, after = loss(batch, given), loss(batch, given.masked_fill(~batch.real, IGNORE))
        if abs(before - after) > 1e-5 * abs(before):
            seen = f"the loss goes from {before:.4g} to {after:.4g} once the labels at PAD are -100"
            return [ctx.finding("pad", seen, "pad targets", Move(abs(before - after)))]
        plain, own, previous = difference(), difference(t + 1), difference(t)
    require(plain != 0.0, "the loss does not depend on the labels of the batch")
    if abs(own - plain) > 1e-3 * abs(plain):
        what = "depends on that token as input"
    elif abs(previous - plain) <= 1e-3 * abs(plain):
        what = "does not depend on the token before it"
    else:
        return []
    seen = f"row {{row}}: the loss on the token after position {{t}} {what}"
    return [ctx.finding("shift", seen, "targets", Move(abs(plain), int(batch.slot[b, t])))]
