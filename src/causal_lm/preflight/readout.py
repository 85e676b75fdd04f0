"""Probes of the loss: which target each position was trained on, and with what weight.

All of them read `Readout`, d loss / d logits resolved into targets and weights, in train mode and
in eval mode: some losses take another branch in each.
"""

import torch
from torch import Tensor

from causal_lm.preflight.context import COUNTS, Context, trained
from causal_lm.preflight.frame import IGNORE, Frame, Unexaminable
from causal_lm.preflight.report import Finding
from causal_lm.preflight.subject import Readout

SHIFT_REMEDY = (
    "train logits[:, t] on input_ids[:, t + 1], shifting exactly once, within each row and document"
)
PAD_REMEDY = (
    "give PAD targets the label -100, tell them by mask or length, and drop them before the mean"
)


def alignment(ctx: Context) -> list[Finding]:
    """Is every counted position trained on the next token of its own document, and on no PAD?"""
    found: list[Finding] = []
    for train in (True, False):
        r = ctx.readout(train)
        for f in _alignment(ctx.full, r, "" if train else "in eval mode: "):
            if f.label not in {x.label for x in found}:
                found.append(f)
    return found


def offset_of(frame: Frame, r: Readout) -> int | None:
    """The k for which position t is mostly trained on token t + k; None where no k fits."""
    on, ids = trained(r), frame.ids
    shares: dict[int, float] = {}
    for k in range(-2, 5):
        if abs(k) >= ids.shape[1]:
            continue
        ahead = torch.roll(ids, -k, 1)
        inside = torch.zeros_like(on)
        inside[:, max(0, -k) : ids.shape[1] - max(0, k)] = True
        inside &= on
        if bool(inside.any()):
            hits = (ahead == r.target)[inside].float().mean()
            shares[k] = float(hits) * min(1.0, float(inside.sum() / on.sum()) + 0.25)
    if not shares:
        return None
    best = max(shares, key=lambda k: shares[k])
    if shares.get(1, 0.0) >= 0.9 * shares[best]:
        best = 1
    return best if shares[best] >= 0.5 else None


def _alignment(frame: Frame, r: Readout, mode: str) -> list[Finding]:
    on = trained(r)
    if not bool(on.any()):
        return []
    k = offset_of(frame, r)
    if k != 1:
        return [_shifted(frame, r, on, k, mode), *_pad_under_shift(frame, r, on, k or 0, mode)]
    wrong, pad, ignored = _verdicts(frame, r, on)
    found = []
    if bool(wrong.any()):
        found.append(_at(frame, r, wrong, "shift", mode, "is trained on", SHIFT_REMEDY))
    if bool(pad.any()):
        found.append(
            _at(frame, r, pad, "pad", mode, "counts though its target is PAD:", PAD_REMEDY)
        )
    elif bool(ignored.any()):
        text = "counts though its label is -100:"
        found.append(_at(frame, r, ignored, "pad", mode, text, PAD_REMEDY))
    else:
        found += _off_target(frame, r, on, mode)
    return found


def _verdicts(frame: Frame, r: Readout, on: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, T) bool each: trained on a wrong token; trained on PAD; trained on an ignored label."""
    ids, ok, said = frame.ids, frame.next_ok, frame.label_of_next
    ahead = torch.roll(ids, -1, 1)
    right = (r.target == ahead) | (r.target == said)
    wrong = on & ok & ~right
    rest = on & ~ok
    inside = torch.zeros_like(on)
    inside[:, :-1] = True
    real_next = torch.roll(frame.real, -1, 1) & inside
    padded = inside & (~frame.real | ~real_next)
    pad = rest & padded & ~(frame.real & ~real_next & (r.target != ahead))
    pad &= ~_closing_eos(frame, r)
    wrong |= rest & padded & ~pad & ~_closing_eos(frame, r)
    wrong |= rest & inside & ~padded  # over the edge of a document
    last = rest & ~inside
    to_pad = last & (r.target == (-1 if frame.pad_id is None else frame.pad_id))
    if frame.has_pad:
        pad |= to_pad
        last = last & ~to_pad
    wrong |= last & ~_told_beyond(frame, r)
    ignored = on & ok & (said == IGNORE)
    return wrong, pad, ignored


def _closing_eos(frame: Frame, r: Readout) -> Tensor:
    """(B, T): where PAD and EOS share an id, the first PAD may stand for the EOS of its row."""
    none = torch.zeros_like(frame.real)
    if frame.pad_id is None or frame.pad_id != frame.eos_id:
        return none
    none[:, :-1] = frame.real[:, :-1] & ~frame.real[:, 1:] & (frame.ids[:, :-1] != frame.eos_id)
    if frame.labels is not None:
        none &= frame.label_of_next == frame.eos_id
    # Only if it ends there: with the rest of the PAD trained as well it is no EOS but a fault.
    beyond = trained(r) & ~frame.real & ~frame.left
    return none & ~beyond.any()


def _told_beyond(frame: Frame, r: Readout) -> Tensor:
    """(B, T): the last column, trained on a label that the batch brought along already shifted.

    A label that merely repeats the row's (or the next row's) first token came out of a `roll` or of
    flattened rows: that is no knowledge of what comes next.
    """
    told = torch.zeros_like(frame.real)
    if frame.labels is None or not frame.labels_ahead:
        return told
    last, first = frame.labels[:, -1], frame.ids[:, 0]
    rolled = bool((last == first).all()) or bool((last == first.roll(-1)).all())
    told[:, -1] = (r.target[:, -1] == last) & (not rolled)
    return told


def _shifted(frame: Frame, r: Readout, on: Tensor, k: int | None, mode: str) -> Finding:
    known = on & frame.next_ok & (r.target != torch.roll(frame.ids, -1, 1))
    b, t = _first(known if bool(known.any()) else on)
    what = {
        0: "the loss is not shifted: position t is trained on token t itself",
        2: "the targets are shifted twice: position t is trained on token t + 2",
        None: "the targets are no fixed number of tokens ahead",
    }.get(k, f"position t is trained on token t {'+' if (k or 0) > 0 else '-'} {abs(k or 0)}")
    seen = f"{mode}{what}; {_evidence(frame, r, b, t)}"
    return Finding(
        "shift", "alignment", seen, SHIFT_REMEDY, float(on.sum()), b, t, int(frame.ids[b, t])
    )


def _pad_under_shift(frame: Frame, r: Readout, on: Tensor, k: int, mode: str) -> list[Finding]:
    """With another offset, PAD still must not be a target; count only PAD found where it points."""
    ahead = torch.roll(frame.ids, -k, 1)
    gone = ~torch.roll(frame.real, -k, 1)
    if k > 0:
        gone[:, -k:] = False
    hit = on & gone & (r.target == ahead) & ~frame.real
    text = "counts though its target is PAD:"
    return [_at(frame, r, hit, "pad", mode, text, PAD_REMEDY)] if bool(hit.any()) else []


def _off_target(frame: Frame, r: Readout, on: Tensor, mode: str) -> list[Finding]:
    """PAD that moves the loss without a target: label smoothing's uniform term, a z-loss.

    A z-loss over real tokens may well include those that are not counted; its gradient sums to more
    than zero, that of smoothing sums to zero.
    """
    plays = r.pull > COUNTS * r.pull.max()
    smooth = r.lump.abs() < 1e-3 * r.pull
    real_next = torch.zeros_like(on)
    real_next[:, :-1] = frame.real[:, 1:]
    hit = plays & ~on & (~frame.real | (smooth & ~real_next)) & frame.has_pad
    if not bool(hit.any()):
        return []
    b, t = _first(hit)
    share = float(r.pull[hit].sum() / r.pull.sum())
    seen = (
        f"{mode}{int(hit.sum())} positions whose target is PAD move the loss without a target "
        f"(label smoothing or a z-loss over PAD), with {share:.1%} of the pull; first at row {b}, "
        f"position {t}"
    )
    return [Finding("pad", "alignment", seen, PAD_REMEDY, share, b, t, int(frame.ids[b, t]))]


def _at(
    frame: Frame, r: Readout, hit: Tensor, label: str, mode: str, text: str, remedy: str
) -> Finding:
    b, t = _first(hit)
    share = float(r.weight[hit].abs().sum() / r.weight.abs().sum().clamp_min(1e-300))
    seen = (
        f"{mode}row {b}, position {t} {text} {_evidence(frame, r, b, t)}; "
        f"{int(hit.sum())} such positions hold {share:.1%} of the loss's weight"
    )
    return Finding(label, "alignment", seen, remedy, share, b, t, int(frame.ids[b, t]))


def _evidence(frame: Frame, r: Readout, b: int, t: int) -> str:
    ids = frame.ids[b].tolist()
    after = str(ids[t + 1]) if t + 1 < len(ids) else "the end of the row"
    return f"token {ids[t]} -> target {int(r.target[b, t])}, followed by {after}"


def _first(hit: Tensor) -> tuple[int, int]:
    b, t = hit.nonzero()[0].tolist()
    return b, t


def ending(ctx: Context) -> list[Finding]:
    """Is the token that ends a document ever a counted target?

    Looked at where an end can be seen: the last real token before PAD or before another document.
    With an EOS in hand, the whole batch is scanned for it as well.
    """
    frame = ctx.full
    ends = frame.ends
    if frame.eos_id is not None:
        at = frame.real & (frame.ids == frame.eos_id)
        at[:, 0] = False
        if not bool(at.any()):
            first_pad = trained(ctx.readout(True)) & _closing_eos(frame, ctx.readout(True))
            if bool(first_pad.any()):
                return []
            if not bool(ends.any()):
                raise Unexaminable("no document is seen to end in this batch")
            return [_never("no document in the batch ends in EOS", frame, ends)]
        ends = at
    if not bool(ends.any()):
        raise Unexaminable("no document is seen to end in this batch")
    r = ctx.readout(True)
    counted = torch.zeros_like(ends)
    counted[:, 1:] = (trained(r) & frame.next_ok)[:, :-1]
    if offset_of(frame, r) != 1 or bool((counted & ends).any()):
        return []
    reachable = torch.zeros_like(ends)
    reachable[:, 1:] = frame.next_ok[:, :-1]
    ends &= reachable
    if not bool(ends.any()) or not (frame.eos_id is not None or _looks_like_eos(frame, ends, r)):
        return []
    return [_never("the last token of a document is never a counted target", frame, ends)]


def _looks_like_eos(frame: Frame, ends: Tensor, r: Readout) -> bool:
    """Without eos_id: all ends share a token, or all else counts and just the ends do not."""
    tokens = frame.ids[ends]
    if len(tokens) > 1 and bool((tokens == tokens[0]).all()):
        return True
    others = torch.zeros_like(ends)
    others[:, 1:] = frame.next_ok[:, :-1]
    others &= ~ends
    hit = torch.zeros_like(ends)
    hit[:, 1:] = trained(r)[:, :-1]
    return len(tokens) > 1 and bool(hit[others].all()) and bool(others.any())


def _never(what: str, frame: Frame, ends: Tensor) -> Finding:
    b, t = _first(ends)
    token = int(frame.ids[b, t])
    seen = f"{what}: row {b}, position {t}, token {token}; the model cannot learn to stop"
    remedy = (
        "end every document in EOS and count it; where PAD and EOS share an id, tell PAD by mask "
        "or length, never by comparing ids"
    )
    return Finding("eos", "ending", seen, remedy, float(ends.sum()), b, t, token)
