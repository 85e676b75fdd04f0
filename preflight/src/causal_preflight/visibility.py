"""Probes of visibility: swap tokens, and see which counted logits move.

They compare real runs: a gradient is zero through routing, sorting and no_grad. Each is repeated in
settings that catch what others miss: train mode, nothing padded, rescaled weights.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from causal_preflight.batch import AuditBatch, like_ids, one_a_row, shift
from causal_preflight.context import NONE_COUNTS, Context, Move, moved
from causal_preflight.report import Finding, UnexaminableError, require
from causal_preflight.targets import offset_of

_UNMOVED = 0.25  # fraction of trials without a change from which it is a fault
_CUTS = 12  # cuts a row that are tried first; in each further setting fewer
_ROWS = 4  # rows with a cut of their own in one run; fewer rows are repeated
_MAX_LOGITS = 2**26  # logits of repeated rows
_GOLDEN = (5**0.5 - 1) / 2
Setting = tuple[AuditBatch, bool, bool, list[Tensor]]
"""A batch, whether it is run in train mode and with rescaled weights, and parts (B, T) to change"""


def leaks(
    ctx: Context, settings: Iterable[Setting], mechanism: str, seen: str, remedy: str,
    noise: bool = False,
) -> Iterator[Finding]:  # fmt: skip
    """The finding for the first part whose change moves a counted logit outside of it.

    Tokens are swapped, or their embedding gets `noise`. `mechanism` explains what later probes see.
    """
    watched = False
    for batch, train, rescaled, parts in settings:
        special = rescaled and not bool(batch.doc.max() > 0)  # else EOS may separate documents
        with ctx.weights(rescaled):
            base = ctx.observe(batch, train, rescaled).logits
            for part in parts:
                watch = ctx.counted(batch) & ~part
                watched = watched or bool(watch.any())
                noised = replace(batch, noised=part)
                edit = noised if noise else batch.swap(part, ctx.seed, special)
                logits = ctx.model.observe(edit, train).logits
                if move := ctx.largest_move(batch, logits, base, watch):
                    how = ["with nothing padded"] * (batch.has_pad != ctx.work.has_pad)
                    how += ["in train mode"] * train + ["with rescaled weights"] * rescaled
                    ctx.explained.add(mechanism)
                    label, seen = "pad" if noise else "causal", ", ".join([*how, seen])
                    yield ctx.finding(label, seen, remedy, move)
                    return
    require(watched, NONE_COUNTS)


def cross_row(ctx: Context) -> Iterator[Finding]:
    """Swap every token of every other row: the rows between them must not move."""
    work = ctx.work if len(ctx.work.ids) > 1 else ctx.work.rows([0, 0])
    odd = torch.zeros_like(work.real)
    odd[1::2] = True
    modes = (False, False), (True, False), (True, True)
    settings = [(work, *mode, [~odd, odd]) for mode in modes]
    seen = "{where} with tokens of other rows"
    return leaks(ctx, settings, "cross_row", seen, "rows")


def future(ctx: Context) -> Iterator[Finding]:
    """Swap all tokens from a cut on, another in each row and run: no earlier logit may move."""
    known = "rows see each other, so the future cannot be told from other rows"
    require("cross_row" not in ctx.explained, known)
    work, (rows, width) = ctx.work, ctx.work.ids.shape
    require(width > 1, "needs rows of two tokens")
    runs, pad = min(width - 1, _CUTS), work.has_pad and not work.stale
    few = max(2, runs // (3 if pad else 2))
    several = _repeated(ctx, work, _ROWS if pad else 2 * _ROWS)
    plan = [(work, False, False, runs)]  # from likely to unlikely
    plan += [(several, *mode, few) for mode in ((True, False), (False, True), (True, True))]
    if pad:
        full = _repeated(ctx, work.unpadded(), 2 * _ROWS)
        plan += [(full, False, False, few // 2), (full, True, True, few - few // 4)]
    settings, tried = list[Setting](), 0
    for batch, train, rescaled, count in plan:
        settings.append((batch, train, rescaled, _cuts(batch, tried, count)))
        tried += count
    seen = "{where}, though its target counts, when later tokens are swapped"
    yield from leaks(ctx, settings, "future", seen, "mask future")
    if "future" not in ctx.explained and tried < width - 1:
        ctx.report.sampled.append(f"future: {tried} of {width - 1} cuts in each of {rows} rows")


def _repeated(ctx: Context, batch: AuditBatch, wanted: int) -> AuditBatch:
    """The batch with its rows repeated, for cuts at several places of a row in one run."""
    rows, size = len(batch.ids), ctx.base.logits[0].numel()
    wanted = min(wanted, _MAX_LOGITS // size)
    fixed = batch.stale or (rows == 1 and batch.writers)  # a model of one flattened row
    return batch if rows >= wanted or fixed else batch.rows([i % rows for i in range(wanted)])


def _cuts(batch: AuditBatch, start: int, runs: int) -> list[Tensor]:
    """Everything from a cut on, in each row: numbers `start` and following of its cuts."""
    parts = [torch.zeros_like(batch.real) for _ in range(runs)]
    for b, row in enumerate(batch.real):
        places = row.nonzero()[:, 0].tolist()
        order = _cut_order(len(places) - 1, len(row), b, len(batch.real))
        for i, part in enumerate(parts if order else ()):
            part[b, places[order[(start + i) % len(order)]] :] = True
    return parts


@cache
def _cut_order(count: int, width: int, b: int, rows: int) -> list[int]:
    """The cuts 1 to `count` of row b, such that those of all rows are spread however few are tried.

    First powers of two, their neighbors and multiples of 64, where sinks, windows and chunks begin
    and end, dealt out to the rows; then multiples of the golden ratio, which spread evenly; then
    what is left.
    """
    edges = {2**k + d for k in range(width.bit_length()) for d in (-1, 0, 1)}
    mine = sorted(edges | {*range(64, width, 64)})[b::rows]
    spread = (1 + int((i * rows + b) * _GOLDEN % 1 * count) for i in range(count))
    every = dict.fromkeys([*mine, *spread, *range(1, count + 1)])
    return [c for c in every if 1 <= c <= count]


def documents(ctx: Context) -> Iterator[Finding]:
    """In packed rows, no counted logit may move with a token of another document."""
    work, doc = ctx.work, ctx.work.doc
    require(doc.max() > 0, "one document a row (no document_ids)")
    require(not ctx.explained & {"future", "cross_row"}, "a leak is known already")
    index = (shift(doc, -1, -2) != doc).long().cumsum(1) - 1  # 0, 1, 2, ... within each row
    # Two documents differ in some bit: swap those with a 0 there, then those with a 1.
    bits = [index >> k & 1 for k in range(int(index.max()).bit_length())]
    parts = [work.real & (bit == side) for bit in bits for side in (0, 1)]
    settings = [(work, both, both, parts) for both in (False, True)]
    seen = "{where} with tokens of other documents in the row"
    return leaks(ctx, settings, "documents", seen, "documents")


def context(ctx: Context) -> Iterator[Finding]:
    """Swap one token: the logits at its own and at the next position must move.

    A model whose logits depend on their own token only may be meant so (a bigram): it is a
    fault only if a part of its weights, as queries and keys, can have no effect.
    """
    require(ctx.counted(ctx.work).any(), NONE_COUNTS)
    require("finite" not in ctx.explained, "the logits are not finite")
    require(not ctx.model.head.ahead, "no head is trained on the next token")
    require("future" not in ctx.explained, "a mask that shows the future is at fault already")
    mask, inverted = like_ids(ctx.work.raw, "attention_mask"), False
    with ctx.weights(True):
        own, unmoved, older, move = _dependence(ctx, ctx.work)
        if unmoved >= _UNMOVED and mask is not None:
            other = ctx.work.with_tensor("attention_mask", (mask == 0).to(mask))
            inverted = _dependence(ctx, other)[1] < _UNMOVED
        if own >= 0.5 and unmoved < _UNMOVED:
            with suppress(UnexaminableError):  # the embedding is looked up in a way not known here
                yield from _hidden_special(ctx)
            return
    if inverted:
        ctx.explained.add("padding")
        seen = "real tokens are hidden, PAD is not: with attention_mask inverted all is seen"
        yield ctx.finding("pad", seen, "pad keys", move)
    elif unmoved >= _UNMOVED:
        intended = unmoved == 1 and not older and own >= 0.5 and not _dead_weights(ctx)
        require(not intended, "each logit depends on its own token only, and all weights act")
        ctx.explained.add("context")
        seen = f"in {unmoved:.0%} of the trials a logit does not see the token just before it"
        seen += ", though it sees older ones" if older else ""
        yield ctx.finding("causal", seen, "mask future", move)
    elif offset_of(ctx.full, ctx.readout(True)) == 0:  # inputs are shifted inside the model
        ctx.explained.add("shifted inputs")
    else:
        seen = "logits do not see the token at their own position: inputs are shifted as well"
        for label, remedy in (("shift", "targets"), ("causal", "mask future")):
            yield ctx.finding(label, seen, remedy, move)


def _dependence(ctx: Context, batch: AuditBatch) -> tuple[float, float, float, Move]:
    """Fractions of trials (own logit moves, next one does not, any later one does), and where.

    If the next one does not, the position after it is tried: it may begin a block of attention.
    """
    base = ctx.observe(batch, rescaled=True).logits
    bound = ctx.bound(base, batch.real) * 0.05
    finite = torch.isfinite(base).any(-1)
    ok = batch.swappable & batch.has_target & finite
    ok[:, :-1] &= finite[:, 1:]

    def reach(where: Tensor, seed: int) -> Tensor:
        return moved(ctx.model.observe(batch.swap(where, seed)).logits, base) > bound

    tried = own = unmoved = older = last = 0
    for i in range(3):
        one = one_a_row(ok, 2 * i + 1)
        seen, following = reach(one, ctx.seed + i), one.roll(1, 1)
        unseen = one & ~seen.roll(-1, 1)
        if bool(unseen.any()):
            further = following & ok
            unseen &= ~(further & reach(further, ctx.seed).roll(-1, 1)).roll(-1, 1)
            last = int(batch.slot[unseen.roll(1, 1)].max()) if bool(unseen.any()) else last
        same = batch.doc == (batch.doc * one).sum(1, keepdim=True)
        beyond = ((one | following).long().cumsum(1) == 2) & ~following
        tried, own = tried + int(one.sum()), own + int((one & seen).sum())
        unmoved += int(unseen.sum())
        older += int((seen & same & beyond).any(1).sum())
    require(tried, "no position with a swappable token before it")
    return own / tried, unmoved / tried, older / tried, Move(unmoved / tried, last)


def _hidden_special(ctx: Context) -> Iterator[Finding]:
    """A real EOS or BOS that the next position does not see, though it sees the token before that.

    Its embedding gets noise: a mask made by comparing ids would show a token swapped in for it.
    """
    work, seen = ctx.work, ctx.observe(ctx.work, rescaled=True)
    bound = ctx.bound(seen.logits, work.real) * 0.05

    def unseen(part: Tensor, later: int) -> Tensor:
        change = moved(ctx.model.observe(replace(work, noised=part)).logits, seen.logits)
        return part & (seen.made & (change <= bound)).roll(-later, 1)

    for token in work.special.tolist():
        at = work.has_target & (work.ids == token)
        at &= at.long().cumsum(1) == at.sum(1, keepdim=True)  # the last one of each row
        if not (bool(at.any()) and bool((hidden := unseen(at, 1)).any())):
            continue
        before = shift(hidden & ~work.opens, 1, False)  # else a document or block ends
        hidden &= work.opens | (before & ~unseen(before, 2)).roll(1, 1)
        if bool(hidden.any()):
            what = f"row {{row}}: the real token {token} at position {{t}} is hidden as a key"
            yield ctx.finding("pad", what, "by value", Move(0.0, int(work.slot[hidden][0])))
            return


def _dead_weights(ctx: Context) -> bool:
    """Whether a third of a matrix, of a stack of matrices, or of all of one shape has no effect.

    Draws of weights differ in the expert that a token is sent to; parameters may share a matrix.
    """
    params, tokens = ctx.model.sandbox.params, ctx.base.logits.shape[-1]
    used: dict[int, Tensor] = {}
    for draw in range(6):
        with ctx.model.sandbox.rescaled_weights(ctx.seed + draw, add_noise=draw > 0):
            found = ctx.model.grads(ctx.model.run(ctx.work, True), params)
        grads = {i: g.abs() for i, g in enumerate(found) if g is not None}
        largest = max(float(g.max()) for g in grads.values())
        for i, g in grads.items():  # a softmax over one key rounds to nearly zero
            hit = (g > max(1e-5 * float(g.max()), 1e-7 * largest)).cpu()
            used[i] = used.get(i, hit) | hit
    tables = {id(m.weight) for m in ctx.model.sandbox.modules if isinstance(m, nn.Embedding)}
    by_shape: dict[torch.Size, list[Tensor]] = {}
    for i, hit in used.items():
        if hit.ndim > 1 and id(params[i]) not in tables:
            by_shape.setdefault(hit.shape, []).append(hit)
    for hits in by_shape.values():
        stack = torch.stack(hits)
        for d, size in enumerate(stack.shape):
            acts = stack.movedim(d, 0).flatten(1).any(1)
            # Without effect by right: the end of a table of positions longer than the rows, and any
            # row of a table of ids.
            acts = acts[: int(acts.nonzero().max()) + 1] if d and bool(acts.any()) else acts
            if float(acts.float().mean()) <= 2 / 3 and not (d and size == tokens):
                return True
    return False
