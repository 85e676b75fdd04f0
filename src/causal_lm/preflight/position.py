"""Probes of positions: the same content gives the same logits in any row, slot and padding."""

import inspect
from typing import Any

import torch
from torch import Tensor

from causal_lm.preflight.context import Context, moved
from causal_lm.preflight.frame import Frame, UnexaminableError
from causal_lm.preflight.padding import KEY_REMEDY
from causal_lm.preflight.report import Finding

REMEDY = "count positions from the first real token of each document: 0, 1, 2, ... in its own row"
_OFFSET = "offset positions and masks by the length of what is cached already"
_FORM = "the model offers a cache, but not in a form known here"
_BESIDE = "the logits of row {row}, position {t} move by {size} with the padding of other rows"


def _need_clean(ctx: Context) -> None:
    leaks = {"future", "company", "documents", "padding", "past", "finite"}
    if ctx.blamed & leaks:
        raise UnexaminableError("another fault moves the logits already")


def order(ctx: Context) -> list[Finding]:
    """Rows in reverse order: the logits must follow their rows."""
    _need_clean(ctx)
    rows = len(ctx.work.ids)
    if rows < 2:
        raise UnexaminableError("needs a batch of two rows")
    back = ctx.subject.look(ctx.work.rows(list(range(rows))[::-1])).logits.flip(0)
    hit = ctx.worst(back, ctx.base.logits, ctx.counted, reshaped=True)
    if not hit:
        return []
    ctx.blamed.add("order")
    b = hit[1]
    copies = ctx.subject.look(ctx.work.rows([b] * rows)).logits
    counted = ctx.counted[[b] * rows]
    if not ctx.worst(copies, copies[:1].expand_as(copies), counted, reshaped=True):
        # the row itself is not to blame, and the tokens beside it are not (`company`)
        return [ctx.finding("pad", "order", _BESIDE, KEY_REMEDY, hit)]
    seen = "the logits of row {row}, position {t} move by {size} when the rows change places"
    remedy = "index positions along time, not along the batch (check batch_first)"
    return [ctx.finding("position", "order", seen, remedy, hit)]


def alone(ctx: Context) -> list[Finding]:
    """A row in company, by itself, and by itself without its PAD: three times the same logits."""
    _need_clean(ctx)
    if "order" in ctx.blamed:
        raise UnexaminableError("logits depend on the row already")
    work, pads = ctx.work, (~ctx.work.real).sum(1)
    for b in pads.argsort(descending=True, stable=True)[:2].tolist():
        counted = ctx.counted[b : b + 1]
        if not bool(counted.any()):
            continue
        single = ctx.subject.look(work.rows([b])).logits
        hit = ctx.worst(single, ctx.base.logits[b : b + 1], counted, reshaped=True)
        if hit:
            return [ctx.finding("pad", "alone", _BESIDE, KEY_REMEDY, (hit[0], b, hit[2]))]
        at = work.real[b].nonzero()[:, 0]
        start, stop = int(at[0]), int(at[-1]) + 1
        look = ctx.subject.look(work.bare(b))
        watch = counted[:, start:stop] & look.seen
        hit = ctx.worst(look.logits, single[:, start:stop], watch, reshaped=True)
        if hit:
            seen = "row {row}: the logits at position {t} move by {size} once the row is "
            seen += f"freed of its {int(pads[b])} PAD"
            hit = hit[0], b, start + hit[2]
            return [ctx.finding("position", "alone", seen, REMEDY, hit)]
    return []


def packed(ctx: Context) -> list[Finding]:
    """A later document of a packed row gives the same logits as by itself; three are tried."""
    _need_clean(ctx)
    work, tried = ctx.work, 0
    for b in range(len(work.ids)):
        for d in sorted(set(work.doc[b].tolist()) - {-1})[1:][-2:]:
            at = (work.doc[b] == d).nonzero()[:, 0]
            start, stop = int(at[0]), int(at[-1]) + 1
            counted = ctx.counted[b : b + 1, start:stop]
            if not 1 < len(at) == stop - start or not bool(counted.any()) or tried > 2:
                continue
            tried += 1
            look = ctx.subject.look(_single(work.rows([b]).cols(start, stop), work, b))
            here = ctx.base.logits[b : b + 1, start:stop]
            hit = ctx.worst(look.logits, here, counted & look.seen, reshaped=True)
            if hit:
                seen = f"row {{row}}: document {d} has other logits than by itself, by {{size}} at "
                seen += "position {t}"
                hit = hit[0], b, start + hit[2]
                return [ctx.finding("position", "packed", seen, REMEDY, hit)]
    if not tried:
        raise UnexaminableError("one document a row (no document_ids)")
    return []


def _single(one: Frame, work: Frame, b: int) -> Frame:
    """A document cut out of its pack, numbered and placed as the first of a row."""
    first = int(work.real[b].nonzero()[0])

    def edit(name: str, v: Tensor) -> Tensor:
        if name == "position_ids":
            given: Tensor = work.batch[name]
            return v - v[:, :1] + given[b, first]
        return v - v[:, :1] + work.doc[b, first].to(v) if name in ("document_ids", "doc") else v

    return one.each(edit)


def decoding(ctx: Context) -> list[Finding]:
    """Token by token with a cache, if the model offers one, must give the logits of one pass.

    Caches are tried in the form that transformers uses, or as the second of two outputs.
    """
    _need_clean(ctx)
    names = list(inspect.signature(ctx.subject.model.forward).parameters)
    caches = [n for n in names if n.startswith("past") or (n != "use_cache" and "cache" in n)]
    if not caches:
        raise UnexaminableError("the model's forward takes no cache")
    cache = "past_key_values" if "past_key_values" in caches else caches[0]
    keys = {"use_cache": True} if "use_cache" in names else {}
    ids = ctx.work.ids[:1, ctx.work.real[0]][:, :12]
    start = int(ctx.work.real[0].long().argmax())
    ctx.subject.box.rewind(ctx.seed, False)
    with torch.no_grad():
        whole = _logits(ctx.subject.model(ids))
        stepped = _stepped(ctx.subject.model, ids, cache, keys)
        everywhere = torch.ones_like(ids).bool()
        hit = ctx.worst(stepped, whole, everywhere, reshaped=True)
        if not hit:
            return []
        t, pool = hit[2], ctx.work.ordinary
        other = ids.clone()
        other[:, t - 1] = pool[0] if int(ids[0, t - 1]) != int(pool[0]) else pool[-1]
        reach = moved(_stepped(ctx.subject.model, other, cache, keys), stepped)[0, t]
    seen, label = (
        "decoding with the cache differs from one pass by {size} at position {t}",
        "causal",
    )
    if float(reach) <= 0.01 * ctx.bound(whole, everywhere, reshaped=True):
        seen += ", and does not see the token just before it"
    else:
        label = "position"
    return [ctx.finding(label, "decoding", seen, _OFFSET, (hit[0], 0, start + t))]


def _stepped(model: Any, ids: Tensor, cache: str, keys: dict[str, bool]) -> Tensor:
    """Logits (1, T, V): the first half in one pass, the rest token by token with the cache."""
    half = ids.shape[1] // 2
    out = model(ids[:, :half], **keys)
    steps = [_logits(out)]
    for t in range(half, ids.shape[1]):
        out = model(ids[:, t : t + 1], **{cache: _cache(out, cache)}, **keys)
        steps.append(_logits(out)[:, -1:])
    return torch.cat(steps, 1)


def _logits(out: Any) -> Tensor:
    options = (out, *(out.values() if isinstance(out, dict) else ()))
    options += out[:1] if isinstance(out, tuple) else (getattr(out, "logits", None),)
    for hit in options:
        if isinstance(hit, Tensor) and hit.ndim == 3:
            return hit.float()
    raise UnexaminableError(_FORM)


def _cache(out: Any, name: str) -> Any:
    for key in (name, "past_key_values", "cache", "present", "presents"):
        hit = out.get(key) if isinstance(out, dict) else getattr(out, key, None)
        if hit is not None:
            return hit
    if isinstance(out, tuple) and len(out) == 2:
        return out[1]
    raise UnexaminableError(_FORM)
