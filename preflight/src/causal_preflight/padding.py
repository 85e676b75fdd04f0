"""Probes of PAD: nothing at a PAD slot may move the loss or the logits of a real token."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from causal_preflight.audit_batch import AuditBatch, need
from causal_preflight.context import Context, Move
from causal_preflight.locate import integers, locate
from causal_preflight.report import Finding


def finite(ctx: Context) -> list[Finding]:
    """Loss, logits of real tokens and gradients must be numbers.

    If they are with a row freed of its PAD, the padding is at fault (a query with no key left). If
    only the loss is not, its reduction is (0/0). Else a causal mask leaves a query nothing.
    """
    subject, frame = ctx.subject, ctx.work
    sound = all(bool(torch.isfinite(p).all()) for p in subject.box.params)
    need(sound, "the parameters themselves are not finite")
    nan = torch.isnan(ctx.base.logits).any(-1) & ctx.base.seen
    broken = nan & frame.real
    losses = float(subject.run(ctx.full, True).detach()), ctx.base.loss
    bad_loss = not all(abs(loss) < float("inf") for loss in losses)
    if not bad_loss and not bool(broken.any()):
        grads = subject.grads(subject.run(frame, True), subject.box.params)
        if all(g is None or bool(torch.isfinite(g).all()) for g in grads):
            return []
    ctx.blamed.add("finite")
    if bad_loss and not bool(nan.any()):
        need(ctx.full.next_ok.any(), "no position of the batch has a next token")
        text = "the loss is NaN though every logit is finite: a mean over no targets"
        return [ctx.finding("norm", text, "clamp", Move(float("nan")))]
    move = Move(float("nan"), int(frame.at.flatten()[broken.long().argmax()]))
    what = "the loss" if bad_loss else "the logits of a real token" if broken.any() else "gradients"
    if frame.has_pad:
        look = subject.look(frame.bare(int(frame.real.sum(1).argmax())))
        if look.loss == look.loss and not bool(torch.isnan(look.logits[look.seen]).any()):
            seen = f"{what}: NaN on the padded batch, finite once the rows are freed of their PAD"
            return [ctx.finding("pad", seen, "no key", move)]
    seen = f"{what}: NaN without any PAD; a query has no key left, as if the mask were inverted"
    return [ctx.finding("causal", seen, "ahead", move)]


class _Nudge(TorchFunctionMode):
    """Adds noise to the embeddings of chosen slots, in whatever way they are looked up.

    Works on the looked-up vectors and not on the table: a row of the table may be EOS as well, or
    be tied to the output.
    """

    def __init__(self, frame: AuditBatch, where: Tensor, seed: int) -> None:
        super().__init__()
        self.frame, self.where, self.seed, self.hits = frame, where, seed, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in ("embedding", "__getitem__") or not isinstance(out, Tensor):
            return out
        for t in integers((args[1:] if name == "__getitem__" else args, kwargs)):
            slots = locate(t, self.frame, set())
            if slots is not None and out.is_floating_point() and out.shape[:-1] == t.shape:
                hit = (self.where.flatten()[slots] & (slots >= 0)).reshape(t.shape)
                self.hits += int(hit.sum())
                gen = torch.Generator().manual_seed(self.seed)
                noise = torch.randn(out.shape, generator=gen).to(out) * hit[..., None]
                return out + noise * out.detach().float().std().clamp_min(0.1).to(out)
        return out


def embedding(ctx: Context) -> list[Finding]:
    """Nudge the embedding of PAD: the logits of real tokens must not move."""
    work = ctx.work
    need(work.has_pad, "no PAD in the batch")
    sides = [work.left]
    if not ctx.blamed & {"future", "company"}:  # else a look ahead explains it
        sides.append(~work.real & ~work.left)
    for train in (False, True):
        with ctx.weights(train):
            base = ctx.subject.look(work, train).logits
            for where in (s for s in sides if bool(s.any())):
                with _Nudge(work, where, ctx.seed) as nudge:
                    new = ctx.subject.look(work, train).logits
                need(nudge.hits, "the lookup of the embeddings was not found")
                move = ctx.worst(work, new, base, ctx.counted(work))
                if move:
                    ctx.blamed.add("padding")
                    seen = "{where} with what stands at PAD slots"
                    return [ctx.finding("pad", seen, "pad keys", move)]
    return []


def extension(ctx: Context) -> list[Finding]:
    """Add PAD on the side where the batch has it: logits, weights and loss must not move.

    Weights that shrink tell of a denominator that counts PAD; a loss that moves while logits and
    weights stay, of an auxiliary term that does. The loss is taken with the logits replaced
    (`InstrumentedModel.readout`), so that rounding in the logits does not blur it.
    """
    need(ctx.work.has_pad, "no PAD in the batch")
    work, width = ctx.work, ctx.work.ids.shape[1]
    left, more = bool(work.left.any()) and bool(work.real[:, -1].all()), max(2, width // 4)
    need(width > more + 2, "needs rows of five tokens")
    # Cut by as much first: a table of positions may end where the batch does.
    base = work.cols(0, width - more)
    base = base.rows(base.real.any(1).nonzero()[:, 0])
    longer = base.pad(more, left, work)
    if not ctx.blamed & {"future", "company", "padding", "past", "finite"}:
        move = ctx.elsewhere(base, longer)
        if move:
            label = "pad" if move.size == float("inf") else "position"
            return [ctx.finding(label, "{where} when PAD is added", "length", move)]
    if ctx.blamed & {"pad target", "shift"}:
        return []
    for train in (True, False):
        r, s = (ctx.subject.readout(frame, train) for frame in (base, longer))
        factor = (s.weight[longer.at >= 0].view_as(r.weight) / r.weight)[r.trained]
        if not len(factor):
            continue
        if float((factor - 1).abs().max()) > max(2e-3, 3 * r.residual):
            size = float(factor.median())
            seen = "added columns of PAD change the weight of a real token by a factor of {size}"
            return [ctx.finding("norm", seen, "divide", Move(size))]
        drift = abs(s.loss - r.loss) / max(1e-9, abs(r.loss))
        telling = drift > max(2e-6, 0.1 * ctx.tolerance) and ctx.subject.replaceable  # NaN: not
        if telling and not (train and _noisy(ctx, base, r.loss)):
            seen = "the loss moves by {size} of itself with PAD added; logits and weights do not: "
            return [ctx.finding("pad", seen + "a term counts PAD", "pad targets", Move(drift))]
    return []


def _noisy(ctx: Context, frame: AuditBatch, loss: float) -> bool:
    """Does chance (dropout) reach the loss by another way than the logits?"""
    ctx.subject.seed += 1
    try:
        return abs(ctx.subject.readout(frame, True).loss - loss) > 1e-7 * abs(loss)
    finally:
        ctx.subject.seed -= 1
