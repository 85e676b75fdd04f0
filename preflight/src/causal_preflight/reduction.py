"""Probes of the reduction: are the weights of the tokens those of a mean or a sum?

Accepted are the token mean (all weights 1/N), the plain sum (all one constant, whatever the batch)
and the sequence mean (a mean over rows, or documents, of means). A mean over rows times a fixed
length is a sum with another constant. Weights that depend on the number of slots, PAD included, are
a fault.
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
    if _mean_of_means(r.weight, on, batch.doc, tol):
        return _mean_of_calls(ctx, r.pieces, tol)
    seen = (
        f"the weights of the tokens differ from {float(w.min()):.3g} to {float(w.max()):.3g} (sum "
        f"{float(w.sum()):.3g}) and are no mean over rows either; heaviest at row {{row}}, "
        "position {t}"
    )
    size = float(w.max() / w.min().clamp_min(1e-300))
    heaviest = on & (r.weight == w.max())
    return [ctx.finding_at("reduction", seen, "divide", heaviest, size)]


def _near(value: Tensor, wanted: Tensor | float, tol: float) -> bool:
    wanted = torch.as_tensor(wanted)
    return bool(((value - wanted).abs() <= tol * wanted.abs()).all())


def _mean_of_means(weight: Tensor, on: Tensor, doc: Tensor, tol: float) -> bool:
    """Is it a mean over rows, or over documents, of means?"""
    row = torch.arange(len(on), device=on.device)[:, None].expand_as(on)
    document = row * (int(doc.max()) + 2) + doc
    return any(_mean_over(weight, on, group, tol) for group in (row, document))


def _mean_over(weight: Tensor, on: Tensor, group: Tensor, tol: float) -> bool:
    """Equal within each group, with equal sums that make 1, 1 each, or 1/B each."""
    parts = [weight[on & (group == g)] for g in group[on].unique()]
    sums = torch.stack([w.sum() for w in parts])
    even = all(_near(w, w.mean(), tol) for w in parts) and _near(sums, sums.mean(), tol)
    return even and any(_near(sums.mean(), 1 / n, tol) for n in (1, len(sums), len(weight)))


def _constant(ctx: Context, r: Readout, tol: float) -> list[Finding]:
    """All weights are one w, neither 1/N nor 1: cut the batch, and see how w follows.

    A w that stays is a sum with a factor (rows times a fixed length, an accumulation count).
    """
    batch, width = ctx.full, ctx.full.ids.shape[1]
    half = width // 2 + 1
    left = bool(batch.left_pad.any())
    cut = batch.cols(width - half, width) if left else batch.cols(0, half)
    r2 = ctx.model.readout(cut, True)
    w, w2 = r.weight[r.trained], r2.weight[r2.trained]
    require(len(w2) and half < width, "the batch is too short to see how the loss is scaled")
    if _near(w2.mean(), w.mean(), tol):
        return []
    counts = (batch.ids.numel(), batch.ids[:, 1:].numel())
    slots = any(_near(w.mean() * k, 1, tol) for k in counts)
    documents, documents2 = _documents(batch.doc, r.trained), _documents(cut.doc, r2.trained)
    if not slots and _near(w2.mean() * documents2, w.mean() * documents, tol):
        return []  # over documents times a fixed length
    by = "something other than the counted targets, or twice"
    if slots:
        by = "all slots of the batch, PAD included"
    total = float(w.sum())
    seen = (
        f"the loss is divided by {by}: each of the {len(w)} counted tokens weighs "
        f"{float(w.mean()):.3g}, together {total:.3g} instead of 1; with {len(w2)} tokens of the "
        f"same rows, {float(w2.mean()):.3g} each"
    )
    return [ctx.finding("reduction", seen, "divide", Move(total))]


def _documents(doc: Tensor, on: Tensor) -> int:
    """How many documents of all rows hold a counted token."""
    return len({(int(b), int(doc[b, t])) for b, t in on.nonzero()})


def _mean_of_calls(ctx: Context, calls: int, tol: float) -> list[Finding]:
    """A mean over rows out of several calls: is it a mean over *calls*, of one row each here?

    Double the rows: a mean over rows stays one, while calls now hold rows of two lengths.
    """
    if calls < 2:
        return []
    rows = list(range(len(ctx.full.ids)))
    doubled = ctx.full.rows(rows + rows)
    r = ctx.model.readout(doubled, True)
    if _mean_of_means(r.weight, r.trained, doubled.doc, tol):
        return []
    seen = f"the loss is a mean over {calls} calls of the model of each call's own mean"
    return [ctx.finding("reduction", seen, "divide", Move(calls))]


def emptied(ctx: Context) -> list[Finding]:
    """Does a row without any target make the loss NaN (0/0)?

    Asked only where the labels leave out real tokens, as prompts: there a cut row can hold none.
    """
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
            move = Move(loss, int(batch.slot[0, 0]))
            return [ctx.finding("reduction", seen, "clamp", move)]
    return []
