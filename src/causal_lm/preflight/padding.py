"""Probes of PAD: nothing at a PAD slot may move the loss or the logits of a real token."""

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from causal_lm.preflight.context import Context, moved, trained
from causal_lm.preflight.frame import Frame, Unexaminable
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

    If they are with every row freed of its PAD, the padding is at fault (a query with no key left).
    If only the loss is not, its reduction is (0/0). Else a causal mask leaves a query nothing.
    """
    subject, frame = ctx.subject, ctx.work
    if not all(bool(torch.isfinite(v).all()) for v in subject.box.values if v.is_floating_point()):
        raise Unexaminable("the parameters themselves are not finite")
    whole = float(subject.run(ctx.full, True).detach())
    look = subject.look(frame)
    nan = look.seen & torch.isnan(look.logits).any(-1)
    broken = nan & frame.real
    bad_loss = any(x != x or abs(x) == float("inf") for x in (look.loss, whole))
    if not bad_loss and not bool(broken.any()) and _finite_gradients(ctx):
        return []
    ctx.blamed.add("finite")
    b, t = broken.nonzero()[0].tolist() if bool(broken.any()) else (None, None)
    row = None if b is None else ctx.rows[b]
    clean = not bool(nan.any())
    what = "the loss" if bad_loss else "the logits of a real token" if broken.any() else "gradients"
    if bad_loss and clean:
        if not bool(ctx.full.next_ok.any()):
            raise Unexaminable("no position of the batch has a next token")
        text = "the loss is NaN though every logit is finite: a mean over no targets"
        return [Finding("norm", "finite", text, "clamp each count that divides to at least 1")]
    if frame.has_pad and _finite_alone(ctx):
        text = f"{what}: NaN on the padded batch, finite once the rows are freed of their PAD"
        remedy = "leave every query at least one key, if only itself, also at PAD"
        return [Finding("pad", "finite", text, remedy, row=row, position=t)]
    text = f"{what}: NaN without any PAD; a query has no key left to attend to"
    remedy = "let position t see itself and all before it: the mask seems inverted"
    return [Finding("causal", "finite", text, remedy, row=row, position=t)]


def _finite_gradients(ctx: Context) -> bool:
    return all(g is None or bool(torch.isfinite(g).all()) for g in ctx.subject.gradients(ctx.work))


def _finite_alone(ctx: Context) -> bool:
    """Is the first row with two real tokens finite without its PAD?"""
    for b in range(len(ctx.work.ids)):
        at = ctx.work.real[b].nonzero()[:, 0]
        if len(at) > 1:
            alone = ctx.work.rows([b]).cols(int(at[0]), int(at[-1]) + 1)
            look = ctx.subject.look(alone)
            return look.loss == look.loss and not bool(
                (look.seen & torch.isnan(look.logits).any(-1)).any()
            )
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
        if name in ("embedding", "__getitem__") and isinstance(out, Tensor):
            for t in integers((args[1:] if name == "__getitem__" else args, kwargs)):
                slots = locate(t, self.frame.ids, self.frame.real, set())
                if slots is None or not out.is_floating_point() or out.shape[:-1] != t.shape:
                    continue
                r, c = slots.rows.reshape(t.shape), slots.cols.reshape(t.shape)
                hit = self.where[r.clamp_min(0), c.clamp_min(0)] & (r >= 0)
                gen = torch.Generator().manual_seed(self.seed)
                noise = torch.randn(out.shape, generator=gen).to(out)
                self.hits += int(hit.sum())
                return out + noise * hit[..., None] * out.detach().float().std().clamp_min(0.1).to(
                    out
                )
        return out


def _nudged(ctx: Context, where: Tensor, train: bool) -> Look:
    """The logits of `work` with other content at PAD; the mask still says PAD."""
    with _Nudge(ctx.work, where, ctx.seed) as nudge:
        look = ctx.subject.look(ctx.work, train)
    if nudge.hits:
        return look
    if not {"attention_mask", "document_ids"} & set(ctx.work.batch):
        raise Unexaminable("the lookup of the embeddings was not found")
    pool = ctx.work.ordinary
    ids = torch.where(where, pool[len(pool) // 2], ctx.work.ids)
    return ctx.subject.look(ctx.work.each(lambda k, v: ids if k == "input_ids" else v), train)


def embedding(ctx: Context) -> list[Finding]:
    """Nudge the embedding of PAD: the logits of real tokens must not move."""
    work = ctx.work
    if not work.has_pad:
        raise Unexaminable("no PAD in the batch")
    sides = [work.left]
    if not ctx.blamed & {"future", "company"}:  # else a look ahead explains it
        sides.append(~work.real & ~work.left)
    for train, woken in ((False, False), (True, True)):
        with ctx.subject.box.woken(ctx.seed) if woken else torch.enable_grad():
            base = ctx.subject.look(work, train).logits
            for where in sides:
                if not bool(where.any()):
                    continue
                change = moved(_nudged(ctx, where, train).logits, base)
                change = torch.where(ctx.counted, change, 0.0)
                if float(change.max()) > ctx.bound(base, ctx.counted):
                    ctx.blamed.add("padding")
                    return [_attended(ctx, change)]
    return []


def _attended(ctx: Context, change: Tensor) -> Finding:
    b, t = divmod(int(change.argmax()), change.shape[1])
    size, row = float(change.max()), ctx.rows[b]
    seen = f"row {row}: the logits at position {t} move by {size:.3g} with what stands at PAD slots"
    return Finding("pad", "embedding", seen, KEY_REMEDY, size, row, t, int(ctx.work.ids[b, t]))


def extension(ctx: Context) -> list[Finding]:
    """Append PAD: logits, weights and loss must not move.

    Weights that shrink tell of a denominator that counts PAD; a loss that moves while logits and
    weights stay, of an auxiliary term that does. The loss is taken with the logits replaced
    (`Subject.readout`), so that rounding in the logits does not blur it.
    """
    if not ctx.work.has_pad:
        raise Unexaminable("no PAD in the batch")
    base, longer = _longer(ctx)
    width = base.ids.shape[1]
    counted = ctx.counted[:, :width]
    if not ctx.blamed & {"future", "company", "padding", "finite"}:
        a = ctx.subject.look(base).logits
        b = ctx.subject.look(longer).logits[:, :width]
        change = torch.where(counted & ~torch.isnan(a).all(-1), moved(b, a), 0.0)
        if float(change.max()) > ctx.bound(a, counted, reshaped=True):
            return [_stretched(ctx, change)]
    if ctx.blamed & {"pad target", "shift"}:
        return []
    for train in (True, False):
        found = _loss_moves(ctx, base, longer, train)
        if found:
            return found
    return []


def _longer(ctx: Context) -> tuple[Frame, Frame]:
    """The working batch and itself with PAD appended; cut first where positions are limited."""
    work, more = ctx.work, max(2, ctx.work.ids.shape[1] // 4)
    longer = work.pad(more)
    try:
        ctx.subject.run(longer)
        return work, longer
    except Exception:  # most often a table of positions that ends
        if work.ids.shape[1] <= more + 2:
            raise
        base = work.cols(0, work.ids.shape[1] - more)
        return base, base.pad(more)


def _stretched(ctx: Context, change: Tensor) -> Finding:
    b, t = divmod(int(change.argmax()), change.shape[1])
    size, row = float(change.max()), ctx.rows[b]
    seen = f"row {row}: the logits at position {t} move by {size:.3g} when PAD is appended"
    remedy = "count positions from the first real token; nothing may depend on the padded length"
    label = "pad" if size == float("inf") else "position"
    return Finding(label, "extension", seen, remedy, size, row, t, int(ctx.work.ids[b, t]))


def _loss_moves(ctx: Context, base: Frame, longer: Frame, train: bool) -> list[Finding]:
    subject = ctx.subject
    r, s = subject.readout(base, train), subject.readout(longer, train)
    on = trained(r)
    if not bool(on.any()):
        return []
    w, w2 = r.weight[on], s.weight[:, : on.shape[1]][on]
    tol = max(2e-3, 3 * r.residual)
    if float((w2 / w - 1).abs().max()) > tol:
        seen = (
            f"{longer.ids.shape[1] - on.shape[1]} columns of PAD change the weight of a real "
            f"token by a factor of {float((w2 / w).median()):.3g}"
        )
        return [Finding("norm", "extension", seen, NORM_REMEDY, float((w2 / w).median()))]
    drift = abs(s.loss - r.loss) / max(1e-9, abs(r.loss))
    if not drift > max(2e-6, 0.1 * ctx.tolerance) or not subject.replaceable:  # NaN: no drift
        return []
    if train and _noisy(ctx, base, r.loss):
        return []
    seen = f"the loss moves by {drift:.2g} of itself with PAD appended; logits and weights do not"
    return [Finding("pad", "extension", seen + ": an auxiliary term counts PAD", PAD_REMEDY, drift)]


def _noisy(ctx: Context, frame: Frame, loss: float) -> bool:
    """Does chance (dropout) reach the loss by another way than the logits?"""
    ctx.subject.seed += 1
    try:
        return abs(ctx.subject.readout(frame, True).loss - loss) > 1e-7 * abs(loss)
    finally:
        ctx.subject.seed -= 1
