"""Probes of visibility: swap tokens, and see which counted logits move.

Differences of real runs, not gradients: a gradient is blind to routing, sorting and no_grad paths.
Each probe swaps parts of the batch, and no counted logit outside the part may move, under several
settings: in train mode, with nothing padded, and on weights woken so that every path carries signal
(`Sandbox.woken`). Each setting catches leaks that the others miss.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from causal_preflight.audit_batch import AuditBatch, UnexaminableError, need
from causal_preflight.context import Context, Move, moved
from causal_preflight.readout import offset_of
from causal_preflight.report import Finding

_BLIND = 0.25  # share of blind trials from which on it is no accident


@dataclass(frozen=True)
class _Setting:
    words: str
    frame: AuditBatch
    train: bool
    woken: bool
    parts: list[Tensor]
    """(B, T) bool each: swap there, and nothing else may move"""


def _leak(ctx: Context, settings: Iterable[_Setting]) -> tuple[_Setting, Tensor, Move] | None:
    """The first part whose swap moves what lies outside of it."""
    for s in settings:
        with ctx.weights(s.woken):
            base = ctx.subject.look(s.frame, s.train).logits
            for part in s.parts:
                new = ctx.subject.look(s.frame.swap(part, ctx.seed), s.train).logits
                move = ctx.worst(s.frame, new, base, ctx.counted(s.frame) & ~part)
                if move:
                    return s, part, move
    return None


def company(ctx: Context) -> list[Finding]:
    """Swap every token of every other row: the rows between them must not move."""
    work = ctx.work if len(ctx.work.ids) > 1 else ctx.work.rows([0, 0])
    odd = torch.zeros_like(work.real)
    odd[1::2] = True
    parts = [~odd, odd]
    settings = [_Setting("", work, False, False, parts)]
    settings += [_Setting("in train mode, ", work, True, woken, parts) for woken in (False, True)]
    leak = _leak(ctx, settings)
    if leak is None:
        return []
    ctx.blamed.add("company")
    seen = leak[0].words + "{where} with tokens of other rows"
    return [ctx.finding("causal", seen, "rows", leak[2])]


def future(ctx: Context) -> list[Finding]:
    """No counted logit may move with a later token of its row.

    To try every pair (token j moves logit i < j) in few runs, all tokens from a cut on are swapped
    at once, with a cut of its own in each row: nothing before the cut may move.
    """
    need(
        "company" not in ctx.blamed,
        "rows see each other, so the future cannot be told from company",
    )
    work = ctx.work
    rows, width = work.ids.shape
    need(width > 1, "needs rows of two tokens")
    runs = min(width - 1, max(6, min(12, 256 // width)))
    parts, few = _cuts(work, runs), _cuts(work, max(2, runs // 3))
    settings = [  # from likely to unlikely
        _Setting("", work, False, False, parts),
        _Setting("in train mode, ", work, True, False, few),
        _Setting("with woken weights, ", work, False, True, few),
        _Setting("with woken weights in train mode, ", work, True, True, few),
    ]
    if work.has_pad:
        words, full = "with nothing padded, ", work.unpadded()
        few = _cuts(full, len(few))
        settings.append(_Setting(words, full, False, False, few))
        settings.append(_Setting(words + "in train mode and woken, ", full, True, True, few))
    leak = _leak(ctx, settings)
    if leak is None:
        if runs < width - 1:
            ctx.report.sampled.append(f"future: {runs} of {width - 1} cuts in each of {rows} rows")
        return []
    ctx.blamed.add("future")
    row, t = divmod(_culprit(ctx, *leak), ctx.full.ids.shape[1])
    seen = leak[0].words + "{where}, though its target counts, when later tokens are swapped, such "
    seen += f"as token {int(ctx.full.ids[row, t])} at position {t}"
    return [ctx.finding("causal", seen, "ahead", leak[2])]


def _cuts(frame: AuditBatch, runs: int) -> list[Tensor]:
    """All from a cut on, for cuts that are spread over the real tokens of each row."""
    parts = [torch.zeros_like(frame.real) for _ in range(runs)]
    for b, row in enumerate(frame.real):
        at = row.nonzero()[:, 0]
        for i, part in enumerate(parts if len(at) > 1 else ()):
            place = (i + (b + 1) / len(frame.real)) / runs  # in (0, 1]: the last token comes last
            part[b, int(at[max(1, min(len(at) - 1, round(place * (len(at) - 1))))]) :] = True
    return parts


def _culprit(ctx: Context, s: _Setting, part: Tensor, move: Move) -> int:
    """The slot of one token that moved it: halve the swapped part of its row until one is left."""
    hit = s.frame.at == move.at
    b = int(hit.any(1).long().argmax())
    places = part[b].nonzero()[:, 0]
    with ctx.weights(s.woken):
        base = ctx.subject.look(s.frame, s.train).logits
        while len(places) > 1:
            half, rest = places.tensor_split(2)
            part = torch.zeros_like(part)
            part[b, half] = True
            new = ctx.subject.look(s.frame.swap(part, ctx.seed), s.train).logits
            places = half if ctx.worst(s.frame, new, base, hit) else rest
    return int(s.frame.at[b, places])


def documents(ctx: Context) -> list[Finding]:
    """Packed rows: no counted logit may move with a token of another document.

    Documents are numbered in binary; for each bit, those with it are swapped and those without
    are watched, and the other way round, so that every pair of documents is tried.
    """
    work, doc = ctx.work, ctx.work.doc
    need(doc.max() > 0, "one document a row (no document_ids)")
    need(not ctx.blamed & {"future", "company"}, "a leak is known already")
    index = torch.zeros_like(doc)  # 0, 1, 2, ... by order of appearance in the row
    index[:, 1:] = (doc[:, 1:] != doc[:, :-1]).long().cumsum(1)
    bits = [index >> k & 1 for k in range(int(index.max()).bit_length())]
    parts = [work.real & (bit == side) for bit in bits for side in (0, 1)]
    leak = _leak(ctx, (_Setting("", work, train, train, parts) for train in (False, True)))
    if leak is None:
        return []
    ctx.blamed.add("documents")
    seen = "{where} with tokens of other documents in the row"
    return [ctx.finding("causal", seen, "documents", leak[2])]


def past(ctx: Context) -> list[Finding]:
    """Swap one token: the logits at its own and at the next position must move.

    A mask that hides everything leaks nothing, and teaches nothing. Runs on woken weights, or a
    zero-initialised block would look blind. A model in which nothing but the token itself moves a
    logit may be meant so (a bigram); it is called blind only if a part of its weights can have no
    effect, as queries and keys do when a mask leaves one key to see.
    """
    need("finite" not in ctx.blamed, "the logits are not finite")
    need("future" not in ctx.blamed, "a mask that shows the future is at fault already")
    with ctx.weights(True):
        own, blind, older, move = _sight(ctx, ctx.work)
        hidden = _hidden_by_padding(ctx) if blind >= _BLIND else None
    if own >= 0.5 and blind < _BLIND:
        return []
    if hidden:
        ctx.blamed.add("padding")
        return [ctx.finding("pad", hidden, "pad keys", move)]
    if blind < _BLIND:  # blind to its own token: the inputs are shifted inside the model
        if offset_of(ctx.full, ctx.readout(True)) == 0:
            ctx.blamed.add("lag")
            return []
        seen = "logits do not see the token at their own position: inputs are shifted as well"
        both = (("shift", "targets"), ("causal", "ahead"))
        return [ctx.finding(label, seen, remedy, move) for label, remedy in both]
    if blind == 1 and not older and own >= 0.5 and not _dead_weights(ctx):
        raise UnexaminableError("each logit depends on its own token only, and all weights act")
    ctx.blamed.add("past")
    seen = f"in {blind:.0%} of the trials a logit does not see the token just before it"
    seen += ", though it sees older ones" if older else ""
    return [ctx.finding("causal", seen, "ahead", move)]


def _sight(ctx: Context, frame: AuditBatch) -> tuple[float, float, float, Move]:
    """Shares of trials: own logit moves; the next one does not; any later one does; and where.

    Three places a row. A blind one is tried again one further: blocks end, and may do so.
    """
    base = ctx.subject.look(frame).logits
    bound = ctx.bound(base, frame.real) * 0.05
    finite = torch.isfinite(base).any(-1)
    ok = frame.swappable & frame.next_ok & finite
    ok[:, :-1] &= finite[:, 1:]

    def reach(where: Tensor, seed: int) -> Tensor:
        return moved(ctx.subject.look(frame.swap(where, seed)).logits, base) > bound

    tried = own = blind = older = last = 0
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
            last = int(frame.at[unseen.roll(1, 1)].max()) if bool(unseen.any()) else last
        same = frame.doc == (frame.doc * one).sum(1, keepdim=True)
        beyond = (one | one.roll(1, 1)).long().cumsum(1) == 2  # after the token and the next one
        beyond &= ~one.roll(1, 1)
        tried, own = tried + int(one.sum()), own + int((one & seen).sum())
        blind += int(unseen.sum())
        older += int((seen & same & beyond).any(1).sum())
    need(tried, "no position with a swappable token before it")
    return own / tried, blind / tried, older / tried, Move(blind / tried, last)


def _hidden_by_padding(ctx: Context) -> str | None:
    """Blind as it is: does the past appear with the mask turned round, or with nothing padded?"""
    mask = ctx.work.batch.get("attention_mask")
    if isinstance(mask, Tensor) and mask.shape == ctx.work.ids.shape:
        turned = ctx.work.put("attention_mask", (1 - mask.long()).to(mask))
        if _sight(ctx, turned)[1] < _BLIND:
            return "real tokens are hidden, PAD is not: with attention_mask inverted all is seen"
    if ctx.work.has_pad and _sight(ctx, ctx.work.unpadded())[1] < _BLIND:
        return "the past is hidden in padded batches, and seen with nothing padded"
    return None


def _dead_weights(ctx: Context) -> bool:
    """Can a third of a matrix, of a stack of matrices, or of all of one shape have no effect?

    Slices along every axis are looked at: queries, keys and values may share one parameter. Weights
    are drawn anew a few times: an expert that no token is sent to in one draw is used in another.
    """
    params, tokens = ctx.subject.box.params, ctx.base.logits.shape[-1]
    heard: dict[int, Tensor] = {}
    for draw in range(6):
        with ctx.subject.box.rescaled_weights(ctx.seed + draw, stir=draw > 0):
            found = ctx.subject.grads(ctx.subject.run(ctx.work, True), params)
        grads = {i: g for i, g in enumerate(found) if g is not None}
        loudest = max(float(g.abs().max()) for g in grads.values())
        for i, g in grads.items():  # a softmax of one key rounds to nearly zero
            loud = g.abs() > max(1e-5 * float(g.abs().max()), 1e-7 * loudest)
            heard[i] = heard.get(i, loud) | loud
    tables = {id(m.weight) for m in ctx.subject.box.modules if isinstance(m, nn.Embedding)}
    alike: dict[torch.Size, list[bool]] = {}
    for i, loud in heard.items():
        if loud.ndim < 2 or id(params[i]) in tables:
            continue
        alike.setdefault(loud.shape, []).append(bool(loud.any()))
        for d in range(loud.ndim if loud.any() else 0):
            used = loud.movedim(d, 0).flatten(1).any(1)
            used = used[: int(used.nonzero().max()) + 1]  # a table of places is longer than rows
            # and a table of ids has untouched rows by nature
            if loud.shape[d] != tokens and float(used.float().mean()) <= 2 / 3:
                return True
    return any(sum(used) <= 2 / 3 * len(used) for used in alike.values())
