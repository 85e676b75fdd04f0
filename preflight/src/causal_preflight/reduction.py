"""Probes of the reduction: with what weights the loss adds up its targets, and rows without any."""

from collections.abc import Iterator

import torch
from torch import Tensor

from causal_preflight.batch import IGNORE
from causal_preflight.context import Context, Move
from causal_preflight.gradient_fit import Readout, is_distribution
from causal_preflight.report import Finding, require
from causal_preflight.targets import SOFT


def reduction(ctx: Context) -> Iterator[Finding]:
    """The token weights must be those of a mean or a sum, or of a weighting by intent (a note)."""
    require("inexact weights" not in ctx.explained, "the loss is fused: weights are known nearly")
    found = list(_reduction(ctx))
    if found and (note := _weighting(ctx)):
        ctx.report.remarks.append(f"reduction: {note}")
    else:
        yield from found


def _weighting(ctx: Context) -> str | None:
    """A tensor of the batch that weighs the targets; or weights by target (focal, of classes)."""
    r, rows = ctx.readout(True), len(ctx.full.ids)
    w, y = r.weight[r.trained], r.target[r.trained]
    for name, v in ctx.full.raw.items():
        numbers = isinstance(v, Tensor) and v.is_floating_point() and v.ndim in (1, 2)
        if not numbers or len(v) != rows or bool(((v == 0) | (v == 1)).all()):  # a mask
            continue
        ones = ctx.model.readout(ctx.full.with_tensor(name, torch.ones_like(v)), True)
        if not _near(ones.weight[r.trained], w, 1e-3):
            return f"the batch weighs the targets by `{name}`; these weights are not judged"
    groups = [w[y == token] for token in y.unique() if int((y == token).sum()) > 1]
    by_target = len(groups) > 2 and all(_near(g, g.mean(), 1e-3) for g in groups)
    if by_target and not _near(w, w.mean(), 1e-2):
        return "the weights depend on the target alone (focal loss, class weights); not judged"
    return None


def _reduction(ctx: Context) -> Iterator[Finding]:
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
        yield ctx.finding("reduction", seen, "logits", Move(float("nan")))
        return
    require(r.residual <= SOFT, "no single target at a position")
    tol = max(2e-2 if r.scaled else 2e-3, 3 * r.residual)
    w = r.weight[on]
    if _near(w, w.mean(), tol):
        if not (_near(w.sum(), 1, tol) or _near(w.mean(), 1, tol)):
            yield from _constant(ctx, r, tol)
    elif not _mean_of_means(r, batch.doc, tol, factor=len(ctx.model.heads) > 1):
        low, high, total = (f"{float(x):.4g}" for x in (w.min(), w.max(), w.sum()))
        seen = f"the weights of the tokens differ from {low} to {high} (sum {total}) and are no "
        seen += "mean over rows either; heaviest at row {row}, position {t}"
        size = float(w.max() / w.min().clamp_min(1e-300))
        yield ctx.finding_at("reduction", seen, "divide", on & (r.weight == w.max()), size)
    elif r.pieces > 1:
        # Over rows, or over calls of one row? With the rows doubled, a mean over rows stays one,
        # while calls hold rows of two lengths.
        doubled = batch.rows([*range(len(batch.ids))] * 2)
        if not _mean_of_means(ctx.model.readout(doubled, True), doubled.doc, tol):
            seen = f"the loss is a mean over {r.pieces} calls of the model of each call's own mean"
            yield ctx.finding("reduction", seen, "divide", Move(r.pieces))


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


def _constant(ctx: Context, r: Readout, tol: float) -> Iterator[Finding]:
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
        return torch.stack([on.nonzero()[:, 0], doc[on]]).unique(dim=1).shape[1]

    fraction = w.mean() * documents(batch.doc, r.trained)  # constant with a fixed length
    same_fraction = _near(cut_w.mean() * documents(cut.doc, cut_r.trained), fraction, tol)
    slots = any(_near(w.mean() * k, 1, tol) for k in (batch.ids.numel(), batch.ids[:, 1:].numel()))
    several = r.scaled or len(ctx.model.heads) > 1  # then the factor of a mean is not known
    is_sum = _near(cut_w.mean(), w.mean(), tol) or (same_fraction and not slots)  # with a factor
    if is_sum or (several and _near(cut_w.sum(), w.sum(), tol)):
        return
    others = "something other than the counted targets, or twice"
    by, total = "all slots of the batch, PAD included" if slots else others, float(w.sum())
    seen = f"the loss is divided by {by}: {len(w)} counted tokens weigh {float(w.mean()):.4g} "
    seen += f"each, {total:.4g} instead of 1 together; with {len(cut_w)} tokens of the same rows, "
    seen += f"{float(cut_w.mean()):.4g} each"
    yield ctx.finding("reduction", seen, "divide", Move(total))


def emptied(ctx: Context) -> Iterator[Finding]:
    """A row without any target must not make the loss NaN; run if labels leave out tokens."""
    require("finite" not in ctx.explained, "the loss is not finite on the plain batch")
    batch, labels = ctx.work, ctx.work.labels
    left_out = labels is not None and (batch.has_target & (batch.label_of_next == IGNORE)).any()
    require(left_out, "every real token has a target: no row can be without a target")
    assert labels is not None
    empty = labels.clone()
    empty[0] = IGNORE
    for train in (True, False):
        loss = float(ctx.model.run(batch.with_tensor("labels", empty), train).detach())
        if not abs(loss) < float("inf"):
            seen = f"the loss is {loss} once row {{row}} holds no target"
            yield ctx.finding("reduction", seen, "clamp", Move(loss, int(batch.slot[0, 0])))
            return
