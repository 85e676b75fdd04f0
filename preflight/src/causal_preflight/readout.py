"""Probes of the targets: which token each position was trained on, and whether EOS is one.

They read `Readout` (d loss / d logits resolved into targets and weights), in train mode and in eval
mode: some losses take another branch in each.
"""

import torch
from torch import Tensor

from causal_preflight.audit_batch import IGNORE, AuditBatch, require, shift_left
from causal_preflight.context import Context
from causal_preflight.instrumented_model import Readout
from causal_preflight.report import Finding

_PAD_COUNTS = "{} counts though its target is PAD:"
_TAKES_PART = 1e-6  # fraction of the largest gradient below which a position plays no part


def alignment(ctx: Context) -> list[Finding]:
    """Is every counted position trained on the next token of its own document, and none on PAD?"""
    found: dict[str, Finding] = {}
    counts = any(bool(ctx.readout(train).trained.any()) for train in (True, False))
    require(counts, "no position of the batch is trained on a target")
    for train in (True, False):
        for f in _alignment(ctx, ctx.readout(train), "" if train else "in eval mode: "):
            found.setdefault(f.label, f)
    ctx.explained |= {"pad target" if label == "pad" else label for label in found}
    return list(found.values())


def offset_of(batch: AuditBatch, r: Readout) -> int | None:
    """The k for which position t is mostly trained on token t + k; None where no k fits."""
    on, width = r.trained, batch.ids.shape[1]
    scores: dict[int, float] = {}
    for k in range(-2, min(5, width)):
        inside = on.clone()  # positions for which the row holds a token t + k
        inside[:, : max(0, -k)] = False
        inside[:, width - max(0, k) :] = False
        if bool(inside.any()):
            hits = float((batch.ids.roll(-k, 1) == r.target)[inside].float().mean())
            scores[k] = hits * min(1.0, float(inside.sum() / on.sum()) + 0.25)
    best = max(scores, key=lambda k: scores[k], default=0)
    if scores.get(1, 0.0) >= 0.9 * scores.get(best, 1.0):
        best = 1
    return best if scores.get(best, 0.0) >= 0.5 else None


def _alignment(ctx: Context, r: Readout, mode: str) -> list[Finding]:
    batch, on = ctx.full, r.trained
    if not bool(on.any()):
        return []
    k = offset_of(batch, r)
    if k != 1:
        return _shifted(ctx, r, k, mode)
    label, is_next = batch.label_of_next, r.target == shift_left(batch.ids, -1)
    eos = _closing_eos(batch, r)
    right = batch.has_target & (is_next | (r.target == label)) | eos
    right[:, -1] |= _label_beyond_row(batch, r)
    # A target is PAD at PAD itself, at the last real token before PAD, or in the last column.
    pad = ~batch.real | (~shift_left(batch.real, True) & is_next)
    pad[:, -1] = batch.has_pad & (r.target[:, -1] == (batch.pad_id or 0))
    pad &= on & ~eos
    ignored = on & batch.has_target & (label == IGNORE)
    found = []
    wrong = on & ~pad & ~right
    if bool(wrong.any()):
        found.append(_at(ctx, r, wrong, "shift", mode + "{} is trained on"))
    if bool(pad.any()):
        found.append(_at(ctx, r, pad, "pad", mode + _PAD_COUNTS))
    elif bool(ignored.any()):
        found.append(_at(ctx, r, ignored, "pad", mode + "{} counts though its label is -100:"))
    else:
        found += _without_target(ctx, r, mode)
    return found


def _closing_eos(batch: AuditBatch, r: Readout) -> Tensor:
    """(B, T): where PAD and EOS share an id, positions whose target is the PAD that is an EOS."""
    if batch.pad_id is None or batch.pad_id != batch.eos_id:
        return torch.zeros_like(batch.real)
    found = batch.real & ~shift_left(batch.real, True) & (batch.ids != batch.eos_id)
    if batch.labels is not None:
        found &= batch.label_of_next == batch.eos_id
    # Only if nothing after it is trained: with the rest of the PAD as targets it is a fault.
    return found & ~(r.trained & ~batch.real & ~batch.left_pad).any()


def _label_beyond_row(batch: AuditBatch, r: Readout) -> Tensor:
    """(B,): the last column is trained on a label that the batch brought along already shifted.

    A label that repeats the first token of the row or of the next one comes from a `roll` or from
    flattened rows, and is no next token.
    """
    if batch.labels is None or not batch.labels_shifted:
        return torch.zeros_like(batch.real[:, -1])
    last, first = batch.labels[:, -1], batch.ids[:, 0]
    rolled = torch.equal(last, first) or torch.equal(last, first.roll(-1))
    return (r.target[:, -1] == last) & (not rolled)


def _shifted(ctx: Context, r: Readout, k: int | None, mode: str) -> list[Finding]:
    batch, on = ctx.full, r.trained
    what = {
        0: "the loss is not shifted: position t is trained on token t itself",
        2: "the targets are shifted twice: position t is trained on token t + 2",
        None: "the targets are no fixed number of tokens away",
    }.get(k, f"position t is trained on token t {k or 0:+d}")
    known = on & batch.has_target & (r.target != batch.ids.roll(-1, 1))
    hit = known if bool(known.any()) else on
    found = [_at(ctx, r, hit, "shift", f"{mode}{what}; {{}}:")]
    # PAD must not be a target at that offset either.
    k = k or 0
    pad = on & ~batch.real.roll(-k, 1) & ~batch.real & (r.target == batch.ids.roll(-k, 1))
    pad[:, batch.ids.shape[1] - max(0, k) :] = False
    if bool(pad.any()):
        found.append(_at(ctx, r, pad, "pad", mode + _PAD_COUNTS))
    return found


def _without_target(ctx: Context, r: Readout, mode: str) -> list[Finding]:
    """PAD that moves the loss without being a target: label smoothing's uniform term, a z-loss.

    A z-loss over real tokens may include those that are not counted; its gradient sums to more than
    zero, that of smoothing to zero.
    """
    real, takes_part = ctx.full.real, r.max_abs_grad > _TAKES_PART * r.max_abs_grad.max()
    smooth = (r.grad_sum.abs() < 1e-3 * r.max_abs_grad) & ~shift_left(real, False)
    hit = takes_part & ~r.trained & (~real | smooth) & ctx.full.has_pad
    if not bool(hit.any()):
        return []
    fraction = float(r.max_abs_grad[hit].sum() / r.max_abs_grad.sum())
    seen = (
        f"{mode}{int(hit.sum())} positions whose target is PAD move the loss without a target "
        f"(label smoothing or a z-loss over PAD), with {fraction:.1%} of the gradient; first at "
        "row {row}, position {t}"
    )
    return [ctx.finding_at("pad", seen, "pad targets", hit, fraction)]


def _at(ctx: Context, r: Readout, hit: Tensor, label: str, text: str) -> Finding:
    """`text` with the first place put in, the tokens there, and how much of the loss it is."""
    b, t = hit.nonzero()[0].tolist()
    fraction = float(r.weight[hit].abs().sum() / r.weight.abs().sum().clamp_min(1e-300))
    ids = [*ctx.full.ids[b].tolist(), "the end of the row"]
    seen = (
        f"{text.format(f'row {b}, position {t}')} token {ids[t]} -> target {int(r.target[b, t])}, "
        f"followed by {ids[t + 1]}; {int(hit.sum())} such positions hold {fraction:.1%} of the "
        "loss's weight"
    )
    remedy = "targets" if label == "shift" else "pad targets"
    return ctx.finding_at(label, seen, remedy, hit, fraction)


def ending(ctx: Context) -> list[Finding]:
    """Is the token that ends a document ever a counted target?

    Examined where an end can be seen: at the last real token before PAD or before another document.
    With a known EOS, at every EOS of the batch.
    """
    batch, r = ctx.full, ctx.readout(True)
    require("shift" not in ctx.explained, "the targets are shifted, so EOS is not where it belongs")
    ends = batch.ends
    if batch.eos_id is not None:
        eos = batch.real & (batch.ids == batch.eos_id)
        eos[:, 0] = False
        if not bool(eos.any()):
            if bool((r.trained & _closing_eos(batch, r)).any()):
                return []
            if bool(ends.any()):
                return [_never_ends(ctx, "no document in the batch ends in EOS", ends)]
        ends = eos
    require(ends.any(), "no document is seen to end in this batch")
    is_target = batch.has_target.roll(1, 1)  # has_target is False in the last column
    counted = r.trained.roll(1, 1) & is_target
    ends = ends & is_target
    require(ends.any(), "no document is seen to end in this batch")
    require(offset_of(batch, r) == 1, "the targets are not the next tokens")
    tokens, others = batch.ids[ends], is_target & ~ends
    same = len(tokens) > 1 and bool((tokens == tokens[0]).all())
    seen = bool((counted & ends).any())
    if batch.eos_id is None and not same:  # a fault only if nothing but the ends does not count
        only = len(tokens) > 1 and bool(others.any()) and bool(counted[others].all())
        require(only and not seen, "which id is EOS cannot be told: pass eos_id")
    if seen:
        return []
    return [_never_ends(ctx, "the last token of a document is never a counted target", ends)]


def _never_ends(ctx: Context, what: str, ends: Tensor) -> Finding:
    seen = what + ": row {row}, position {t}; the model cannot learn to stop"
    return ctx.finding_at("eos", seen, "eos", ends, float(ends.sum()))
