"""Probes of the reduction: are the weights of the tokens those of a mean or a sum?

Accepted are the token mean (all 1/N), the sum (all one constant, whatever the batch) and the mean
over rows, or documents, of means. Weights that depend on the number of slots are a fault.
"""

import torch
from torch import Tensor

from causal_preflight.audit_batch import IGNORE, UnexaminableError, require
from causal_preflight.context import Context, Move
from causal_preflight.instrumented_model import Readout
from causal_preflight.report import Finding


def reduction(ctx: Context) -> list[Finding]:
    """Do the weights fit a token mean, a sequence mean or a sum? In doubt, a second batch tells."""
    require("pad target" not in ctx.explained, "PAD is trained, and changes every weight")
    r, batch = ctx.readout(True), ctx.full
    on = r.trained
    require(bool(on.any()) and r.loss == r.loss, "no finite, counted position")
    tol = max(2e-3, 3 * r.residual)
    w = r.weight[on]
    if _near(w, w.mean(), tol):
        return [] if _near(w.sum(), 1, tol) or _near(w.mean(), 1, tol) else _constant(ctx, r, tol)
    if _mean_of_means(r, batch.doc, tol):
        # With several calls: over rows, or over calls of one row? With the rows doubled, a mean
        # over rows stays one, while calls hold rows of two lengths.
        doubled = batch.rows([*range(len(batch.ids))] * 2)
        if r.pieces < 2 or _mean_of_means(ctx.model.readout(doubled, True), doubled.doc, tol):
            return []
        seen = f"the loss is a mean over {r.pieces} calls of the model of each call's own mean"
        return [ctx.finding("reduction", seen, "divide", Move(r.pieces))]
    seen = (
        f"the weights of the tokens differ from {float(w.min()):.3g} to {float(w.max()):.3g} (sum "
        f"{float(w.sum()):.3g}) and are no mean over rows either; heaviest at row {{row}}, "
        "position {t}"
    )
    size = float(w.max() / w.min().clamp_min(1e-300))
    return [ctx.finding_at("reduction", seen, "divide", on & (r.weight == w.max()), size)]


def _near(value: Tensor, wanted: Tensor | float, tol: float) -> bool:
    wanted = torch.as_tensor(wanted)
    return bool(((value - wanted).abs() <= tol * wanted.abs()).all())


def _mean_of_means(r: Readout, doc: Tensor, tol: float) -> bool:
    """Equal within each row (or document), with equal sums that make 1, 1 each, or 1/B each."""
    row = torch.arange(len(doc), device=doc.device)[:, None].expand_as(doc)
    for group in (row, row * (int(doc.max()) + 2) + doc):
        parts = [r.weight[r.trained & (group == g)] for g in group[r.trained].unique()]
        sums = torch.stack([w.sum() for w in parts])
        even = all(_near(w, w.mean(), tol) for w in parts) and _near(sums, sums.mean(), tol)
        if even and any(_near(sums.mean(), 1 / n, tol) for n in (1, len(sums), len(doc))):
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
    if _near(cut_w.mean(), w.mean(), tol) or (same_share and not slots):
        return []  # a sum with a factor
    others = "something other than the counted targets, or twice"
    by, total = "all slots of the batch, PAD included" if slots else others, float(w.sum())
    seen = (
        f"the loss is divided by {by}: each of the {len(w)} counted tokens weighs "
        f"{float(w.mean()):.3g}, together {total:.3g} instead of 1; with {len(cut_w)} tokens of "
        f"the same rows, {float(cut_w.mean()):.3g} each"
    )
    return [ctx.finding("reduction", seen, "divide", Move(total))]


def emptied(ctx: Context) -> list[Finding]:
    """Does a row without any target make the loss NaN? Asked where labels leave out tokens."""
    require("finite" not in ctx.explained, "the loss is not finite on the plain batch")
    batch, labels = ctx.work, ctx.work.labels
    left_out = batch.has_target & (batch.label_of_next == IGNORE)
    if labels is None or not bool(left_out.any()):
        raise UnexaminableError("every real token has a target: no row can come to hold none")
    empty = batch.put("labels", torch.cat([torch.full_like(labels[:1], IGNORE), labels[1:]]))
    for train in (True, False):
        loss = float(ctx.model.run(empty, train).detach())
        if not abs(loss) < float("inf"):
            seen = f"the loss is {loss} once row {{row}} holds no target"
            return [ctx.finding("reduction", seen, "clamp", Move(loss, int(batch.slot[0, 0])))]
    return []
