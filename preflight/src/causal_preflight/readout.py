"""Probes of the loss: which target each position was trained on, and with what weight.

All of them read `Readout`, d loss / d logits resolved into targets and weights, in train mode and
in eval mode: some losses take another branch in each.
"""

import torch
from torch import Tensor

from causal_preflight.audit_batch import IGNORE, AuditBatch, ahead, need
from causal_preflight.context import Context
from causal_preflight.instrumented_model import Readout
from causal_preflight.report import Finding

_OF_PAD = "{} counts though its target is PAD:"
_COUNTS = 1e-6  # share of the largest pull below which a position plays no part in the loss


def alignment(ctx: Context) -> list[Finding]:
    """Is every counted position trained on the next token of its own document, and on no PAD?"""
    found: dict[str, Finding] = {}
    for train in (True, False):
        for f in _alignment(ctx, ctx.readout(train), "" if train else "in eval mode: "):
            found.setdefault(f.label, f)
    ctx.blamed |= {"pad target" if label == "pad" else label for label in found}
    return list(found.values())


def offset_of(frame: AuditBatch, r: Readout) -> int | None:
    """The k for which position t is mostly trained on token t + k; None where no k fits."""
    on, width = r.trained, frame.ids.shape[1]
    shares: dict[int, float] = {}
    for k in range(-2, min(5, width)):
        inside = on.clone()  # positions with a token k ahead
        inside[:, : max(0, -k)] = False
        inside[:, width - max(0, k) :] = False
        if bool(inside.any()):
            hits = float((frame.ids.roll(-k, 1) == r.target)[inside].float().mean())
            shares[k] = hits * min(1.0, float(inside.sum() / on.sum()) + 0.25)
    best = max(shares, key=lambda k: shares[k], default=0)
    if shares.get(1, 0.0) >= 0.9 * shares.get(best, 1.0):
        best = 1
    return best if shares.get(best, 0.0) >= 0.5 else None


def _alignment(ctx: Context, r: Readout, mode: str) -> list[Finding]:
    frame, on = ctx.full, r.trained
    if not bool(on.any()):
        return []
    k = offset_of(frame, r)
    if k != 1:
        return _shifted(ctx, r, on, k, mode)
    said, after = frame.label_of_next, r.target == ahead(frame.ids, -1)
    eos = _closing_eos(frame, r)
    right = frame.next_ok & (after | (r.target == said)) | eos
    right[:, -1] |= _told_beyond(frame, r)
    # PAD itself, the last real token before PAD, or the last column with PAD as its target
    pad = ~frame.real | (~ahead(frame.real, True) & after)
    pad[:, -1] = frame.has_pad & (r.target[:, -1] == (frame.pad_id or 0))
    pad &= on & ~eos
    ignored = on & frame.next_ok & (said == IGNORE)
    found = []
    wrong = on & ~pad & ~right
    if bool(wrong.any()):
        found.append(_at(ctx, r, wrong, "shift", mode + "{} is trained on"))
    if bool(pad.any()):
        found.append(_at(ctx, r, pad, "pad", mode + _OF_PAD))
    elif bool(ignored.any()):
        found.append(_at(ctx, r, ignored, "pad", mode + "{} counts though its label is -100:"))
    else:
        found += _off_target(ctx, r, on, mode)
    return found


def _closing_eos(frame: AuditBatch, r: Readout) -> Tensor:
    """(B, T): where PAD and EOS share an id, the first PAD may stand for the EOS of its row."""
    if frame.pad_id is None or frame.pad_id != frame.eos_id:
        return torch.zeros_like(frame.real)
    found = frame.real & ~ahead(frame.real, True) & (frame.ids != frame.eos_id)
    if frame.labels is not None:
        found &= frame.label_of_next == frame.eos_id
    # Only if it ends there: with the rest of the PAD trained as well it is no EOS but a fault.
    return found & ~(r.trained & ~frame.real & ~frame.left).any()


def _told_beyond(frame: AuditBatch, r: Readout) -> Tensor:
    """(B,): the last column is trained on a label that the batch brought along already shifted.

    A label that merely repeats the row's (or the next row's) first token came out of a `roll` or of
    flattened rows: that is no knowledge of what comes next.
    """
    if frame.labels is None or not frame.labels_ahead:
        return torch.zeros_like(frame.real[:, -1])
    last, first = frame.labels[:, -1], frame.ids[:, 0]
    rolled = torch.equal(last, first) or torch.equal(last, first.roll(-1))
    return (r.target[:, -1] == last) & (not rolled)


def _shifted(ctx: Context, r: Readout, on: Tensor, k: int | None, mode: str) -> list[Finding]:
    frame = ctx.full
    what = {
        0: "the loss is not shifted: position t is trained on token t itself",
        2: "the targets are shifted twice: position t is trained on token t + 2",
        None: "the targets are no fixed number of tokens ahead",
    }.get(k, f"position t is trained on token t {k or 0:+d}")
    known = on & frame.next_ok & (r.target != frame.ids.roll(-1, 1))
    hit = known if bool(known.any()) else on
    found = [_at(ctx, r, hit, "shift", f"{mode}{what}; {{}}:")]
    # With another offset, PAD still must not be a target: count it only where k points.
    k = k or 0
    pad = on & ~frame.real.roll(-k, 1) & ~frame.real & (r.target == frame.ids.roll(-k, 1))
    pad[:, frame.ids.shape[1] - max(0, k) :] = False
    if bool(pad.any()):
        found.append(_at(ctx, r, pad, "pad", mode + _OF_PAD))
    return found


def _off_target(ctx: Context, r: Readout, on: Tensor, mode: str) -> list[Finding]:
    """PAD that moves the loss without a target: label smoothing's uniform term, a z-loss.

    A z-loss over real tokens may well include those that are not counted; its gradient sums to more
    than zero, that of smoothing sums to zero.
    """
    real, plays = ctx.full.real, r.pull > _COUNTS * r.pull.max()
    smooth = (r.lump.abs() < 1e-3 * r.pull) & ~ahead(real, False)
    hit = plays & ~on & (~real | smooth) & ctx.full.has_pad
    if not bool(hit.any()):
        return []
    share = float(r.pull[hit].sum() / r.pull.sum())
    seen = (
        f"{mode}{int(hit.sum())} positions whose target is PAD move the loss without a target "
        f"(label smoothing or a z-loss over PAD), with {share:.1%} of the pull; first at row "
        "{row}, position {t}"
    )
    return [ctx.first("pad", seen, "pad targets", hit, share)]


def _at(ctx: Context, r: Readout, hit: Tensor, label: str, text: str) -> Finding:
    """`text` with the first place put in, the tokens there, and how much of the loss it is."""
    b, t = hit.nonzero()[0].tolist()
    share = float(r.weight[hit].abs().sum() / r.weight.abs().sum().clamp_min(1e-300))
    ids = [*ctx.full.ids[b].tolist(), "the end of the row"]
    seen = (
        f"{text.format(f'row {b}, position {t}')} token {ids[t]} -> target {int(r.target[b, t])}, "
        f"followed by {ids[t + 1]}; {int(hit.sum())} such positions hold {share:.1%} of the "
        "loss's weight"
    )
    return ctx.first(label, seen, "targets" if label == "shift" else "pad targets", hit, share)


def ending(ctx: Context) -> list[Finding]:
    """Is the token that ends a document ever a counted target?

    Looked at where an end can be seen: the last real token before PAD or before another document.
    With an EOS in hand, the whole batch is scanned for it as well.
    """
    frame, r = ctx.full, ctx.readout(True)
    need("shift" not in ctx.blamed, "the targets are shifted, so none is where it should be")
    ends = frame.ends
    if frame.eos_id is not None:
        at = frame.real & (frame.ids == frame.eos_id)
        at[:, 0] = False
        if not bool(at.any()):
            if bool((r.trained & _closing_eos(frame, r)).any()):
                return []
            if bool(ends.any()):
                return [_never(ctx, "no document in the batch ends in EOS", ends)]
        ends = at
    need(ends.any(), "no document is seen to end in this batch")
    target = frame.next_ok.roll(1, 1)  # the last column has no next: nothing comes round
    counted = r.trained.roll(1, 1) & target
    ends = ends & target
    if offset_of(frame, r) != 1 or bool((counted & ends).any()) or not bool(ends.any()):
        return []
    if frame.eos_id is None:  # then all ends share a token, or all else counts and just they do not
        tokens, others = frame.ids[ends], target & ~ends
        same = bool((tokens == tokens[0]).all())
        if len(tokens) < 2 or not (same or (bool(others.any()) and bool(counted[others].all()))):
            return []
    return [_never(ctx, "the last token of a document is never a counted target", ends)]


def _never(ctx: Context, what: str, ends: Tensor) -> Finding:
    seen = what + ": row {row}, position {t}; the model cannot learn to stop"
    return ctx.first("eos", seen, "eos", ends, float(ends.sum()))
