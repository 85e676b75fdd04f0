"""Probes of visibility: swap tokens, and see which counted logits move.

Differences of real runs, not gradients: a gradient is blind to routing, sorting and no_grad paths.
Each probe is a list of trials (where to swap, where nothing may move) under several settings: in
train mode, on a batch with no PAD in it, and on weights woken so that every path carries signal
(`Sandbox.woken`). Each setting catches leaks that the others miss.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from causal_lm.preflight.context import Context, moved
from causal_lm.preflight.frame import Frame, UnexaminableError
from causal_lm.preflight.report import Finding

MASK_REMEDY = (
    "mask keys j > i before the softmax (scaled_dot_product_attention: True = may attend; "
    "nn.Transformer: True = hidden), and let no norm, pooling or convolution look ahead"
)
ROWS_REMEDY = "no layer may mix rows: check batch_first, BatchNorm, and views that merge axes"
DOCS_REMEDY = "attend only where document_ids[i] == document_ids[j], or pack without documents"


@dataclass(frozen=True)
class _Setting:
    words: str
    frame: Frame
    train: bool
    woken: bool
    runs: int = 0


@dataclass(frozen=True)
class _Leak:
    setting: _Setting
    where: Tensor
    hit: tuple[float, int, int]


Trials = Callable[[Frame, int], Iterable[tuple[Tensor, Tensor]]]


def _leak(ctx: Context, settings: Iterable[_Setting], trials: Trials) -> _Leak | None:
    """The first trial under which something moves that may not."""
    for s in settings:
        with ctx.weights(s.woken):
            base = ctx.subject.look(s.frame, s.train).logits
            for where, watch in trials(s.frame, s.runs):
                new = ctx.subject.look(s.frame.swap(where, ctx.seed), s.train).logits
                hit = ctx.worst(new, base, watch)
                if hit:
                    return _Leak(s, where, hit)
    return None


def company(ctx: Context) -> list[Finding]:
    """Swap every token of every other row: the rows between them must not move."""
    several = len(ctx.work.ids) > 1
    work = ctx.work if several else ctx.work.rows([0, 0])
    counted = ctx.counted if several else ctx.counted[[0, 0]]
    odd = (torch.arange(len(work.ids), device=work.ids.device) % 2 == 1)[:, None]

    def trials(frame: Frame, runs: int) -> Iterator[tuple[Tensor, Tensor]]:
        for still in (odd, ~odd):
            yield ~still.expand_as(frame.real), counted & still

    modes = [_Setting("", work, False, False)]
    modes += [_Setting("in train mode, ", work, True, woken) for woken in (False, True)]
    leak = _leak(ctx, modes, trials)
    if leak is None:
        return []
    ctx.blamed.add("company")
    size, b, t = leak.hit
    seen = "the logits of row {row}, position {t} move by {size} with tokens of other rows"
    hit = size, b % len(ctx.rows), t
    return [ctx.finding("causal", "company", leak.setting.words + seen, ROWS_REMEDY, hit)]


def future(ctx: Context) -> list[Finding]:
    """No counted logit may move with a later token of its row.

    To try every pair (token j moves logit i < j) in few runs, all tokens from a cut on are swapped
    at once, with a cut of its own in each row: nothing before the cut may move.
    """
    if "company" in ctx.blamed:
        raise UnexaminableError("rows see each other, so the future cannot be told from company")
    rows, width = ctx.work.ids.shape
    if width < 2:
        raise UnexaminableError("needs rows of two tokens")

    def trials(frame: Frame, runs: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(runs):
            late = _late(frame, i, runs)
            yield late, ctx.counted & ~late

    runs = min(width - 1, max(6, min(12, 256 // width)))
    leak = _leak(ctx, _everything(ctx, runs), trials)
    if leak is not None:
        ctx.blamed.add("future")
        return [_trace(ctx, leak)]
    if runs < width - 1:
        ctx.report.sampled.append(f"future: {runs} of {width - 1} cuts in each of {rows} rows")
    return []


def _everything(ctx: Context, runs: int) -> Iterator[_Setting]:
    """From likely to unlikely."""
    few, work = max(2, runs // 3), ctx.work
    yield _Setting("", work, False, False, runs)
    yield _Setting("in train mode, ", work, True, False, few)
    yield _Setting("with woken weights, ", work, False, True, few)
    yield _Setting("with woken weights in train mode, ", work, True, True, few)
    if work.has_pad:
        try:
            filled = work.filled(ctx.seed)
        except UnexaminableError:
            return
        words = "with nothing padded, in train mode and with woken weights, "
        yield _Setting("with nothing padded, ", filled, False, False, few)
        yield _Setting(words, filled, True, True, few)


def _late(frame: Frame, i: int, runs: int) -> Tensor:
    """(R, T) bool: all from the i-th of `runs` cuts on; cuts are spread over the real tokens."""
    rows = len(frame.ids)
    late = torch.zeros_like(frame.real)
    for b in range(rows):
        at = frame.real[b].nonzero()[:, 0]
        if len(at) > 1:
            place = (i + (b + 1) / rows) / runs  # in (0, 1]: the last token alone comes last
            late[b, int(at[max(1, min(len(at) - 1, round(place * (len(at) - 1))))]) :] = True
    return late


def _trace(ctx: Context, leak: _Leak) -> Finding:
    """Which single token moved it? Halve the swapped part until one is left."""
    (_, b, t), s = leak.hit, leak.setting
    low, high = int(leak.where[b].long().argmax()), s.frame.ids.shape[1]
    with ctx.weights(s.woken):
        base = ctx.subject.look(s.frame, s.train).logits
        while high - low > 1:
            mid = (low + high) // 2
            part = torch.zeros_like(s.frame.real)
            part[b, low:mid] = True
            new = ctx.subject.look(s.frame.swap(part, ctx.seed), s.train).logits
            hit = float(moved(new, base)[b, t]) > ctx.bound(base, ctx.counted)
            low, high = (low, mid) if hit else (mid, high)
    seen = (
        s.words + "row {row}: the logits at position {t}, whose target counts, move by {size} when "
        f"later tokens are swapped, such as token {int(s.frame.ids[b, low])} at position "
        f"{low + ctx.first}"
    )
    return ctx.finding("causal", "future", seen, MASK_REMEDY, leak.hit)


def documents(ctx: Context) -> list[Finding]:
    """Packed rows: no counted logit may move with a token of another document.

    Documents are numbered in binary; for each bit, those with it are swapped and those without
    are watched, and the other way round, so that every pair of documents is tried.
    """
    doc = ctx.work.doc
    if int(doc.max()) < 1:
        raise UnexaminableError("one document a row (no document_ids)")
    if ctx.blamed & {"future", "company"}:
        raise UnexaminableError("a leak is known already")
    index = torch.zeros_like(doc)  # 0, 1, 2, ... by order of appearance in the row
    index[:, 1:] = (doc[:, 1:] != doc[:, :-1]).long().cumsum(1)

    def trials(frame: Frame, runs: int) -> Iterator[tuple[Tensor, Tensor]]:
        for bit in range(int(index.max()).bit_length()):
            for side in (0, 1):
                out = frame.real & (((index >> bit) & 1) == side)
                yield out, ctx.counted & ~out

    modes = [_Setting("", ctx.work, train, train) for train in (False, True)]
    leak = _leak(ctx, modes, trials)
    if leak is None:
        return []
    ctx.blamed.add("documents")
    _, b, t = leak.hit
    seen = "row {row}: the logits at position {t} " + f"(document {int(doc[b, t])}) "
    seen += "move by {size} with tokens of other documents in the row"
    return [ctx.finding("causal", "documents", seen, DOCS_REMEDY, leak.hit)]
