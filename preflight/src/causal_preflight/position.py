"""Probes of positions: the same content gives the same logits in any row, slot and padding."""

import inspect
from typing import Any

import torch
from torch import Tensor

from causal_preflight.audit_batch import UnexaminableError, require, span
from causal_preflight.context import NONE_COUNTS, Context, moved
from causal_preflight.locate import get, iter_tensors
from causal_preflight.report import Finding

_UNKNOWN_CACHE = "the model offers a cache, but takes it or its ids in a form not known here"
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
        if move := ctx.compare(work, work.unpadded_row(b)):
            seen = f"{{where}} once the row is freed of its {int(pads[b])} PAD"
            return [ctx.finding("position", seen, "positions", move)]
    return []


def packed(ctx: Context) -> list[Finding]:
    """A later document of a packed row gives the same logits as by itself; three are tried."""
    _require_clean(ctx)
    work, own = ctx.work, {"doc": ctx.work.doc, **ctx.work.raw}
    first = [span(row)[0] for row in work.real]
    later = [(b, d) for b, row in enumerate(work.doc) for d in row.unique().tolist()[-2:]]
    later = [(b, d) for b, d in later if d > int(work.doc[b, first[b]])]
    require(later, "one document a row (no document_ids)")
    for b, d in later[:3]:

        def as_first(name: str, v: Tensor, b: int = b) -> Tensor:
            """Numbered and placed like the first document of its row."""
            moves = name in ("position_ids", "document_ids", "doc")
            return v - v[:, :1] + own[name][b, first[b]] if moves else v

        by_itself = work.rows([b]).cols(*span(work.doc[b] == d)).each(as_first)
        if move := ctx.compare(work, by_itself):
            seen = f"row {{row}}: document {d} has other logits than by itself, by {{size}} at "
            return [ctx.finding("position", seen + "position {t}", "positions", move)]
    return []


def decoding(ctx: Context) -> list[Finding]:
    """Token by token with a cache, if the model takes one, must give the logits of one pass."""
    _require_clean(ctx)
    names = list(inspect.signature(ctx.model.module.forward).parameters)
    caches = [n for n in names if n.startswith("past") or (n != "use_cache" and "cache" in n)]
    require(caches, "the model's forward takes no cache")
    cache = "past_key_values" if "past_key_values" in caches else caches[0]
    keys = {"use_cache": True} if "use_cache" in names else {}
    row, model = ctx.work.unpadded_row(0).cols(0, 12), ctx.model.module
    ctx.model.sandbox.rewind(ctx.seed, False)
    with torch.no_grad():
        try:
            whole = _logits(model(row.ids))
        except (AttributeError, TypeError):
            raise UnexaminableError(_UNKNOWN_CACHE) from None
        stepped = _stepped(model, row.ids, cache, keys)
        move = ctx.largest_move(row, stepped, whole, row.real, reshaped=True)
        if not move:
            return []
        t = int((row.slot[0] == move.slot).nonzero())
        before = torch.zeros_like(row.real)
        before[:, t - 1] = True
        reach = moved(_stepped(model, row.swap(before, ctx.seed).ids, cache, keys), stepped)[0, t]
    seen = "decoding with the cache differs from one pass by {size} at position {t}"
    if float(reach) > 0.04 * ctx.bound(whole, row.real):
        return [ctx.finding("position", seen, "cache", move)]
    seen += ", and does not see the token just before it"
    return [ctx.finding("causal", seen, "cache", move)]


def _stepped(model: Any, ids: Tensor, cache: str, keys: dict[str, bool]) -> Tensor:
    """Logits (1, T, V): the first half in one pass, the rest token by token with the cache."""
    half = ids.shape[1] // 2
    out = model(ids[:, :half], **keys)
    steps = [_logits(out)]
    for one in ids[:, half:].split(1, 1):
        places = (get(out, (k,)) for k in (cache, "past_key_values", "cache", "presents", 1))
        kept = next((c for c in places if c is not None), None)
        require(kept is not None, _UNKNOWN_CACHE)
        out = model(one, **{cache: kept}, **keys)
        steps.append(_logits(out)[:, -1:])
    return torch.cat(steps, 1)


def _logits(out: Any) -> Tensor:
    hits = [t.float() for _, t in iter_tensors(out, 2) if t.ndim == 3 and t.is_floating_point()]
    require(hits, _UNKNOWN_CACHE)
    return hits[0]
