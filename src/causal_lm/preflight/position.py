"""Probes of positions: the same content gives the same logits in any row, slot and padding."""

import inspect
from typing import Any

import torch
from torch import Tensor

from causal_lm.preflight.context import Context, moved
from causal_lm.preflight.frame import Frame, Unexaminable
from causal_lm.preflight.padding import KEY_REMEDY
from causal_lm.preflight.report import Finding

REMEDY = "count positions from the first real token of each document: 0, 1, 2, … in its own row"
_LEAKS = {"future", "company", "documents", "padding", "finite"}


def _need_clean(ctx: Context) -> None:
    if ctx.blamed & _LEAKS:
        raise Unexaminable("another fault moves the logits already")


def _worst(change: Tensor, where: Tensor) -> tuple[float, int, int]:
    change = torch.where(where, change, 0.0)
    b, t = divmod(int(change.argmax()), change.shape[1])
    return float(change.max()), b, t


def order(ctx: Context) -> list[Finding]:
    """Rows in reverse order: the logits must follow their rows."""
    _need_clean(ctx)
    rows = len(ctx.work.ids)
    if rows < 2:
        raise Unexaminable("needs a batch of two rows")
    base = ctx.base().logits
    back = ctx.subject.look(ctx.work.rows(list(range(rows))[::-1])).logits.flip(0)
    size, b, t = _worst(moved(back, base), ctx.counted)
    if size <= ctx.bound(base, ctx.counted, reshaped=True):
        return []
    ctx.blamed.add("order")
    row, token = ctx.rows[b], int(ctx.work.ids[b, t])
    copies = ctx.subject.look(ctx.work.rows([b] * rows)).logits
    if float(moved(copies, copies[:1].expand_as(copies))[:, ctx.counted[b]].max()) <= ctx.bound(
        base, ctx.counted, reshaped=True
    ):  # the row itself is not to blame, and the tokens beside it are not (`company`)
        return [_beside(row, t, token, size)]
    seen = f"the logits of row {row}, position {t} move by {size:.3g} when the rows change places"
    remedy = "index positions along time, not along the batch (check batch_first)"
    return [Finding("position", "order", seen, remedy, size, row, t, token)]


def _beside(row: int, t: int, token: int, size: float) -> Finding:
    seen = (
        f"the logits of row {row}, position {t} move by {size:.3g} with the padding of the rows "
        "beside it"
    )
    return Finding("pad", "order", seen, KEY_REMEDY, size, row, t, token)


def alone(ctx: Context) -> list[Finding]:
    """A row in company, by itself, and by itself without its PAD: three times the same logits."""
    _need_clean(ctx)
    if "order" in ctx.blamed:
        raise Unexaminable("logits depend on the row already")
    base, work = ctx.base().logits, ctx.work
    bound = ctx.bound(base, ctx.counted, reshaped=True)
    pads = (~work.real).sum(1)
    for b in sorted(range(len(work.ids)), key=lambda b: -int(pads[b]))[:2]:
        if not bool(ctx.counted[b].any()):
            continue
        single = work.rows([b])
        by_itself = ctx.subject.look(single).logits
        size, _, t = _worst(moved(by_itself, base[b : b + 1]), ctx.counted[b : b + 1])
        row, token = ctx.rows[b], int(work.ids[b, t])
        if size > bound:
            return [_beside(row, t, token, size)]
        at = work.real[b].nonzero()[:, 0]
        start, stop = int(at[0]), int(at[-1]) + 1
        if stop - start == work.ids.shape[1]:
            continue
        bare = _reset(single.cols(start, stop), start)
        change = moved(ctx.subject.look(bare).logits, by_itself[:, start:stop])
        size, _, t = _worst(change, ctx.counted[b : b + 1, start:stop])
        if size > bound:
            seen = (
                f"row {row}: the logits at position {t + start} move by {size:.3g} once the row is "
                f"freed of its {int(pads[b])} PAD"
            )
            token = int(work.ids[b, t + start])
            return [Finding("position", "alone", seen, REMEDY, size, row, t + start, token)]
    return []


def _reset(bare: Frame, start: int) -> Frame:
    """Positions that merely counted the slots (PAD included) begin anew; others are kept."""
    position = bare.batch.get("position_ids")
    if isinstance(position, Tensor) and start and int(position[0, 0]) == start:
        return bare.each(lambda k, v: v - start if k == "position_ids" else v)
    return bare


def packed(ctx: Context) -> list[Finding]:
    """A later document of a packed row gives the same logits as by itself."""
    _need_clean(ctx)
    work = ctx.work
    base = ctx.base().logits
    tried = 0
    for b in range(len(work.ids)):
        docs = sorted(d for d in set(work.doc[b].tolist()) if d >= 0)
        for d in docs[1:][-2:]:
            here = (work.doc[b] == d).nonzero()[:, 0]
            start, stop = int(here[0]), int(here[-1]) + 1
            counted = ctx.counted[b : b + 1, start:stop]
            if (
                stop - start < 2
                or not bool(counted.any())
                or stop - start != len(here)
                or tried > 2
            ):
                continue
            tried += 1
            look = ctx.subject.look(_single(work.rows([b]).cols(start, stop), work, b))
            size, _, t = _worst(moved(look.logits, base[b : b + 1, start:stop]), counted)
            if size > ctx.bound(base, ctx.counted, reshaped=True):
                row, token = ctx.rows[b], int(work.ids[b, start + t])
                seen = (
                    f"row {row}: document {d} at positions {start} to {stop - 1} has other logits "
                    f"than by itself, by {size:.3g} at position {start + t}"
                )
                return [Finding("position", "packed", seen, REMEDY, size, row, start + t, token)]
    if not tried:
        raise Unexaminable("one document a row (no document_ids)")
    return []


def _single(one: Frame, work: Frame, b: int) -> Frame:
    """A document cut out of its pack, numbered and placed as the first of a row."""
    first = int(work.real[b].nonzero()[0])

    def edit(name: str, v: Tensor) -> Tensor:
        if name == "position_ids":
            start: Tensor = work.batch["position_ids"][b, first]
            return v - v[:, :1] + start
        return v - v[:, :1] + work.doc[b, first].to(v) if name in ("document_ids", "doc") else v

    return one.each(edit)


def decoding(ctx: Context) -> list[Finding]:
    """Token by token with a cache, if the model offers one, must give the logits of one pass.

    A loss that feeds the rows piece by piece, and carries something from one piece to the next,
    must agree with one pass as well. Caches are tried in the form that transformers uses, or as the
    second of two outputs.
    """
    _need_clean(ctx)
    if ctx.base().pieces:
        return _piecewise(ctx)
    model = ctx.subject.model
    names = list(inspect.signature(model.forward).parameters)
    caches = [n for n in names if n.startswith("past") or (n != "use_cache" and "cache" in n)]
    if not caches:
        raise Unexaminable("the model's forward takes no cache")
    cache = "past_key_values" if "past_key_values" in caches else caches[0]
    at = ctx.work.real[0].nonzero()[:, 0]
    ids = ctx.work.ids[:1, int(at[0]) : int(at[-1]) + 1][:, :12]
    keys = {"use_cache": True} if "use_cache" in names else {}
    ctx.subject.box.rewind(ctx.seed, False)
    with torch.no_grad():
        whole = _logits(model(ids))
        stepped = _stepped(model, ids, cache, keys)
        everywhere = torch.ones_like(ids).bool()
        size, _, t = _worst(moved(stepped, whole), everywhere)
        bound = ctx.bound(whole, everywhere, reshaped=True)
        if size <= bound:
            return []
        pool = ctx.work.ordinary
        other = ids.clone()
        other[:, t - 1] = pool[0] if int(ids[0, t - 1]) != int(pool[0]) else pool[-1]
        reach = moved(_stepped(model, other, cache, keys), stepped)[0, t]
    row, token = ctx.rows[0], int(ids[0, t])
    seen = f"decoding with the cache differs from one pass by {size:.3g} at position {t}"
    if float(reach) <= 0.01 * bound:
        seen += ", and does not see the token just before it"
        return [Finding("causal", "decoding", seen, _OFFSET, size, row, t, token)]
    return [Finding("position", "decoding", seen, _OFFSET, size, row, t, token)]


def _stepped(model: Any, ids: Tensor, cache: str, keys: dict[str, bool]) -> Tensor:
    """Logits (1, T, V): the first half in one pass, the rest token by token with the cache."""
    half = ids.shape[1] // 2
    out = model(ids[:, :half], **keys)
    steps = [_logits(out)]
    for t in range(half, ids.shape[1]):
        out = model(ids[:, t : t + 1], **{cache: _cache(out, cache)}, **keys)
        steps.append(_logits(out)[:, -1:])
    return torch.cat(steps, 1)


_OFFSET = "offset positions and masks by the length of what is cached already"


def _piecewise(ctx: Context) -> list[Finding]:
    base, work = ctx.base().logits, ctx.work
    width = work.ids.shape[1]
    early = torch.zeros_like(work.real)
    early[:, : max(2, width // 4)] = True
    reach = moved(ctx.subject.look(work.swap(early, ctx.seed)).logits, base)
    if not bool((reach * ctx.counted)[:, width // 2 :].any()):
        raise Unexaminable("the pieces of a row carry nothing to each other")
    ctx.subject.box.rewind(ctx.seed, False)
    with torch.no_grad():
        whole = _logits(ctx.subject.model(work.ids))
    size, b, t = _worst(moved(base[:, : whole.shape[1]], whole), ctx.counted)
    if size <= ctx.bound(base, ctx.counted, reshaped=True):
        return []
    row = ctx.rows[b]
    seen = f"row {row}: fed piece by piece, the logits at position {t} differ by {size:.3g}"
    return [Finding("position", "decoding", seen, _OFFSET, size, row, t, int(work.ids[b, t]))]


def _logits(out: Any) -> Tensor:
    hit = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if hit is None and isinstance(out, (dict, tuple)):
        hit = out.get("logits") if isinstance(out, dict) else out[0]
    if isinstance(hit, Tensor) and hit.ndim == 3:
        return hit.float()
    raise Unexaminable("the model offers a cache, but not in a form known here")


def _cache(out: Any, name: str) -> Any:
    for key in (name, "past_key_values", "cache", "present", "presents"):
        hit = out.get(key) if isinstance(out, dict) else getattr(out, key, None)
        if hit is not None:
            return hit
    if isinstance(out, tuple) and len(out) == 2:
        return out[1]
    raise Unexaminable("the model offers a cache, but not in a form known here")
