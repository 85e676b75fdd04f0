"""Probes of the loss: which target each position was trained on, and with what weight.

All of them read `Readout`, d loss / d logits resolved into targets and weights, in train mode and
in eval mode: some losses take another branch in each.
"""

import torch
from torch import Tensor

from causal_lm.preflight.context import Context, trained
from causal_lm.preflight.frame import IGNORE, Frame, UnexaminableError
from causal_lm.preflight.report import Finding
from causal_lm.preflight.subject import Readout

COUNTS = 1e-6  # share of the largest pull below which a position plays no part in the loss
SHIFT_REMEDY = (
    "train logits[:, t] on input_ids[:, t + 1], shifting exactly once, within each row and document"
)
PAD_REMEDY = (
    "give PAD targets the label -100, tell them by mask or length, and drop them before the mean"
)
EOS_REMEDY = (
    "end every document in EOS and count it; where PAD and EOS share an id, tell PAD by mask or "
    "length, never by comparing ids"
)


def alignment(ctx: Context) -> list[Finding]:
    """Is every counted position trained on the next token of its own document, and on no PAD?"""
    found: dict[str, Finding] = {}
    for train in (True, False):
        for f in _alignment(ctx.full, ctx.readout(train), "" if train else "in eval mode: "):
            found.setdefault(f.label, f)
    return list(found.values())


def offset_of(frame: Frame, r: Readout) -> int | None:
    """The k for which position t is mostly trained on token t + k; None where no k fits."""
    on, width = trained(r), frame.ids.shape[1]
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


def _alignment(frame: Frame, r: Readout, mode: str) -> list[Finding]:
    on = trained(r)
    if not bool(on.any()):
        return []
    k = offset_of(frame, r)
    if k != 1:
        return _shifted(frame, r, on, k, mode)
    wrong, pad, ignored = _verdicts(frame, r, on)
    of_pad = "counts though its target is PAD:"
    found = []
    if bool(wrong.any()):
        found.append(_at(frame, r, wrong, "shift", f"{mode}{{}} is trained on", SHIFT_REMEDY))
    if bool(pad.any()):
        found.append(_at(frame, r, pad, "pad", f"{mode}{{}} {of_pad}", PAD_REMEDY))
    elif bool(ignored.any()):
        text = f"{mode}{{}} counts though its label is -100:"
        found.append(_at(frame, r, ignored, "pad", text, PAD_REMEDY))
    else:
        found += _off_target(frame, r, on, mode)
    return found


def _verdicts(frame: Frame, r: Readout, on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) bool each: trained on a wrong token; trained on PAD; trained on an ignored label."""
    ahead, said, ok = frame.ids.roll(-1, 1), frame.label_of_next, frame.next_ok
    right = (r.target == ahead) | (r.target == said)
    inside = torch.ones_like(on)
    inside[:, -1] = False
    to_pad = frame.real & ~frame.real.roll(-1, 1) & inside  # the last real token before PAD
    padded = inside & (to_pad | ~frame.real)
    eos = _closing_eos(frame, r)
    pad = on & padded & ~eos & ~(to_pad & (r.target != ahead))
    wrong = on & inside & ~padded & ~(ok & right)  # amiss, or over the edge of a document
    wrong |= on & padded & ~pad & ~eos
    last = on & ~inside
    if frame.has_pad:
        pad |= last & (r.target == (-1 if frame.pad_id is None else frame.pad_id))
    wrong |= last & ~pad & ~_told_beyond(frame, r)
    return wrong, pad, on & ok & (said == IGNORE)


def _closing_eos(frame: Frame, r: Readout) -> Tensor:
    """(B, T): where PAD and EOS share an id, the first PAD may stand for the EOS of its row."""
    none = torch.zeros_like(frame.real)
    if frame.pad_id is None or frame.pad_id != frame.eos_id:
        return none
    none[:, :-1] = frame.real[:, :-1] & ~frame.real[:, 1:] & (frame.ids[:, :-1] != frame.eos_id)
    if frame.labels is not None:
        none &= frame.label_of_next == frame.eos_id
    # Only if it ends there: with the rest of the PAD trained as well it is no EOS but a fault.
    return none & ~(trained(r) & ~frame.real & ~frame.left).any()


def _told_beyond(frame: Frame, r: Readout) -> Tensor:
    """(B, T): the last column, trained on a label that the batch brought along already shifted.

    A label that merely repeats the row's (or the next row's) first token came out of a `roll` or of
    flattened rows: that is no knowledge of what comes next.
    """
    told = torch.zeros_like(frame.real)
    if frame.labels is not None and frame.labels_ahead:
        last, first = frame.labels[:, -1], frame.ids[:, 0]
        rolled = torch.equal(last, first) or torch.equal(last, first.roll(-1))
        told[:, -1] = (r.target[:, -1] == last) & (not rolled)
    return told


def _shifted(frame: Frame, r: Readout, on: Tensor, k: int | None, mode: str) -> list[Finding]:
    what = {
        0: "the loss is not shifted: position t is trained on token t itself",
        2: "the targets are shifted twice: position t is trained on token t + 2",
        None: "the targets are no fixed number of tokens ahead",
    }.get(k, f"position t is trained on token t {k or 0:+d}")
    known = on & frame.next_ok & (r.target != frame.ids.roll(-1, 1))
    hit = known if bool(known.any()) else on
    found = [_at(frame, r, hit, "shift", f"{mode}{what}; {{}}:", SHIFT_REMEDY)]
    # With another offset, PAD still must not be a target: count it only where k points.
    k = k or 0
    gone = ~frame.real.roll(-k, 1) & ~frame.real
    gone[:, frame.ids.shape[1] - max(0, k) :] = False
    pad = on & gone & (r.target == frame.ids.roll(-k, 1))
    if bool(pad.any()):
        text = f"{mode}{{}} counts though its target is PAD:"
        found.append(_at(frame, r, pad, "pad", text, PAD_REMEDY))
    return found


def _off_target(frame: Frame, r: Readout, on: Tensor, mode: str) -> list[Finding]:
    """PAD that moves the loss without a target: label smoothing's uniform term, a z-loss.

    A z-loss over real tokens may well include those that are not counted; its gradient sums to more
    than zero, that of smoothing sums to zero.
    """
    plays = r.pull > COUNTS * r.pull.max()
    smooth = r.lump.abs() < 1e-3 * r.pull
    smooth[:, :-1] &= ~frame.real[:, 1:]
    hit = plays & ~on & (~frame.real | smooth) & frame.has_pad
    if not bool(hit.any()):
        return []
    b, t = hit.nonzero()[0].tolist()
    share = float(r.pull[hit].sum() / r.pull.sum())
    seen = (
        f"{mode}{int(hit.sum())} positions whose target is PAD move the loss without a target "
        f"(label smoothing or a z-loss over PAD), with {share:.1%} of the pull; first at row {b}, "
        f"position {t}"
    )
    return [Finding("pad", "alignment", seen, PAD_REMEDY, share, b, t, int(frame.ids[b, t]))]


def _at(frame: Frame, r: Readout, hit: Tensor, label: str, text: str, remedy: str) -> Finding:
    """`text` with the first place put in, the tokens there, and how much of the loss it is."""
    b, t = hit.nonzero()[0].tolist()
    share = float(r.weight[hit].abs().sum() / r.weight.abs().sum().clamp_min(1e-300))
    ids = frame.ids[b].tolist()
    after = ids[t + 1] if t + 1 < len(ids) else "the end of the row"
    seen = (
        f"{text.format(f'row {b}, position {t}')} token {ids[t]} -> target {int(r.target[b, t])}, "
        f"followed by {after}; {int(hit.sum())} such positions hold {share:.1%} of the loss's "
        "weight"
    )
    return Finding(label, "alignment", seen, remedy, share, b, t, ids[t])


def ending(ctx: Context) -> list[Finding]:
    """Is the token that ends a document ever a counted target?

    Looked at where an end can be seen: the last real token before PAD or before another document.
    With an EOS in hand, the whole batch is scanned for it as well.
    """
    frame, r = ctx.full, ctx.readout(True)
    if "shift" in ctx.blamed:
        raise UnexaminableError("the targets are shifted, so none is where it should be")
    ends = frame.ends
    if frame.eos_id is not None:
        at = frame.real & (frame.ids == frame.eos_id)
        at[:, 0] = False
        if not bool(at.any()) and bool((trained(r) & _closing_eos(frame, r)).any()):
            return []
        if not bool(at.any()) and bool(ends.any()):
            return [_never("no document in the batch ends in EOS", frame, ends)]
        ends = at
    if not bool(ends.any()):
        raise UnexaminableError("no document is seen to end in this batch")
    target, counted = torch.zeros_like(ends), torch.zeros_like(ends)
    target[:, 1:] = frame.next_ok[:, :-1]
    counted[:, 1:] = trained(r)[:, :-1]
    counted &= target
    if offset_of(frame, r) != 1 or bool((counted & ends).any()) or not bool((ends & target).any()):
        return []
    ends &= target
    if frame.eos_id is None:  # then all ends share a token, or all else counts and just they do not
        tokens, others = frame.ids[ends], target & ~ends
        same = bool((tokens == tokens[0]).all())
        if len(tokens) < 2 or not (same or (bool(others.any()) and bool(counted[others].all()))):
            return []
    return [_never("the last token of a document is never a counted target", frame, ends)]


def _never(what: str, frame: Frame, ends: Tensor) -> Finding:
    b, t = ends.nonzero()[0].tolist()
    token = int(frame.ids[b, t])
    seen = f"{what}: row {b}, position {t}, token {token}; the model cannot learn to stop"
    return Finding("eos", "ending", seen, EOS_REMEDY, float(ends.sum()), b, t, token)
