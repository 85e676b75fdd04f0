"""Probes of visibility: swap tokens, and see which counted logits move.

Differences of real runs, not gradients: a gradient is blind to routing, sorting and no_grad paths.
To try every pair (token j moves logit i < j) with few runs, all tokens from a cut on are swapped at
once, and each row has a cut of its own: nothing before the cut may move. The same is done in train
mode, on a batch with no PAD in it, and on weights woken so that every path carries signal
(`Sandbox.woken`): each catches leaks that the others miss.
"""

from collections.abc import Iterator
from contextlib import nullcontext

import torch
from torch import Tensor

from causal_lm.preflight.context import Context, moved
from causal_lm.preflight.frame import Frame, Unexaminable
from causal_lm.preflight.report import Finding

MASK_REMEDY = (
    "mask keys j > i before the softmax (scaled_dot_product_attention: True = may attend; "
    "nn.Transformer: True = hidden), and let no norm, pooling or convolution look ahead"
)
ROWS_REMEDY = "no layer may mix rows: check batch_first, BatchNorm, and views that merge axes"
DOCS_REMEDY = "attend only where document_ids[i] == document_ids[j], or pack without documents"


def _settings(ctx: Context, cuts: int) -> Iterator[tuple[str, Frame, bool, bool, int]]:
    """(words for the report, batch, train mode?, woken weights?, runs) from likely to unlikely."""
    few = max(2, cuts // 3)
    yield "", ctx.work, False, False, cuts
    yield "in train mode, ", ctx.work, True, False, few
    yield "with woken weights, ", ctx.work, False, True, max(2, cuts // 2)
    yield "with woken weights in train mode, ", ctx.work, True, True, few
    if ctx.work.has_pad:
        try:
            filled = ctx.work.filled(ctx.seed)
        except Unexaminable:
            return
        yield "with nothing padded, ", filled, False, False, few
        yield "with nothing padded, in train mode and with woken weights, ", filled, True, True, few


def _weights(ctx: Context, woken: bool):  # type: ignore[no-untyped-def]
    return ctx.subject.box.woken(ctx.seed) if woken else nullcontext()


def company(ctx: Context) -> list[Finding]:
    """Swap every token of every other row: the rows between them must not move."""
    work = ctx.work if len(ctx.work.ids) > 1 else ctx.work.rows([0, 0])
    counted = ctx.counted if len(ctx.work.ids) > 1 else ctx.counted[[0, 0]]
    odd = torch.arange(len(work.ids), device=work.ids.device)[:, None] % 2 == 1
    for train, woken in ((False, False), (True, False), (True, True)):
        with _weights(ctx, woken):
            base = ctx.subject.look(work, train).logits
            for still in (odd, ~odd):
                look = ctx.subject.look(work.swap(~still.expand_as(work.real), ctx.seed), train)
                watch = counted & still
                change = torch.where(watch, moved(look.logits, base), 0.0)
                if float(change.max()) > ctx.bound(base, watch):
                    ctx.blamed.add("company")
                    mode = "in train mode, " if train else ""
                    return [_row_finding(ctx, work, change, mode)]
    return []


def _row_finding(ctx: Context, work: Frame, change: Tensor, mode: str) -> Finding:
    b, t = divmod(int(change.argmax()), change.shape[1])
    row = ctx.rows[b % len(ctx.rows)]
    size = float(change.max())
    seen = (
        f"{mode}the logits of row {row}, position {t} move by {size:.3g} with tokens of other rows"
    )
    return Finding("causal", "company", seen, ROWS_REMEDY, size, row, t, int(work.ids[b, t]))


def future(ctx: Context) -> list[Finding]:
    """No counted logit may move with a later token of its row."""
    if "company" in ctx.blamed:
        raise Unexaminable("rows see each other, so the future cannot be told from company")
    rows, width = ctx.work.ids.shape
    if width < 2:
        raise Unexaminable("needs rows of two tokens")
    runs = min(8, -(-(width - 1) // rows))
    for words, frame, train, woken, count in _settings(ctx, runs):
        with _weights(ctx, woken):
            base = ctx.subject.look(frame, train).logits
            for i in range(count):
                cut = _cuts(frame, i, count)
                if cut is None:
                    break
                late = torch.arange(width, device=cut.device) >= cut[:, None]
                look = ctx.subject.look(frame.swap(late, ctx.seed + i), train)
                watch = ctx.counted & ~late
                change = torch.where(watch, moved(look.logits, base), 0.0)
                if float(change.max()) > ctx.bound(base, ctx.counted):
                    ctx.blamed.add("future")
                    return [_trace(ctx, frame, base, change, cut, train, words)]
    if runs * rows < width - 1:
        ctx.report.sampled.append(f"future: {runs * rows} of {width - 1} cuts in {rows} rows")
    return []


def _cuts(frame: Frame, i: int, count: int) -> Tensor | None:
    """(R,) the i-th cut of `count` in each row, spread over the real tokens of all rows."""
    rows = len(frame.ids)
    out = []
    for b in range(rows):
        at = frame.real[b].nonzero()[:, 0]
        if len(at) < 2:
            out.append(frame.ids.shape[1])  # nothing to cut
            continue
        place = (i + (b + 1) / rows) / count  # in (0, 1]: the last token alone comes last
        out.append(int(at[max(1, min(len(at) - 1, round(place * (len(at) - 1))))]))
    if all(c == frame.ids.shape[1] for c in out):
        return None
    return torch.tensor(out, device=frame.ids.device)


def _trace(
    ctx: Context, frame: Frame, base: Tensor, change: Tensor, cut: Tensor, train: bool, words: str
) -> Finding:
    """Which single token moved it? Halve the swapped part until one is left."""
    b, t = divmod(int(change.argmax()), change.shape[1])
    size, bound = float(change.max()), ctx.bound(base, ctx.counted)
    low, high = int(cut[b]), frame.ids.shape[1]
    while high - low > 1:
        mid = (low + high) // 2
        part = torch.zeros_like(frame.real)
        part[b, low:mid] = True
        look = ctx.subject.look(frame.swap(part, ctx.seed), train)
        seen = float(moved(look.logits, base)[b, t]) > bound
        low, high = (low, mid) if seen else (mid, high)
    row = ctx.rows[b]
    text = (
        f"{words}row {row}: the logits at position {t}, whose target counts, move by {size:.3g} "
        f"when later tokens are swapped, such as token {int(frame.ids[b, low])} at position {low}"
    )
    return Finding("causal", "future", text, MASK_REMEDY, size, row, t, int(frame.ids[b, low]))


def documents(ctx: Context) -> list[Finding]:
    """Packed rows: no counted logit may move with a token of another document.

    Documents are numbered in binary; for each bit, those with it are swapped and those without
    are watched, and the other way round, so that every pair of documents is tried.
    """
    work = ctx.work
    if int(work.doc.max()) < 1:
        raise Unexaminable("one document a row (no document_ids)")
    if ctx.blamed & {"future", "company"}:
        raise Unexaminable("a leak is known already")
    index = _ordinals(work.doc)
    for train, woken in ((False, False), (True, True)):
        with _weights(ctx, woken):
            base = ctx.subject.look(work, train).logits
            for bit in range(int(index.max()).bit_length()):
                for side in (0, 1):
                    out = work.real & (((index >> bit) & 1) == side)
                    look = ctx.subject.look(work.swap(out, ctx.seed), train)
                    change = torch.where(ctx.counted & ~out, moved(look.logits, base), 0.0)
                    if float(change.max()) > ctx.bound(base, ctx.counted):
                        ctx.blamed.add("documents")
                        return [_document_finding(ctx, change)]
    return []


def _ordinals(doc: Tensor) -> Tensor:
    """(R, T): 0, 1, 2, … by order of appearance in the row; PAD counts with its neighbour."""
    new = torch.zeros_like(doc)
    new[:, 1:] = (doc[:, 1:] != doc[:, :-1]).long()
    return new.cumsum(1)


def _document_finding(ctx: Context, change: Tensor) -> Finding:
    b, t = divmod(int(change.argmax()), change.shape[1])
    row, size, doc = ctx.rows[b], float(change.max()), int(ctx.work.doc[b, t])
    seen = (
        f"row {row}: the logits at position {t} (document {doc}) move by {size:.3g} with tokens of "
        "other documents in the row"
    )
    token = int(ctx.work.ids[b, t])
    return Finding("causal", "documents", seen, DOCS_REMEDY, size, row, t, token)
