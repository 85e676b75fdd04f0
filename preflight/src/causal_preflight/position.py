"""Probes of positions: the same content gives the same logits in any row, slot and padding."""

import inspect
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from causal_preflight.batch import span
from causal_preflight.context import NONE_COUNTS, Context, moved
from causal_preflight.locate import get_path, iter_tensors
from causal_preflight.report import Finding, UnexaminableError, require

_UNKNOWN_CACHE = "the model takes a cache, but makes none, or in a form not known here"
_BESIDE = "{where} with the padding of other rows"


def _require_clean(ctx: Context) -> None:
    known = {"future", "cross_row", "documents", "padding", "context", "finite"}
    require(not ctx.explained & known, "another fault moves the logits already")


def order(ctx: Context) -> list[Finding]:
    """Rows in reverse order: the logits must follow their rows."""
    _require_clean(ctx)
    work, rows = ctx.work, len(ctx.work.ids)
    require(rows > 1, "needs a batch of two rows")
    move = ctx.compare(work, work.rows([*range(rows)][::-1]))
    if not move:
        return []
    ctx.explained.add("order")
    b = int((work.slot == move.slot).any(1).long().argmax())
    if not ctx.compare(work.rows([b]), work.rows([b] * rows)):
        # Neither its place nor the tokens of other rows (`cross_row`): what is left is their PAD.
        return [ctx.finding("pad", _BESIDE, "pad keys", move)]
    return [ctx.finding("position", "{where} when the rows change places", "axis", move)]


def alone(ctx: Context) -> list[Finding]:
    """A row in the batch, by itself, and by itself without its PAD: the same logits each time."""
    _require_clean(ctx)
    require("order" not in ctx.explained, "logits depend on the row already")
    work, pads = ctx.work, (~ctx.work.real).sum(1)
    counted = ctx.counted(work).any(1)
    require(counted.any(), NONE_COUNTS)
    for b in pads.argsort(descending=True, stable=True)[:2].tolist():
        if not counted[b]:
            continue
        if move := ctx.compare(work, work.rows([b])):
            return [ctx.finding("pad", _BESIDE, "pad keys", move)]
        if pads[b] and (move := ctx.compare(work, work.unpadded_row(b))):
            seen = f"{{where}} when its {int(pads[b])} PAD tokens are removed"
            return [ctx.finding("position", seen, "positions", move)]
    return []


def length(ctx: Context) -> list[Finding]:
    """The last token of the longest rows becomes PAD: no earlier logit may move.

    An embedding of the row's length moves. Without PAD in the batch, the row ends a column earlier.
    """
    _require_clean(ctx)
    known = {f.probe for f in ctx.report.findings} & {"extension", "order", "alone"}
    require(not known, "logits depend on padding or row already")
    work = ctx.work
    full = work.unpadded() if work.has_pad else work
    require(full.ids.shape[1] > 2, "needs rows of three tokens")
    short = full.cols(0, full.ids.shape[1] - 1)
    if work.has_pad:
        short = short.pad(1, work.pads_left, work)
    if move := ctx.compare(full, short):
        seen = "{where} when the last token of its row is taken away"
        return [ctx.finding("causal", seen, "row length", move)]
    return []


def packed(ctx: Context) -> list[Finding]:
    """A later document of a packed row gives the same logits as by itself; three are tried."""
    _require_clean(ctx)
    work, own = ctx.work, {"doc": ctx.work.doc, **ctx.work.raw}
    first = [span(row)[0] for row in work.real]
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
            return [ctx.finding("position", seen + "position {t}", "positions", move)]
    return []


def decoding(ctx: Context) -> list[Finding]:
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
    logits, row = partial(_logits, model, names, cache), ctx.work.unpadded_row(0).cols(0, 12)
    width = row.ids.shape[1]
    steps = [0, *range(width // 2, width + 1)]  # the first half in one pass
    ctx.model.sandbox.rewind(ctx.seed, False)
    with torch.no_grad():
        try:
            whole = logits(row.ids, [0, width])
        except (AttributeError, TypeError):
            raise UnexaminableError(_UNKNOWN_CACHE) from None
        stepped = logits(row.ids, steps)
        move = ctx.largest_move(row, stepped, whole, row.real, reshaped=True)
        if not move:
            return []
        t = int((row.slot[0] == move.slot).nonzero())
        before = (torch.arange(width) == t - 1).to(row.real)[None]
        reach = moved(logits(row.swap(before, ctx.seed).ids, steps), stepped)[0, t]
    seen = "decoding with the cache differs from one pass by {size} at position {t}"
    if float(reach) > 0.04 * ctx.bound(whole, row.real):
        return [ctx.finding("position", seen, "cache", move)]
    return [ctx.finding("causal", f"{seen}, and misses the token before it", "cache", move)]


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
