"""Probe of the reduction: do the weights of the tokens fit a mean or a sum that anyone would mean?

Accepted are the token mean (all weights 1/N), the plain sum (all one constant, whatever the batch)
and the sequence mean (a mean over rows, or documents, of means). A mean over rows times a fixed
length is a sum with another constant. What depends on the number of slots, PAD included, is none.
"""

import torch
from torch import Tensor

from causal_lm.preflight.context import Context, trained
from causal_lm.preflight.frame import Frame, Unexaminable
from causal_lm.preflight.report import Finding
from causal_lm.preflight.subject import Readout

REMEDY = (
    "sum the token losses and divide once, by the number of counted targets over all micro-batches "
    "and ranks (or keep the sum)"
)


def reduction(ctx: Context) -> list[Finding]:
    """Weights of the training loss on this batch; where one batch leaves doubt, on a second one."""
    if "pad target" in ctx.blamed:
        raise Unexaminable("PAD is trained, so the weights say nothing more")
    r, frame = ctx.readout(True), ctx.full
    on = trained(r)
    if not bool(on.any()) or r.loss != r.loss:
        raise Unexaminable("no finite, counted position")
    tol = max(2e-3, 3 * r.residual)
    w = r.weight[on]
    if _flat(w, tol):
        if _near(float(w.sum()), 1, tol) or _near(float(w.mean()), 1, tol):
            return []
        return _constant(ctx, r, tol)
    groups = [torch.arange(len(on), device=on.device)[:, None].expand_as(on)]
    groups.append(groups[0] * (int(frame.doc.max()) + 2) + frame.doc)
    if not any(_mean_of_means(r.weight, on, g, tol) for g in groups):
        b, t = (on & (r.weight == w.max())).nonzero()[0].tolist()
        seen = (
            f"the weights of the tokens differ from {float(w.min()):.3g} to {float(w.max()):.3g} "
            f"(sum {float(w.sum()):.3g}) and are no mean over rows either; heaviest at row {b}, "
            f"position {t}"
        )
        size = float(w.max() / w.min().clamp_min(1e-300))
        return [Finding("norm", "reduction", seen, REMEDY, size, b, t, int(frame.ids[b, t]))]
    return _by_call(ctx, r, tol)


def _near(value: float, wanted: float, tol: float) -> bool:
    return abs(value - wanted) <= tol * abs(wanted)


def _flat(w: Tensor, tol: float) -> bool:
    return bool(((w - w.mean()).abs() <= tol * w.mean().abs()).all())


def _mean_of_means(weight: Tensor, on: Tensor, group: Tensor, tol: float) -> bool:
    """Equal within each group, with sums that are equal and make 1, 1 each, or 1/B each."""
    sums = []
    for g in set(group[on].tolist()):
        w = weight[on & (group == g)]
        if not _flat(w, tol):
            return False
        sums.append(float(w.sum()))
    mean = sum(sums) / len(sums)
    if not all(_near(s, mean, tol) for s in sums):
        return False
    return any(_near(mean, 1 / n, tol) for n in (1, len(sums), len(weight)))


def _constant(ctx: Context, r: Readout, tol: float) -> list[Finding]:
    """All weights w, but neither 1/N nor 1: how does w follow the batch? Cut it and see.

    A constant w is a sum with a factor (rows times a fixed length, an accumulation count); w N > 1
    kept constant is a mean with a factor. A mean worth less than itself was divided twice.
    """
    frame = ctx.full
    on = trained(r)
    w, n = float(r.weight[on].mean()), int(on.sum())
    width = frame.ids.shape[1]
    half = width // 2 + 1
    cut = frame.cols(width - half, width) if bool(frame.left.any()) else frame.cols(0, half)
    r2 = ctx.subject.readout(cut, True)
    on2 = trained(r2)
    if not bool(on2.any()) or half >= width:
        raise Unexaminable("the batch is too short to see how the loss is scaled")
    w2, n2 = float(r2.weight[on2].mean()), int(on2.sum())
    if _near(w2, w, tol) or (_near(w2 * n2, w * n, tol) and w * n > 1):
        return []
    slots = frame.ids.numel()
    why = "the loss is divided more than once, or by more than the counted targets"
    if any(_near(w * k, 1, tol) for k in (slots, slots - len(frame.ids))):
        why = "the loss is divided by all slots of the batch, PAD included"
    seen = (
        f"{why}: every one of the {n} counted tokens weighs {w:.3g}, together {w * n:.3g} instead "
        f"of 1; with {n2} tokens of the same rows, {w2:.3g} each"
    )
    return [Finding("norm", "reduction", seen, REMEDY, w * n)]


def _by_call(ctx: Context, r: Readout, tol: float) -> list[Finding]:
    """A mean over rows, from several calls of the model: is it a mean over *calls* of one row each?

    Doubling the rows tells: a mean over rows stays one, while calls now hold rows of two lengths.
    """
    if len(r.calls) < 2:
        return []
    rows = list(range(len(ctx.full.ids)))
    double = ctx.full.rows(rows + rows)
    r2 = ctx.subject.readout(double, True)
    on = trained(r2)
    index = torch.arange(len(on), device=on.device)[:, None].expand_as(on)
    if _mean_of_means(r2.weight, on, index, tol):
        return []
    seen = f"the loss is a mean over {len(r.calls)} calls of the model of each call's own mean"
    return [Finding("norm", "reduction", seen, REMEDY, float(len(r.calls)))]


def emptied(ctx: Context) -> list[Finding]:
    """A row without a single target must not make the loss NaN (0/0)."""
    if "finite" in ctx.blamed:
        raise Unexaminable("the loss is not finite on the plain batch")
    if len(ctx.work.ids) < 2:
        raise Unexaminable("needs a batch of two rows")
    frame = _without_targets(ctx.work)
    for train in (True, False):
        loss = float(ctx.subject.run(frame, train).detach())
        if loss != loss or abs(loss) == float("inf"):
            seen = f"the loss is {loss} once row {ctx.rows[0]} holds no target"
            remedy = "clamp each count that divides to at least 1, or skip rows without targets"
            return [Finding("norm", "emptied", seen, remedy, row=ctx.rows[0])]
    return []


def _without_targets(frame: Frame) -> Frame:
    """The first row keeps its tokens but no label; without labels it keeps a single real token."""
    if frame.labels is not None:
        labels = frame.labels.clone()
        labels[0] = -100
        return frame.each(lambda k, v: labels if k == "labels" else v)
    if frame.pad_id is None or not frame.has_pad:
        raise Unexaminable("neither labels nor PAD to leave a row without targets")
    keep = frame.real[0].nonzero()[:, 0]
    stay = int(keep[-1] if bool(frame.left.any()) else keep[0])
    pads = ~frame.real
    gone = torch.zeros_like(pads)
    gone[0] = frame.real[0]
    gone[0, stay] = False

    def blank(name: str, v: Tensor) -> Tensor:
        if name == "position_ids" or v.shape[:2] != gone.shape:
            return v
        if name == "input_ids":
            return v.masked_fill(gone, frame.pad_id or 0)
        return torch.where(gone, v[pads].flatten()[0], v)

    return frame.each(blank)
