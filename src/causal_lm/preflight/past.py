"""Probe of the past: a mask that hides everything leaks nothing, and teaches nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from causal_lm.preflight.context import Context, moved
from causal_lm.preflight.flow import MASK_REMEDY
from causal_lm.preflight.frame import Frame, UnexaminableError
from causal_lm.preflight.readout import SHIFT_REMEDY, offset_of
from causal_lm.preflight.report import Finding

_KEYS_REMEDY = "check the meaning of the padding mask: attention_mask is 1 at real tokens"
_BLIND = 0.25  # share of blind trials from which on it is no accident


@dataclass
class _Sight:
    """Shares of trials: own logit moves; the next one does not; any later one does."""

    own: float
    blind: float
    older: float
    hit: tuple[float, int, int]


def past(ctx: Context) -> list[Finding]:
    """Swap one token: the logits at its own and at the next position must move.

    Runs on woken weights, or a zero-initialised block would look blind. A model in which nothing
    but the token itself moves a logit may be meant so (a bigram); it is called blind only if a part
    of its weights can have no effect, as queries and keys do when a mask leaves one key to see.
    """
    if "finite" in ctx.blamed:
        raise UnexaminableError("the logits are not finite")
    if "future" in ctx.blamed:
        raise UnexaminableError("a mask that shows the future is at fault already")
    with ctx.weights(True):
        s = _sight(ctx, ctx.work)
        if s.own >= 0.5 and s.blind < _BLIND:
            return []
        hidden = _hidden_by_padding(ctx) if s.blind >= _BLIND else None
        if hidden:
            ctx.blamed.add("padding")
            return [ctx.finding("pad", "past", hidden, _KEYS_REMEDY, s.hit)]
        if s.blind == 1 and not s.older and s.own >= 0.5 and not _dead_weights(ctx):
            raise UnexaminableError("each logit depends on its own token only, and all weights act")
    if s.blind < _BLIND:  # blind to its own token: the inputs are shifted inside the model
        if offset_of(ctx.full, ctx.readout(True)) == 0:
            ctx.blamed.add("lag")
            return []
        seen = "logits do not see the token at their own position: inputs are shifted as well"
        both = (("shift", SHIFT_REMEDY), ("causal", MASK_REMEDY))
        return [ctx.finding(label, "past", seen, remedy, s.hit) for label, remedy in both]
    ctx.blamed.add("past")
    seen = f"in {s.blind:.0%} of the trials a logit does not see the token just before it"
    seen += ", though it sees older ones" if s.older else ""
    return [ctx.finding("causal", "past", seen, MASK_REMEDY, s.hit)]


def _sight(ctx: Context, frame: Frame) -> _Sight:
    """Three places a row. A blind one is tried again one further: blocks end, and may do so."""
    base = ctx.subject.look(frame).logits
    bound = ctx.bound(base, frame.real) * 0.05
    finite = torch.isfinite(base).any(-1)
    ok = frame.swappable & frame.next_ok & finite
    ok[:, :-1] &= finite[:, 1:]

    def reach(where: Tensor, seed: int) -> Tensor:
        return moved(ctx.subject.look(frame.swap(where, seed)).logits, base) > bound

    own, blind, older, hit = [], [], [], (0.0, 0, 0)
    for i in range(3):
        one = torch.zeros_like(ok)
        for b, row in enumerate(ok):
            places = row.nonzero()[:, 0]
            if len(places):
                one[b, places[(len(places) * (2 * i + 1)) // 6]] = True
        seen = reach(one, ctx.seed + i)
        unseen = one & ~seen.roll(-1, 1)
        if bool(unseen.any()):
            further = one.roll(1, 1) & ok
            unseen &= ~(further & reach(further, ctx.seed).roll(-1, 1)).roll(-1, 1)
        for b, t in one.nonzero().tolist():
            same = (frame.doc[b] == frame.doc[b, t]) & (torch.arange(len(ok[b])) > t + 1).to(ok)
            own.append(bool(seen[b, t]))
            blind.append(bool(unseen[b, t]))
            older.append(bool((seen[b] & same).any()))
            hit = (0.0, b, t + 1) if blind[-1] else hit
    if not own:
        raise UnexaminableError("no position with a swappable token before it")
    n = len(own)
    return _Sight(sum(own) / n, sum(blind) / n, sum(older) / n, (sum(blind) / n, *hit[1:]))


def _hidden_by_padding(ctx: Context) -> str | None:
    """Blind as it is: does the past appear with the mask turned round, or with nothing padded?"""
    mask = ctx.work.batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ctx.work.ids.shape:
        turned = ctx.work.put("attention_mask", (1 - mask.long()).to(mask))
        if _sight(ctx, turned).blind < _BLIND:
            return (
                "real tokens are hidden, PAD is not: with attention_mask inverted the past is seen"
            )
    if ctx.work.has_pad and _sight(ctx, ctx.work.filled(ctx.seed)).blind < _BLIND:
        return "the past is hidden in padded batches, and seen with nothing padded"
    return None


def _dead_weights(ctx: Context) -> bool:
    """Is there a matrix of which a third or more gets no gradient?"""
    tables = {id(m.weight) for m in ctx.subject.box.modules if isinstance(m, nn.Embedding)}
    vocabulary = ctx.base.logits.shape[-1]
    for p, g in zip(ctx.subject.box.params, ctx.subject.gradients(ctx.work), strict=True):
        if g is None or p.ndim != 2 or id(p) in tables:
            continue
        silent = g.abs() <= 1e-5 * g.abs().max()  # a softmax of one key rounds to nearly zero
        for d in (0, 1):  # a table of ids has untouched rows by nature
            enough = 1 if p.shape[1 - d] == vocabulary else 1 / 3
            if float(silent.all(d).float().mean()) >= enough:
                return True
    return False
