"""Probes of PAD: nothing at a PAD slot may move the loss or the logits of a real token."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from causal_lm.preflight.context import Context, trained
from causal_lm.preflight.frame import Frame, UnexaminableError
from causal_lm.preflight.locate import integers, locate
from causal_lm.preflight.norm import REMEDY as NORM_REMEDY
from causal_lm.preflight.readout import PAD_REMEDY
from causal_lm.preflight.report import Finding
from causal_lm.preflight.subject import Look

KEY_REMEDY = (
    "hide PAD keys from real queries: pass the padding mask, in the convention of the layer"
)


def finite(ctx: Context) -> list[Finding]:
    """Loss, logits of real tokens and gradients must be numbers.

    If they are with a row freed of its PAD, the padding is at fault (a query with no key left). If
    only the loss is not, its reduction is (0/0). Else a causal mask leaves a query nothing.
    """
    subject, frame = ctx.subject, ctx.work
    if not all(bool(torch.isfinite(p).all()) for p in subject.box.params if p.is_floating_point()):
        raise UnexaminableError("the parameters themselves are not finite")
    whole = subject.run(ctx.full, True).detach()
    nan = _broken(ctx.base)
    broken = nan & frame.real
    bad_loss = not bool(torch.isfinite(whole)) or not abs(ctx.base.loss) < float("inf")
    if not bad_loss and not bool(broken.any()):
        grads = [g for g in subject.gradients(frame) if g is not None]
        if all(bool(torch.isfinite(g).all()) for g in grads):
            return []
    ctx.blamed.add("finite")
    if bad_loss and not bool(nan.any()):
        if not bool(ctx.full.next_ok.any()):
            raise UnexaminableError("no position of the batch has a next token")
        text = "the loss is NaN though every logit is finite: a mean over no targets"
        return [Finding("norm", "finite", text, "clamp each count that divides to at least 1")]
    hit = (float("nan"), *divmod(int(broken.long().argmax()), frame.ids.shape[1]))
    what = "the loss" if bad_loss else "the logits of a real token" if broken.any() else "gradients"
    if frame.has_pad and _finite_alone(ctx):
        seen = f"{what}: NaN on the padded batch, finite once the rows are freed of their PAD"
        remedy = "leave every query at least one key, if only itself, also at PAD"
        return [ctx.finding("pad", "finite", seen, remedy, hit)]
    seen = f"{what}: NaN without any PAD; a query has no key left to attend to"
    remedy = "let position t see itself and all before it: the mask seems inverted"
    return [ctx.finding("causal", "finite", seen, remedy, hit)]


def _broken(look: Look) -> Tensor:
    return look.seen & torch.isnan(look.logits).any(-1)


def _finite_alone(ctx: Context) -> bool:
    """Is the first row with two real tokens finite without its PAD?"""
    for b in range(len(ctx.work.ids)):
        if int(ctx.work.real[b].sum()) > 1:
            look = ctx.subject.look(ctx.work.bare(b))
            return look.loss == look.loss and not bool(_broken(look).any())
    return False


class _Nudge(TorchFunctionMode):
    """Adds noise to the embeddings of chosen slots, in whatever way they are looked up.

    Works on the looked-up vectors and not on the table: a row of the table may be EOS as well, or
    be tied to the output.
    """

    def __init__(self, frame: Frame, where: Tensor, seed: int) -> None:
        super().__init__()
        self.frame, self.where, self.seed, self.hits = frame, where, seed, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in ("embedding", "__getitem__") or not isinstance(out, Tensor):
            return out
        for t in integers((args[1:] if name == "__getitem__" else args, kwargs)):
            slots = locate(t, self.frame.ids, self.frame.real, set())
            if slots is None or not out.is_floating_point() or out.shape[:-1] != t.shape:
                continue
            r, c = slots.rows.reshape(t.shape), slots.cols.reshape(t.shape)
            hit = self.where[r.clamp_min(0), c.clamp_min(0)] & (r >= 0)
            self.hits += int(hit.sum())
            gen = torch.Generator().manual_seed(self.seed)
            noise = torch.randn(out.shape, generator=gen).to(out) * hit[..., None]
            return out + noise * out.detach().float().std().clamp_min(0.1).to(out)
        return out


def _nudged(ctx: Context, where: Tensor, train: bool) -> Tensor:
    """The logits of `work` with other content at PAD; the mask still says PAD."""
    with _Nudge(ctx.work, where, ctx.seed) as nudge:
        look = ctx.subject.look(ctx.work, train)
    if nudge.hits:
        return look.logits
    if not {"attention_mask", "document_ids"} & set(ctx.work.batch):
        raise UnexaminableError("the lookup of the embeddings was not found")
    pool = ctx.work.ordinary
    ids = torch.where(where, pool[len(pool) // 2], ctx.work.ids)
    return ctx.subject.look(ctx.work.put("input_ids", ids), train).logits


def embedding(ctx: Context) -> list[Finding]:
    """Nudge the embedding of PAD: the logits of real tokens must not move."""
    work = ctx.work
    if not work.has_pad:
        raise UnexaminableError("no PAD in the batch")
    sides = [work.left]
    if not ctx.blamed & {"future", "company"}:  # else a look ahead explains it
        sides.append(~work.real & ~work.left)
    for train in (False, True):
        with ctx.weights(train):
            base = ctx.subject.look(work, train).logits
            for where in (s for s in sides if bool(s.any())):
                hit = ctx.worst(_nudged(ctx, where, train), base, ctx.counted)
                if hit:
                    ctx.blamed.add("padding")
                    seen = "row {row}: the logits at position {t} move by {size} with what stands "
                    seen += "at PAD slots"
                    return [ctx.finding("pad", "embedding", seen, KEY_REMEDY, hit)]
    return []


def extension(ctx: Context) -> list[Finding]:
    """Add PAD on the side where the batch has it: logits, weights and loss must not move.

    Weights that shrink tell of a denominator that counts PAD; a loss that moves while logits and
    weights stay, of an auxiliary term that does. The loss is taken with the logits replaced
    (`Subject.readout`), so that rounding in the logits does not blur it.
    """
    if not ctx.work.has_pad:
        raise UnexaminableError("no PAD in the batch")
    left = bool(ctx.work.left.any()) and bool(ctx.work.real[:, -1].all())
    base, longer, more = _longer(ctx.work, ctx, left)
    width = base.ids.shape[1]
    same = slice(more, None) if left else slice(0, width)
    if not ctx.blamed & {"future", "company", "padding", "past", "finite"}:
        a, b = ctx.subject.look(base), ctx.subject.look(longer)
        counted = ctx.counted[:, -width:] if left else ctx.counted[:, :width]
        hit = ctx.worst(b.logits[:, same], a.logits, counted & a.seen, reshaped=True)
        if hit:
            seen = "row {row}: the logits at position {t} move by {size} when PAD is added"
            remedy = (
                "count positions from the first real token; nothing may depend on the padded length"
            )
            label = "pad" if hit[0] == float("inf") else "position"
            return [ctx.finding(label, "extension", seen, remedy, hit)]
    if ctx.blamed & {"pad target", "shift"}:
        return []
    for train in (True, False):
        found = _loss_moves(ctx, base, longer, same, train)
        if found:
            return found
    return []


def _longer(work: Frame, ctx: Context, left: bool) -> tuple[Frame, Frame, int]:
    """A batch, itself with PAD added, and how much; cut first where positions are limited."""
    width = work.ids.shape[1]
    more = max(2, width // 4)
    longer = work.pad(more, left)
    try:
        ctx.subject.run(longer)
        return work, longer, more
    except Exception:  # most often a table of positions that ends
        if width <= more + 2:
            raise
        base = work.cols(more, width) if left else work.cols(0, width - more)
        return base, base.pad(more, left), more


def _loss_moves(
    ctx: Context, base: Frame, longer: Frame, same: slice, train: bool
) -> list[Finding]:
    subject = ctx.subject
    r, s = subject.readout(base, train), subject.readout(longer, train)
    on = trained(r)
    if not bool(on.any()):
        return []
    factor = s.weight[:, same][on] / r.weight[on]
    if float((factor - 1).abs().max()) > max(2e-3, 3 * r.residual):
        size = float(factor.median())
        seen = f"added columns of PAD change the weight of a real token by a factor of {size:.3g}"
        return [Finding("norm", "extension", seen, NORM_REMEDY, size)]
    drift = abs(s.loss - r.loss) / max(1e-9, abs(r.loss))
    if not drift > max(2e-6, 0.1 * ctx.tolerance) or not subject.replaceable:  # NaN: no drift
        return []
    if train and _noisy(ctx, base, r.loss):
        return []
    seen = f"the loss moves by {drift:.2g} of itself with PAD added; logits and weights do not"
    return [Finding("pad", "extension", seen + ": an auxiliary term counts PAD", PAD_REMEDY, drift)]


def _noisy(ctx: Context, frame: Frame, loss: float) -> bool:
    """Does chance (dropout) reach the loss by another way than the logits?"""
    ctx.subject.seed += 1
    try:
        return abs(ctx.subject.readout(frame, True).loss - loss) > 1e-7 * abs(loss)
    finally:
        ctx.subject.seed -= 1
