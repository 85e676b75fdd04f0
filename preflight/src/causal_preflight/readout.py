"""Probes of what the loss trains: which targets, with what weights, and whether EOS is one.

They read `Readout`, in train mode and in eval mode where some losses take another branch.
"""

import torch
from torch import Tensor

from causal_preflight.batch import IGNORE, AuditBatch, shift_left
from causal_preflight.context import Context, Move
from causal_preflight.gradient_fit import is_distribution
from causal_preflight.instrumented_model import Readout
from causal_preflight.report import Finding, UnexaminableError, require

NO_TARGET = "no position of the batch is trained on a target"
_PAD_COUNTS = "{} is trained though it or its target is PAD:"
_IGNORED = "{} is trained though its label is -100, or its `loss_mask` is False:"
SOFT = 0.02  # residual of the fit from which targets may be distributions
_UNREAD = 0.1  # and from which they cannot be read as tokens
_TAKES_PART = 1e-6  # fraction of the largest gradient below which a position plays no part


def alignment(ctx: Context) -> list[Finding]:
    """Every counted position must be trained on the next token of its document, none on PAD."""
    found: dict[str, Finding] = {}
    counts = any(bool(ctx.readout(train).trained.any()) for train in (True, False))
    require(counts, NO_TARGET)
    if "soft targets" in ctx.explained:  # examined already
        return []
    r = ctx.readout(True)
    require(r.residual < _UNREAD or offset_of(ctx.full, r) == 1, "no single target at a position")
    for train in (True, False):
        for f in _alignment(ctx, ctx.readout(train), "" if train else "in eval mode: "):
            found.setdefault(f.label, f)
    ctx.explained |= {"pad target" if label == "pad" else label for label in found}
    return list(found.values())


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


def _alignment(ctx: Context, r: Readout, mode: str) -> list[Finding]:
    batch, on = ctx.full, r.trained
    if not bool(on.any()):
        return []
    k = offset_of(batch, r)
    if k != 1:
        return _shifted(ctx, r, k, mode)
    label, is_next = batch.label_of_next, r.target == shift_left(batch.ids, -1)
    eos = _closing_eos(batch, r)
    pair = batch.has_target | shift_left(batch.opening_eos, False)
    expected = pair & (is_next | (r.target == label)) | eos
    if batch.labels is not None and batch.labels_shifted:
        # The label beyond the row is expected, except from a `roll` or from flattened rows.
        last, first = batch.labels[:, -1], batch.ids[:, 0]
        rolled = torch.equal(last, first) or torch.equal(last, first.roll(-1))
        expected[:, -1] |= (r.target[:, -1] == last) & (not rolled)
    # A target is PAD at PAD itself, at the last real token before PAD, or in the last column.
    pad = ~batch.real | (~shift_left(batch.real, True) & is_next)
    pad[:, -1] = batch.has_pad & (r.target[:, -1] == (batch.pad_id or 0))
    pad &= on & ~eos
    ignored = on & batch.has_target & (label == IGNORE)
    mask = batch.raw.get("loss_mask")
    if isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == on.shape:
        # Of tokens as targets, or of positions: flagged is what neither reading counts.
        ignored |= on & batch.has_target & ~(mask | shift_left(mask, False))
    wrong = on & ~pad & ~expected
    found = [_first(ctx, r, wrong, "shift", mode + "{} is trained on")] if wrong.any() else []
    for hit, text in ((pad, _PAD_COUNTS), (ignored, _IGNORED)):
        if bool(hit.any()):
            return [*found, _first(ctx, r, hit, "pad", mode + text)]
    return found + _without_target(ctx, r, mode)


def _closing_eos(batch: AuditBatch, r: Readout) -> Tensor:
    """(B, T): where PAD and EOS share an id, positions whose target is the PAD that is an EOS."""
    if batch.pad_id is None or batch.pad_id != batch.eos_id:
        return torch.zeros_like(batch.real)
    found = batch.real & ~shift_left(batch.real, True) & (batch.ids != batch.eos_id)
    if batch.labels is not None:
        found &= batch.label_of_next == batch.eos_id
    # Only if nothing after it is trained: with the rest of the PAD as targets it is a fault.
    return found & ~(r.trained & ~batch.real & ~batch.left_pad).any()


def _shifted(ctx: Context, r: Readout, k: int | None, mode: str) -> list[Finding]:
    batch, on = ctx.full, r.trained
    what = {
        0: "the loss is not shifted: position t is trained on token t itself",
        2: "the targets are shifted twice: position t is trained on token t + 2",
        None: "the targets are no fixed number of tokens away",
    }.get(k, f"position t is trained on token t {k or 0:+d}")
    known = on & batch.has_target & (r.target != batch.ids.roll(-1, 1))
    hit = known if bool(known.any()) else on
    found = [_first(ctx, r, hit, "shift", f"{mode}{what}; {{}}:")]
    # PAD must not be a target at that offset either.
    k = k or 0
    pad = on & ~batch.real.roll(-k, 1) & ~batch.real & (r.target == batch.ids.roll(-k, 1))
    pad[:, batch.ids.shape[1] - max(0, k) :] = False
    return found + ([_first(ctx, r, pad, "pad", mode + _PAD_COUNTS)] if bool(pad.any()) else [])


def _without_target(ctx: Context, r: Readout, mode: str) -> list[Finding]:
    """PAD that moves the loss without being a target: label smoothing's uniform term, a z-loss.

    A z-loss may include real tokens that are not counted; its gradient sums to more than zero.
    """
    real, takes_part = ctx.full.real, r.max_abs_grad > _TAKES_PART * r.max_abs_grad.max()
    smooth = (r.grad_sum.abs() < 1e-3 * r.max_abs_grad) & ~shift_left(real, False)
    hit = takes_part & ~r.trained & (~real | smooth) & ctx.full.has_pad
    if not bool(hit.any()):
        return []
    fraction = float(r.max_abs_grad[hit].sum() / r.max_abs_grad.sum())
    seen = f"{mode}{int(hit.sum())} positions whose target is PAD move the loss without a target "
    seen += f"(label smoothing or a z-loss over PAD), with {fraction:.1%} of the gradient; "
    seen += "first at row {row}, position {t}"
    return [ctx.finding_at("pad", seen, "pad targets", hit, fraction)]


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


def ending(ctx: Context) -> list[Finding]:
    """The token that ends a document must be a counted target somewhere in the batch.

    An end is every EOS; where it is unknown, the last real token before PAD or another document.
    """
    batch, r = ctx.full, ctx.readout(True)
    require("shift" not in ctx.explained, "the targets are shifted, so EOS is not where it belongs")

    def never_ends(what: str, ends: Tensor) -> list[Finding]:
        seen = what + ": row {row}, position {t}; the model cannot learn to stop"
        return [ctx.finding_at("eos", seen, "eos", ends, float(ends.sum()))]

    ends = batch.ends
    if batch.eos_id is not None:
        eos = batch.real & (batch.ids == batch.eos_id)
        eos[:, 0] = False
        if not bool(eos.any()):
            if bool((r.trained & _closing_eos(batch, r)).any()):
                return []
            if bool(ends.any()):
                return never_ends("no document in the batch ends in EOS", ends)
        ends = eos
    is_target = batch.has_target.roll(1, 1) | batch.opening_eos  # False in the last column
    counted, ends = r.trained.roll(1, 1) & is_target, ends & is_target
    require(ends.any(), "no document is seen to end in this batch")
    require(offset_of(batch, r) == 1, "the targets are not the next tokens")
    tokens, others = batch.ids[ends], is_target & ~ends
    seen = bool((counted & ends).any())
    if batch.eos_id is None and not (len(tokens) > 1 and bool((tokens == tokens[0]).all())):
        # A fault only if nothing but the ends does not count.
        only = len(tokens) > 1 and bool(others.any()) and bool(counted[others].all())
        require(only and not seen, "which id is EOS cannot be told: pass eos_id")
    what = "the last token of a document is never a counted target"
    return [] if seen else never_ends(what, ends)


def reduction(ctx: Context) -> list[Finding]:
    """The token weights must be those of a mean or a sum, or of a weighting by intent (a note)."""
    require("inexact weights" not in ctx.explained, "the loss is fused: weights are known nearly")
    found = _reduction(ctx)
    if found and (note := _weighting(ctx)):
        ctx.report.remarks.append(f"reduction: {note}")
        return []
    return found


def _weighting(ctx: Context) -> str | None:
    """A tensor of the batch that weighs the targets; or weights by target (focal, of classes)."""
    r, rows = ctx.readout(True), len(ctx.full.ids)
    w, y = r.weight[r.trained], r.target[r.trained]
    for name, v in ctx.full.raw.items():
        if not (isinstance(v, Tensor) and v.is_floating_point() and v.ndim in (1, 2)):
            continue
        if len(v) != rows or bool(((v == 0) | (v == 1)).all()):  # a mask
            continue
        ones = ctx.model.readout(ctx.full.with_tensor(name, torch.ones_like(v)), True)
        if not _near(ones.weight[r.trained], w, 1e-3):
            return f"the batch weighs the targets by `{name}`; these weights are not judged"
    groups = [w[y == token] for token in y.unique() if int((y == token).sum()) > 1]
    by_target = len(groups) > 2 and all(_near(g, g.mean(), 1e-3) for g in groups)
    if by_target and not _near(w, w.mean(), 1e-2):
        return "the weights depend on the target alone (focal loss, class weights); not judged"
    return None


def _reduction(ctx: Context) -> list[Finding]:
    """Read the reduction off the weights; if unclear, a second batch decides.

    Accepted are the token mean (all 1/N), the sum (all one constant, whatever the batch) and the
    mean over rows, or documents, of means.
    """
    require("pad target" not in ctx.explained, "wrong targets count, which changes every weight")
    r, batch = ctx.readout(True), ctx.full
    on = r.trained
    require(bool(on.any()) and r.loss == r.loss, "no finite, counted position")
    if is_distribution(ctx.base.logits[ctx.base.made]):
        sums_up = bool((r.grad_sum.abs() <= 1e-3 * r.max_abs_grad)[on].all())
        require(sums_up, "the model returns probabilities, of which the loss takes the logarithm")
        seen = "the model returns probabilities (a softmax) where the loss expects logits"
        return [ctx.finding("reduction", seen, "logits", Move(float("nan")))]
    require(r.residual <= SOFT, "no single target at a position")
    tol = max(2e-2 if r.scaled else 2e-3, 3 * r.residual)
    w = r.weight[on]
    if _near(w, w.mean(), tol):
        return [] if _near(w.sum(), 1, tol) or _near(w.mean(), 1, tol) else _constant(ctx, r, tol)
    if _mean_of_means(r, batch.doc, tol, factor=len(ctx.model.heads) > 1):
        # With several calls: over rows, or over calls of one row? With the rows doubled, a mean
        # over rows stays one, while calls hold rows of two lengths.
        doubled = batch.rows([*range(len(batch.ids))] * 2)
        if r.pieces < 2 or _mean_of_means(ctx.model.readout(doubled, True), doubled.doc, tol):
            return []
        seen = f"the loss is a mean over {r.pieces} calls of the model of each call's own mean"
        return [ctx.finding("reduction", seen, "divide", Move(r.pieces))]
    low, high, total = (f"{float(x):.4g}" for x in (w.min(), w.max(), w.sum()))
    seen = f"the weights of the tokens differ from {low} to {high} (sum {total}) and are no mean "
    seen += "over rows either; heaviest at row {row}, position {t}"
    size = float(w.max() / w.min().clamp_min(1e-300))
    return [ctx.finding_at("reduction", seen, "divide", on & (r.weight == w.max()), size)]


def _near(value: Tensor, wanted: Tensor | float, tol: float) -> bool:
    wanted = torch.as_tensor(wanted)
    return bool(((value - wanted).abs() <= tol * wanted.abs()).all())


def _mean_of_means(r: Readout, doc: Tensor, tol: float, factor: bool = False) -> bool:
    """Equal within each row (or document), with equal sums: 1 or 1/B each, or with any `factor`."""
    row = torch.arange(len(doc), device=doc.device)[:, None].expand_as(doc)
    for group in (row, row * (int(doc.max()) + 2) + doc):
        parts = [r.weight[r.trained & (group == g)] for g in group[r.trained].unique()]
        sums = torch.stack([w.sum() for w in parts])
        uniform = all(_near(w, w.mean(), tol) for w in parts) and _near(sums, sums.mean(), tol)
        sizes = (1, len(sums), len(doc))
        if uniform and (factor or any(_near(sums.mean(), 1 / n, tol) for n in sizes)):
            return True
    return False


def _constant(ctx: Context, r: Readout, tol: float) -> list[Finding]:
    """All weights are one w, neither 1/N nor 1: cut the batch, and see how w follows."""
    batch, width = ctx.full, ctx.full.ids.shape[1]
    half = width // 2 + 1
    start = width - half if bool(batch.left_pad.any()) else 0
    cut = batch.cols(start, start + half)
    cut_r = ctx.model.readout(cut, True)
    w, cut_w = r.weight[r.trained], cut_r.weight[cut_r.trained]
    require(len(cut_w) and half < width, "the batch is too short to see how the loss is scaled")

    def documents(doc: Tensor, on: Tensor) -> int:
        """How many documents of all rows hold a counted token."""
        return len({(int(b), int(doc[b, t])) for b, t in on.nonzero()})

    share = w.mean() * documents(batch.doc, r.trained)  # of a document, with a fixed length
    counts = (batch.ids.numel(), batch.ids[:, 1:].numel())
    slots = any(_near(w.mean() * k, 1, tol) for k in counts)
    same_share = _near(cut_w.mean() * documents(cut.doc, cut_r.trained), share, tol)
    several = r.scaled or len(ctx.model.heads) > 1  # then the factor of a mean is not known
    if several and _near(cut_w.sum(), w.sum(), tol):
        return []
    if _near(cut_w.mean(), w.mean(), tol) or (same_share and not slots):
        return []  # a sum with a factor
    others = "something other than the counted targets, or twice"
    by, total = "all slots of the batch, PAD included" if slots else others, float(w.sum())
    seen = f"the loss is divided by {by}: {len(w)} counted tokens weigh {float(w.mean()):.4g} "
    seen += f"each, {total:.4g} instead of 1 together; with {len(cut_w)} tokens of the same rows, "
    seen += f"{float(cut_w.mean()):.4g} each"
    return [ctx.finding("reduction", seen, "divide", Move(total))]


def emptied(ctx: Context) -> list[Finding]:
    """A row without any target must not make the loss NaN; run if labels leave out tokens."""
    require("finite" not in ctx.explained, "the loss is not finite on the plain batch")
    batch, labels = ctx.work, ctx.work.labels
    left_out = batch.has_target & (batch.label_of_next == IGNORE)
    if labels is None or not bool(left_out.any()):
        raise UnexaminableError("every real token has a target: no row can be without a target")
    ignored = torch.full_like(labels[:1], IGNORE)
    empty = batch.with_tensor("labels", torch.cat([ignored, labels[1:]]))
    for train in (True, False):
        loss = float(ctx.model.run(empty, train).detach())
        if not abs(loss) < float("inf"):
            seen = f"the loss is {loss} once row {{row}} holds no target"
            return [ctx.finding("reduction", seen, "clamp", Move(loss, int(batch.slot[0, 0])))]
    return []
