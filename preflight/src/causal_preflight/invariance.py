"""Probes of PAD and positions: neither PAD nor its row and slot change the logits of a token."""

import inspect
import math
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from causal_preflight.batch import AuditBatch, like_ids, span
from causal_preflight.context import NONE_COUNTS, Context, Move, moved
from causal_preflight.locate import get_path, iter_tensors
from causal_preflight.report import Finding, UnexaminableError, require
from causal_preflight.visibility import leaks

_UNKNOWN_CACHE = "the model takes a cache, but makes none, or in a form not known here"
_BESIDE = "{where} with the padding of other rows"


def finite(ctx: Context) -> Iterator[Finding]:
    """Loss, logits of real tokens and gradients must be numbers."""
    model, batch = ctx.model, ctx.work
    sound = all(bool(torch.isfinite(p).all()) for p in model.sandbox.params)
    require(sound, "the parameters themselves are not finite")

    def look(batch: AuditBatch, *losses: float) -> str:
        o = ctx.observe(batch)
        if not all(map(math.isfinite, (o.loss, *losses))):
            return "the loss"
        if bool((torch.isnan(o.logits).any(-1) & o.made & batch.real).any()):
            return "the logits of a real token"
        grads = model.grads(model.run(batch, True), model.sandbox.params)
        return "" if all(g is None or bool(torch.isfinite(g).all()) for g in grads) else "gradients"

    loss = float(model.run(ctx.full, True).detach())
    if not (what := look(batch, loss)):
        return
    ctx.explained.add("finite")
    modes = [model.observe(ctx.full, train) for train in (True, False)]
    nan = torch.stack([torch.isnan(o.logits).any(-1) & o.made for o in modes]).any(0)
    if what == "the loss" and not bool(nan.any()):
        require(ctx.full.has_target.any(), "no position of the batch has a next token")
        # Noise in place of the logits gives a finite loss unless it divides by 0.
        empty = any(math.isnan(model.readout(ctx.full, train).loss) for train in (True, False))
        why = "a mean over no targets" if empty else "log(0) or an overflow"
        loss = ctx.base.loss if math.isfinite(loss) else loss
        seen = f"the loss is {loss} though no logit is NaN: {why}"
        remedy = "clamp" if empty else "overflow"
        yield ctx.finding("reduction", seen, remedy, Move(float("nan")))
        return
    broken = (nan & ctx.full.real).flatten()
    move = Move(float("nan"), int(broken.long().argmax()) if bool(broken.any()) else -1)
    bare = batch.unpadded()
    tried = [("finite once the PAD is removed", "no key", bare)] if batch.has_pad else []
    if (mask := like_ids(bare.raw, "attention_mask")) is not None:
        inverted = bare.with_tensor("attention_mask", (mask == 0).to(mask))
        tried.append(("finite once attention_mask is inverted", "pad keys", inverted))
    for text, remedy, other in tried:
        if not look(other):
            yield ctx.finding("pad", f"{what}: not finite in this batch, {text}", remedy, move)
            return
    seen = f"{what}: not finite without any PAD; a query may have no key, as by an inverted mask"
    yield ctx.finding("causal", seen, "mask future", move)


def embedding(ctx: Context) -> Iterator[Finding]:
    """Add noise to the embedding of PAD: the logits of real tokens must not move."""
    work = ctx.work
    require(work.has_pad, "no PAD in the batch")
    sides = [work.left_pad]
    if not ctx.explained & {"future", "cross_row"}:  # else PAD on the right is seen as well
        sides.append(~work.real & ~work.left_pad)
    sides = [side for side in sides if bool(side.any())]
    require(sides, "a causal leak was found, which explains a dependence on PAD on the right")
    settings = [(work, both, both, sides) for both in (False, True)]
    seen = "{where} with the embedding at PAD slots"
    return leaks(ctx, settings, "padding", seen, "pad keys", noise=True)


def extension(ctx: Context) -> Iterator[Finding]:
    """Add PAD on the side where the batch has it: logits, weights and loss must not move.

    Weights that shrink: the denominator counts PAD. A loss that moves alone, free of the rounding
    in the logits (`InstrumentedModel.readout`): an auxiliary term counts PAD.
    """
    require(ctx.work.has_pad, "no PAD in the batch")
    work, width = ctx.work, ctx.work.ids.shape[1]
    more = max(2, width // 4)
    require(width > more + 2, "needs rows of five tokens")
    # Cut by as much first: a table of positions may end where the batch does.
    base = work.cols(0, width - more)
    base = base.rows(base.real.any(1).nonzero()[:, 0])
    longer = base.pad(more, work)
    examined = not ctx.explained & {"future", "cross_row", "padding", "context", "finite"}
    if examined and (move := ctx.compare(base, longer)):
        label = "pad" if move.size == float("inf") else "position"
        yield ctx.finding(label, "{where} when PAD is added", "length", move)
        return
    if ctx.explained & {"pad target", "shift", "reduction", "inexact weights"}:
        require(examined, "another fault moves logits and weights already")
        return
    for train in (True, False):
        r, s = (ctx.model.readout(batch, train) for batch in (base, longer))
        before, after = r.weight[r.trained], s.weight[longer.slot >= 0][r.trained.flatten()]
        if not len(before):
            continue
        if bool((after == 0).any()):  # a model may make the logits of the last columns alone
            made = ctx.model.observe(longer).made[longer.slot >= 0][r.trained.flatten()]
            require(made.all(), "with PAD added, the loss is that of other positions")
        examined, change = True, (after / before - 1).abs()
        if float(change.max()) > max(2e-3, 3 * r.residual):
            most = change.argmax()
            seen = f"the weight of a real token goes from {float(before[most]):.4g} to "
            seen += f"{float(after[most]):.4g} when columns of PAD are added"
            yield ctx.finding("reduction", seen, "divide", Move(float(change[most])))
            return
        drift = abs(s.loss - r.loss) / max(1e-9, abs(r.loss))
        first, *others = ctx.model.heads  # the logits of others are not replaced: they round
        bound = ctx.tolerance * (1.0 if others else 0.1)
        # A NaN drift is no finding.
        if not (drift > max(2e-6, bound) and first == ctx.model.head and first.replaceable):
            continue
        ctx.model.seed += 1  # does dropout reach the loss by another way than the logits?
        reseeded = ctx.model.readout(base, train).loss if train else r.loss
        ctx.model.seed -= 1
        if abs(reseeded - r.loss) <= 1e-7 * abs(r.loss):
            seen = "the loss moves by {size} of itself with PAD added; logits and weights do not: "
            yield ctx.finding("pad", seen + "a term counts PAD", "pad targets", Move(drift))
            return
    require(examined, NONE_COUNTS)


def _require_clean(ctx: Context) -> None:
    known = {"future", "cross_row", "documents", "padding", "context", "finite"}
    require(not ctx.explained & known, "another fault moves the logits already")


def order(ctx: Context) -> Iterator[Finding]:
    """Rows in reverse order: the logits must follow their rows."""
    _require_clean(ctx)
    work, rows = ctx.work, len(ctx.work.ids)
    require(rows > 1, "needs a batch of two rows")
    if move := ctx.compare(work, work.rows([*range(rows)][::-1])):
        ctx.explained.add("order")
        b = int((work.slot == move.slot).any(1).long().argmax())
        if ctx.compare(work.rows([b]), work.rows([b] * rows)):
            yield ctx.finding("position", "{where} when the rows change places", "axis", move)
        else:  # neither its place nor the tokens of other rows (`cross_row`): it is their PAD
            yield ctx.finding("pad", _BESIDE, "pad keys", move)


def alone(ctx: Context) -> Iterator[Finding]:
    """A row in the batch, by itself, and by itself without its PAD: the same logits each time."""
    _require_clean(ctx)
    require("order" not in ctx.explained, "logits depend on the row already")
    work, pads = ctx.work, (~ctx.work.real).sum(1)
    counted = ctx.counted(work).any(1)
    require(counted.any(), NONE_COUNTS)
    for b in [b for b in pads.argsort(descending=True, stable=True)[:2].tolist() if counted[b]]:
        if move := ctx.compare(work, work.rows([b])):
            yield ctx.finding("pad", _BESIDE, "pad keys", move)
            return
        if pads[b] and (move := ctx.compare(work, work.unpadded(b))):
            seen = f"{{where}} when its {int(pads[b])} PAD tokens are removed"
            yield ctx.finding("position", seen, "positions", move)
            return


def length(ctx: Context) -> Iterator[Finding]:
    """The last token of the longest rows becomes PAD, or is cut off: no earlier logit may move."""
    _require_clean(ctx)
    known = {f.probe for f in ctx.report.findings} & {"extension", "order", "alone"}
    require(not known, "logits depend on padding or row already")
    work = ctx.work
    full = work.unpadded() if work.has_pad else work
    require(full.ids.shape[1] > 2, "needs rows of three tokens")
    short = full.cols(0, full.ids.shape[1] - 1)
    if move := ctx.compare(full, short.pad(1, work) if work.has_pad else short):
        seen = "{where} when the last token of its row is taken away"
        yield ctx.finding("causal", seen, "row length", move)


def packed(ctx: Context) -> Iterator[Finding]:
    """A later document of a packed row gives the same logits as by itself; three are tried."""
    _require_clean(ctx)
    work, own = ctx.work, {"doc": ctx.work.doc, **ctx.work.raw}
    first = work.real.long().argmax(1).tolist()
    later = [(b, d) for b, row in enumerate(work.doc) for d in row.unique().tolist()[-2:]]
    later = [(b, d) for b, d in later if d > int(work.doc[b, first[b]])]
    require(later, "one document a row (no document_ids)")

    def as_first(b: int, name: str, v: Tensor) -> Tensor:
        """Numbered and placed like the first document of row b."""
        numbers = ("position_ids", "document_ids", "attention_mask", "doc")
        moves = name in numbers and v.ndim == 2 and v.dtype != torch.bool
        return v - v[:, :1] + own[name][b, first[b]] if moves else v

    for b, d in later[:3]:
        document = work.rows([b]).cols(*span(work.doc[b] == d))
        if move := ctx.compare(work, document.map_tensors(partial(as_first, b))):
            seen = f"row {{row}}: document {d} has other logits than by itself, by {{size}} at "
            yield ctx.finding("position", seen + "position {t}", "positions", move)
            return


def decoding(ctx: Context) -> Iterator[Finding]:
    """Token by token with a cache, if the model takes one, must give the logits of one pass.

    The cache is one that `forward` returns, or one that `make_cache()` of the module or of its
    `model` makes and `forward(input_ids, position_ids=, cache=)` extends in place.
    """
    _require_clean(ctx)
    inner = getattr(ctx.model.module, "model", None)
    model: Any = inner if hasattr(inner, "make_cache") else ctx.model.module
    names = list(inspect.signature(model.forward).parameters)
    caches = [n for n in names if n.startswith("past") or (n != "use_cache" and "cache" in n)]
    require(caches, "the model's forward takes no cache")
    cache = "past_key_values" if "past_key_values" in caches else caches[0]
    logits, row = partial(_logits, model, names, cache), ctx.work.unpadded().rows([0]).cols(0, 12)
    width = row.ids.shape[1]
    require(width > 1, "needs rows of two tokens")
    steps = [0, *range(width // 2, width + 1)]  # the first half in one pass
    ctx.model.sandbox.rewind(ctx.seed, False)
    with torch.no_grad():
        try:
            whole = logits(row.ids, [0, width])
        except (AttributeError, TypeError):
            raise UnexaminableError(_UNKNOWN_CACHE) from None
        stepped = logits(row.ids, steps)
        if not (move := ctx.largest_move(row, stepped, whole, row.real, reshaped=True)):
            return
        t = int((row.slot[0] == move.slot).nonzero())
        before = (torch.arange(width) == t - 1).to(row.real)[None]
        reach = moved(logits(row.swap(before, ctx.seed).ids, steps), stepped)[0, t]
    seen = "decoding with the cache differs from one pass by {size} at position {t}"
    if float(reach) > 0.04 * ctx.bound(whole, row.real):
        yield ctx.finding("position", seen, "cache", move)
    else:
        yield ctx.finding("causal", f"{seen}, and misses the token before it", "cache", move)


def _logits(model: Any, names: list[str], cache: str, ids: Tensor, edges: list[int]) -> Tensor:
    """Logits (1, T, V) of ids (1, T): one call between each two `edges`, joined by the cache."""
    make, steps = getattr(model, "make_cache", None), list[Tensor]()
    given: dict[str, Any] = {"use_cache": True} if "use_cache" in names else {}
    given |= {cache: make()} if make and len(edges) > 2 else {}
    for start, stop in pairwise(edges):
        require(given.get(cache, 0) is not None, _UNKNOWN_CACHE)
        if make and "position_ids" in names:
            given["position_ids"] = torch.arange(start, stop).to(ids)[None]
        out = model(ids[:, start:stop], **given)
        if not make:
            keys = (cache, "past_key_values", "cache", "presents", 1)
            given[cache] = next((c for k in keys if (c := get_path(out, (k,))) is not None), None)
        hits = [t.float() for _, t in iter_tensors(out, 2) if t.ndim == 3 and t.is_floating_point()]
        require(hits, _UNKNOWN_CACHE)
        steps.append(hits[0][:, start - stop :])
    return torch.cat(steps, 1)
