"""Probes of the targets that the loss trains: the next token, none at PAD, none left out, and EOS.

They read `Readout`, also in eval mode where some losses take another branch.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from causal_preflight.batch import IGNORE, AuditBatch, like_ids, one_a_row, shift
from causal_preflight.context import Context, Move
from causal_preflight.gradient_fit import Readout
from causal_preflight.report import Finding, require

NO_TARGET = "no position of the batch is trained on a target"
SOFT = 0.02  # residual of the fit from which targets may be distributions
_UNREAD = 0.1  # and from which they cannot be read as tokens
_TAKES_PART = 1e-6  # fraction of the largest gradient below which a position plays no part
_MOVED = 0.02  # fraction of the largest move of a row that counts as one
_PAD_COUNTS = "{} is trained though it or its target is PAD:"
_IGNORED = "{} is trained though its label is -100, or its `loss_mask` is False:"
_OWN = ("input_ids", "labels", "attention_mask", "document_ids", "position_ids")


def offset_of(batch: AuditBatch, r: Readout, most: int = 4) -> int | None:
    """The k <= `most` for which t is mostly trained on token t + k; None where no k fits."""
    on, width = r.trained, batch.ids.shape[1]
    scores: dict[int, float] = {}
    for k in range(-2, min(most + 1, width)):
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


def alignment(ctx: Context) -> Iterator[Finding]:
    """Every counted position must be trained on the next token of its document, none on PAD."""
    modes = {"": ctx.readout(True), "in eval mode: ": ctx.readout(False)}
    require(any(bool(r.trained.any()) for r in modes.values()), NO_TARGET)
    if "soft targets" in ctx.explained:  # examined already
        return
    fits = modes[""].residual < _UNREAD or offset_of(ctx.full, modes[""]) == 1
    require(fits, "no single target at a position")
    found: dict[str, Finding] = {}
    for mode, r in modes.items():
        for f in _alignment(ctx, r, mode) if bool(r.trained.any()) else ():
            found.setdefault(f.label, f)
    ctx.explained |= {"pad target" if label == "pad" else label for label in found}
    yield from found.values()


def _alignment(ctx: Context, r: Readout, mode: str) -> Iterator[Finding]:
    batch, on, k = ctx.full, r.trained, offset_of(ctx.full, r)
    if k != 1:
        yield from _shifted(ctx, r, k, mode)
        return
    label, is_next = batch.label_of_next, r.target == shift(batch.ids, 1, -1)
    eos = _closing_eos(batch, r)
    pair = batch.has_target | shift(batch.opening_eos, 1, False)
    expected = pair & (is_next | (r.target == label)) | eos
    if batch.labels is not None and batch.labels_shifted:
        # The label beyond the row is expected, except from a `roll` or from flattened rows.
        last, first = batch.labels[:, -1], batch.ids[:, 0]
        rolled = torch.equal(last, first) or torch.equal(last, first.roll(-1))
        expected[:, -1] |= (r.target[:, -1] == last) & (not rolled)
    # A target is PAD at PAD itself, at the last real token before PAD, or in the last column.
    pad = ~batch.real | (~shift(batch.real, 1, True) & is_next)
    pad[:, -1] = batch.has_pad & (r.target[:, -1] == (batch.pad_id or 0))
    pad &= on & ~eos
    ignored = on & batch.has_target & (label == IGNORE)
    mask = like_ids(batch.raw, "loss_mask")
    if mask is not None and mask.dtype == torch.bool:
        # Of tokens as targets, or of positions: flagged is what neither reading counts.
        ignored |= on & batch.has_target & ~(mask | shift(mask, 1, False))
    wrong = on & ~pad & ~expected
    if bool(wrong.any()):
        yield _first(ctx, r, wrong, "shift", mode + "{} is trained on")
    if bool((pad | ignored).any()):
        hit, text = (pad, _PAD_COUNTS) if bool(pad.any()) else (ignored, _IGNORED)
        yield _first(ctx, r, hit, "pad", mode + text)
    else:
        yield from _without_target(ctx, r, mode)


def _closing_eos(batch: AuditBatch, r: Readout) -> Tensor:
    """(B, T): where PAD and EOS share an id, positions whose target is the PAD that is an EOS."""
    if batch.pad_id is None or batch.pad_id != batch.eos_id:
        return torch.zeros_like(batch.real)
    found = batch.real & ~shift(batch.real, 1, batch.labels is None) & (batch.ids != batch.eos_id)
    if batch.labels is not None:
        found &= batch.label_of_next == batch.eos_id
    # Only if nothing after it is trained: with the rest of the PAD as targets it is a fault.
    return found & ~(r.trained & ~batch.real & ~batch.left_pad).any()


def _shifted(ctx: Context, r: Readout, offset: int | None, mode: str) -> Iterator[Finding]:
    batch, on, k = ctx.full, r.trained, offset or 0
    what = {
        0: "the loss is not shifted: position t is trained on token t itself",
        2: "the targets are shifted twice: position t is trained on token t + 2",
        None: "the targets are no fixed number of tokens away",
    }.get(offset, f"position t is trained on token t {k:+d}")
    known = on & batch.has_target & (r.target != batch.ids.roll(-1, 1))
    yield _first(ctx, r, known if bool(known.any()) else on, "shift", f"{mode}{what}; {{}}:")
    # PAD must not be a target at that offset either.
    pad = on & ~batch.real.roll(-k, 1) & ~batch.real & (r.target == batch.ids.roll(-k, 1))
    pad[:, batch.ids.shape[1] - max(0, k) :] = False
    if bool(pad.any()):
        yield _first(ctx, r, pad, "pad", mode + _PAD_COUNTS)


def _without_target(ctx: Context, r: Readout, mode: str) -> Iterator[Finding]:
    """PAD that moves the loss without being a target: label smoothing's uniform term, a z-loss.

    A z-loss may include real tokens that are not counted; its gradient sums to more than zero.
    """
    real, takes_part = ctx.full.real, r.max_abs_grad > _TAKES_PART * r.max_abs_grad.max()
    smooth = (r.grad_sum.abs() < 1e-3 * r.max_abs_grad) & ~shift(real, 1, False)
    hit = takes_part & ~r.trained & (~real | smooth) & ctx.full.has_pad
    if bool(hit.any()):
        fraction = float(r.max_abs_grad[hit].sum() / r.max_abs_grad.sum())
        seen = f"{mode}{int(hit.sum())} positions whose target is PAD move the loss without a "
        seen += f"target (label smoothing or a z-loss over PAD), with {fraction:.1%} of the "
        seen += "gradient; first at row {row}, position {t}"
        yield ctx.finding_at("pad", seen, "pad targets", hit, fraction)


def _first(ctx: Context, r: Readout, hit: Tensor, label: str, text: str) -> Finding:
    """`text` with the first place put in, the tokens there, and how much of the loss it is."""
    b, t = hit.nonzero()[0].tolist()
    fraction = float(r.weight[hit].abs().sum() / r.weight.abs().sum().clamp_min(1e-300))
    ids = [*ctx.full.ids[b].tolist(), "the end of the row"]
    place = text.format(f"row {b}, position {t}")
    seen = f"{place} token {ids[t]} -> target {int(r.target[b, t])}, followed by {ids[t + 1]}; "
    seen += f"{int(hit.sum())} such positions hold {fraction:.1%} of the loss's weight"
    remedy = "targets" if label == "shift" else "pad targets"
    return ctx.finding_at(label, seen, remedy, hit, fraction)


def dropped(ctx: Context) -> Iterator[Finding]:
    """A real target that the batch labels must count; without labels, the ends of rows must.

    One may be left out where another entry of the batch is zero, after an EOS, by a selection that
    the loss makes from logits, and before the last k logits of a row labeled in full.
    """
    known = {"shift", "pad target", "soft targets"} & ctx.explained
    require(not known, "which targets count cannot be told")
    batch, counted = ctx.full, ctx.readout(True).trained | ctx.readout(False).trained
    missing = batch.has_target & (batch.label_of_next != IGNORE) & ~counted
    missing &= batch.ids != batch.eos_id
    ends = shift(batch.ends | torch.isin(batch.ids, batch.special), 1, False)
    missing &= ~ends | (counted & ends).any()
    if batch.labels is None:  # a prompt may be left out by any rule; the ends of all rows may not
        tail = (counted.any(0).flip(0).long().cumsum(0) == 0).flip(0)
        missing &= tail & bool(tail[:-1].sum() > 1)
    elif bool((batch.label_of_next != IGNORE)[batch.has_target].all()) and bool(missing.any()):
        missing &= ctx.model.observe(batch).made.long().cumsum(1) > 0
    for v in (like_ids(batch.raw, name) for name in batch.raw if name not in _OWN):
        for mask in (v, shift(v, 1, 0)) if v is not None else ():
            missing &= bool(mask[missing].any()) or not bool(mask[counted].all())
    # With other logits, the loss may select others.
    trained = ctx.model.readout(batch, True, -1.0).trained if bool(missing.any()) else None
    if trained is not None and torch.equal(trained, ctx.readout(True).trained):
        ctx.explained.add("pad target")
        seen = f"{int(missing.sum())} real targets never count, {int(counted.sum())} do; the first "
        seen += "of them is that of row {row}, position {t}"
        yield ctx.finding_at("pad", seen, "dropped", missing, float(missing.sum()))


def soft(ctx: Context) -> Iterator[Finding]:
    """Targets that are distributions must be those of the same position, and none may be at PAD."""
    r = ctx.readout(True)
    require(r.residual > SOFT, "every target is a token")
    seen = f"{r.residual:.0%} of the loss's gradient is not that of one target a position"
    ctx.report.remarks.append(f"{seen} (soft targets?)")
    k, ahead = offset_of(ctx.full, r), _ahead(ctx) if ctx.model.head.replaceable else None
    require(ahead is not None, "no targets that move with a token or with logits of the batch")
    ctx.explained.add("soft targets")
    pad = (r.max_abs_grad > 1e-6 * r.max_abs_grad.max()) & ~ctx.full.real
    if ahead or k not in (None, 1):
        seen += f"; at position t it is that of soft targets of position t {ahead:+d}"
        seen += "" if k in (None, 1) else f" and of token t {k:+d}"
        ctx.explained.add("shift")
        yield ctx.finding("shift", seen, "targets", Move(r.residual))
    elif bool(pad.any()):
        seen = "PAD has soft targets, at first at row {row}, position {t}"
        yield ctx.finding_at("pad", seen, "pad targets", pad, float(pad.sum()))


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


def ending(ctx: Context) -> Iterator[Finding]:
    """EOS, or the last real token before PAD or a document, must be a counted target somewhere."""
    batch, r = ctx.full, ctx.readout(True)
    require("shift" not in ctx.explained, "the targets are shifted, so EOS is not where it belongs")
    ends, eos = batch.ends, batch.real & (batch.ids == batch.eos_id)
    eos[:, 0] = False
    what = "the last token of a document is never a counted target"
    is_target = batch.has_target.roll(1, 1) | batch.opening_eos  # False in the last column
    counted = r.trained.roll(1, 1) & is_target
    if batch.eos_id is not None and not bool(eos.any()) and bool(ends.any()):
        if bool((r.trained & _closing_eos(batch, r)).any()):
            return
        what = "no document in the batch ends in EOS"
    else:
        ends = (ends if batch.eos_id is None else eos) & is_target
        require(ends.any(), "no document is seen to end in this batch")
        require(offset_of(batch, r) == 1, "the targets are not the next tokens")
        tokens, others, seen = batch.ids[ends], is_target & ~ends, bool((counted & ends).any())
        if batch.eos_id is None and not (len(tokens) > 1 and bool((tokens == tokens[0]).all())):
            # A fault only if nothing but the ends does not count.
            only = len(tokens) > 1 and bool(others.any()) and bool(counted[others].all())
            require(only and not seen, "which id is EOS cannot be told: pass eos_id")
        if seen:
            return
    what += ": row {row}, position {t}; the model cannot learn to stop"
    yield ctx.finding_at("eos", what, "eos", ends, float(ends.sum()))
