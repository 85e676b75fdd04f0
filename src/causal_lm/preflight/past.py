"""Probe of the past: a mask that hides everything leaks nothing, and teaches nothing."""

import torch
from torch import Tensor

from causal_lm.preflight.context import Context, moved
from causal_lm.preflight.flow import MASK_REMEDY
from causal_lm.preflight.frame import Frame, Unexaminable
from causal_lm.preflight.readout import SHIFT_REMEDY, offset_of
from causal_lm.preflight.report import Finding


def past(ctx: Context) -> list[Finding]:
    """Swap one token: the logits at its own and at the next position must move.

    Runs on woken weights, or a zero-initialised block would look blind. A model in which nothing
    but the token itself moves a logit may be meant so (a bigram); it is called blind only if a part
    of its weights can have no effect, as queries and keys do when a mask leaves one key to see.
    """
    if "finite" in ctx.blamed:
        raise Unexaminable("the logits are not finite")
    if "future" in ctx.blamed:
        raise Unexaminable("a mask that shows the future is at fault already")
    vocabulary = ctx.base().logits.shape[-1]
    with ctx.subject.box.woken(ctx.seed):
        own, last, older, at = _sight(ctx, ctx.work)
        if last >= 0.5 and own >= 0.5:
            return []
        if last < 0.5:
            hidden = _hidden_by_padding(ctx)
            if hidden:
                ctx.blamed.add("padding")
                return [Finding("pad", "past", hidden, _KEYS, 1 - last, *at)]
        memoryless = last < 0.5 and older == 0 and own >= 0.5 and not _first_is_seen(ctx)
        if memoryless and not _dead_weights(ctx, vocabulary):
            raise Unexaminable("each logit depends on its own token only, and all weights act")
    if last >= 0.5:  # blind to its own token: the inputs are shifted inside the model
        if offset_of(ctx.full, ctx.readout(True)) == 0:
            ctx.blamed.add("lag")
            return []
        seen = (
            "logits do not see the token at their own position: inputs and targets are both shifted"
        )
        return [
            Finding("shift", "past", seen, SHIFT_REMEDY, own, *at),
            Finding("causal", "past", seen, MASK_REMEDY, own, *at),
        ]
    seen = f"in {1 - last:.0%} of the trials a logit does not see the token just before it" + (
        ", though it sees older ones" if older else ""
    )
    return [Finding("causal", "past", seen, MASK_REMEDY, 1 - last, *at)]


_KEYS = "check the meaning of the padding mask: attention_mask is 1 at real tokens"


def _sight(ctx: Context, frame: Frame) -> tuple[float, float, float, tuple[int, int, int]]:
    """Shares of trials in which a swap moved its own logit, the next one, any later one."""
    base = ctx.subject.look(frame, False).logits
    ok = frame.swappable & frame.next_ok & torch.isfinite(base).any(-1)
    ok[:, :-1] &= torch.isfinite(base).any(-1)[:, 1:]
    own: list[bool] = []
    last: list[bool] = []
    older: list[bool] = []
    at = (0, 0, 0)
    bound = ctx.bound(base, frame.real) * 0.05
    for i in range(3):
        one = torch.zeros_like(ok)
        for b, row in enumerate(ok):
            places = row.nonzero()[:, 0]
            if len(places):
                one[b, places[(len(places) * (2 * i + 1)) // 6]] = True
        change = moved(ctx.subject.look(frame.swap(one, ctx.seed + i), False).logits, base)
        for b, t in one.nonzero().tolist():
            own.append(float(change[b, t]) > bound)
            last.append(float(change[b, t + 1]) > bound)
            same = (frame.doc[b] == frame.doc[b, t]).clone()
            same[: t + 2] = False
            older.append(bool((change[b][same] > bound).any()))
            if not last[-1]:
                at = (ctx.rows[b], t + 1, int(frame.ids[b, t]))
    if not own:
        raise Unexaminable("no position with a swappable token before it")
    return sum(own) / len(own), sum(last) / len(last), sum(older) / len(older), at


def _hidden_by_padding(ctx: Context) -> str | None:
    """Blind as it is: does the past appear with the mask turned round, or with nothing padded?"""
    mask = ctx.work.batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ctx.work.ids.shape:
        turned = ctx.work.each(
            lambda k, v: (1 - v.long()).to(v.dtype) if k == "attention_mask" else v
        )
        if _sight(ctx, turned)[1] >= 0.5:
            return (
                "real tokens are hidden, PAD is not: with attention_mask inverted the past is seen"
            )
    if ctx.work.has_pad and _sight(ctx, ctx.work.filled(ctx.seed))[1] >= 0.5:
        return "the past is hidden in padded batches, and seen with nothing padded"
    return None


def _first_is_seen(ctx: Context) -> bool:
    """Does the first token of each row, special or not, move the logits of the last half?"""
    work, pool = ctx.work, ctx.work.ordinary
    first = work.real & (work.real.long().cumsum(1) == 1)
    ids = torch.where(first, torch.where(work.ids == pool[0], pool[-1], pool[0]), work.ids)
    base = ctx.subject.look(work).logits
    other = ctx.subject.look(work.each(lambda k, v: ids if k == "input_ids" else v)).logits
    late = ctx.counted & (work.real.long().cumsum(1) > 2)
    return float(torch.where(late, moved(other, base), 0.0).max()) > 0.05 * ctx.bound(base, late)


def _dead_weights(ctx: Context, vocabulary: int) -> bool:
    """Is there a matrix of which a third or more gets no gradient?"""
    params = ctx.subject.box.params
    for p, g in zip(params, ctx.subject.gradients(ctx.work), strict=True):
        if g is None or p.ndim != 2 or vocabulary in p.shape or _is_table(ctx, p):
            continue
        silent = g.abs() <= 1e-5 * g.abs().max()  # a softmax of one key rounds to nearly zero
        if max(float(silent.all(d).float().mean()) for d in (0, 1)) >= 1 / 3:
            return True
    return False


def _is_table(ctx: Context, p: Tensor) -> bool:
    """Embeddings have untouched rows by nature."""
    return any(
        p is m._parameters.get("weight") and isinstance(m, torch.nn.Embedding)
        for m in ctx.subject.box.modules
    )
