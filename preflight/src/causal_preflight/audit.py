"""The audit itself: parse the batch, find the logits, run every probe, restore the model."""

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from causal_preflight import heads, invariance, reduction, targets, visibility
from causal_preflight.batch import IGNORE, AuditBatch
from causal_preflight.context import Context, Probe, moved
from causal_preflight.instrumented_model import InstrumentedModel, LossFn
from causal_preflight.parse_batch import named_tensors, parse_batch
from causal_preflight.report import Report
from causal_preflight.sandbox import Sandbox, preserved_random_states

_ROWS = 4  # rows that the probes of logits run on
_COLS = 512  # columns, likewise
_SHOWN = 48  # columns of the table of targets, of as many rows
_WINDOW = 16  # tokens a side of the map of visibility
_MAX_LOGITS = 2**27  # logits of the whole batch that are read in one go

# In this order: what an earlier probe has explained, a later one does not report again.
PROBES: tuple[Probe, ...] = (
    invariance.finite, targets.soft, targets.alignment, targets.dropped, targets.ending,
    reduction.reduction, reduction.emptied,
    visibility.cross_row, visibility.future, visibility.documents, visibility.context,
    heads.further_heads, invariance.embedding, invariance.extension, invariance.order,
    invariance.alone, invariance.length, invariance.packed, invariance.decoding,
)  # fmt: skip


def preflight(
    model: nn.Module, batch: Any, loss_fn: LossFn | None = None, *, pad_id: int | None = None,
    eos_id: int | None = None, seed: int = 0, input_key: str = "input_ids",
    labels_key: str = "labels", parted: bool = False,
) -> Report:  # fmt: skip
    """Check label shift, PAD handling, causal mask, reduction, EOS and positions by behavior.

    Args:
        model: any module; it may return a tensor, a tuple, a dict or an object with `.logits`.
        batch: `input_ids` (B, T) and, where there are any, `attention_mask` (1 = real), `labels`
            (not shifted, -100 = ignore), `position_ids`, `document_ids` (-1 at PAD), each (B, T).
            A dict, named tuple or dataclass of these; a tuple (ids, labels, ...), whose labels may
            be shifted already; or the ids alone.
        loss_fn: `loss_fn(model, batch)` -> scalar training loss; may call the model several times.
            Without it, `model(**batch).loss`.
        pad_id, eos_id: ids of PAD and of the end of a document; PAD is inferred where it can be.
        seed: of the swapped tokens and of the dropout in train mode.
        input_key, labels_key: the keys of ids and labels in `batch`, where they have other names.
        parted: call `loss_fn(model, half, half)` on the rows in two halves, as on micro-batches.

    Returns:
        A `Report`; the model and the random states are left exactly as they were.

    Raises:
        ValueError: the batch cannot be audited, or the model raises on it as it stands.
    """
    if parted and loss_fn is None:
        raise ValueError("parted=True needs a loss_fn, which is called with two halves")
    started = time.perf_counter()
    raw, rebuild = named_tensors(batch, input_key, labels_key)
    report = Report()
    full, work = _sampled(parse_batch(raw, pad_id, eos_id), report)
    instrumented = InstrumentedModel(model, loss_fn, Sandbox(model), seed, rebuild, parted)
    ctx = Context(instrumented, full, work, seed, report)
    # Hooks and new shapes would compile it anew each time.
    dynamo = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if dynamo else nullcontext()
    if any(hasattr(m, "_orig_mod") or m._compiled_call_impl for m in model.modules()):
        report.sampled.append("model: it was run without torch.compile")
    with preserved_random_states(), eager:
        try:
            _find_logits(ctx)
            for probe in PROBES if instrumented.heads else ():
                report.examine(probe.__name__, partial(probe, ctx))
            with suppress(Exception):  # without logits, or of rows too short
                report.pictures = {"alignment": _alignment(ctx), "visibility": _visibility(ctx)}
        finally:
            instrumented.sandbox.restore()
    if "shifted inputs" in ctx.explained:  # shifted inside the model: offset 0 is the right one
        report.findings[:] = [f for f in report.findings if f.label != "shift"]
        report.passed.append("alignment")
    if parted and len(full.ids) == 1:
        report.skipped["micro-batches"] = "the batch has one row, so it cannot be split in two"
    report.forwards, report.seconds = instrumented.forwards, time.perf_counter() - started
    return report


def audit_batch(model: nn.Module, batch: Any, loss: Callable[..., Any], **options: Any) -> Report:
    """`preflight` with the scalar `loss(batch)`, or `loss(half, half)` if `parted`."""
    keys = {k: options[k] for k in ("input_key", "labels_key") if k in options}
    labels = named_tensors(batch, **keys)[0].get("labels")
    if isinstance(labels, Tensor) and bool((labels == IGNORE).all()):
        return Report(skipped={"preflight": targets.NO_TARGET})
    return preflight(model, batch, lambda _, *parts: loss(*parts), **options)


def _find_logits(ctx: Context) -> None:
    """Find the logits on a few rows, or on all of them where the loss fails on a few."""
    model = ctx.model
    for part in (ctx.work, ctx.full):
        try:
            model.discover(part, int(ctx.full.ids.max()))
            break
        except Exception as raised:
            problem, ctx.work = raised, ctx.full
    else:
        why = f"{type(problem).__name__}: {problem}".splitlines()[0]
        raise ValueError(f"the loss could not be computed on the plain batch: {why}") from problem
    limit = heads.arrange(ctx)
    fused = heads.rebuild(ctx, limit) if limit else None
    if fused is not None:
        ctx.report.skipped.pop("logits", None)
        ctx.report.remarks[:] = ["the loss is fused: logits are rebuilt of hidden states and head"]
        ctx.explained |= {"inexact weights"} if fused > heads.FITS else set()
        heads.arrange(ctx)
    elif not model.heads:
        why = "the loss shows neither logits, nor hidden states and a head"
        ctx.report.skipped.setdefault("logits", why)


def _sampled(batch: AuditBatch, report: Report) -> tuple[AuditBatch, AuditBatch]:
    """The batch for reading targets, and a smaller one of unlike rows for comparing logits."""
    rows, width = batch.ids.shape
    most = max(2, _MAX_LOGITS // max(1, width * (int(batch.ids.max()) + 1)))
    if rows > most and not batch.stale:
        report.sampled.append(f"loss: the first {most} of {rows} rows")
        batch, rows = batch.rows(list(range(most))), most
    part = batch
    if rows > _ROWS and not batch.stale:
        by_length = batch.real.sum(1).argsort(stable=True).tolist()
        index = [by_length[round(i * (rows - 1) / (_ROWS - 1))] for i in range(_ROWS)]
        part = batch.rows(index)
        report.sampled.append(f"visibility: rows {', '.join(map(str, index))} of {rows}")
    if width > _COLS and not batch.stale:
        start = width - _COLS if bool(batch.left_pad.any()) else 0
        part = part.cols(start, start + _COLS)
        report.sampled.append(f"visibility: columns {start} to {start + _COLS - 1} of {width}")
    return batch, part


def _alignment(ctx: Context) -> list[list[dict[str, Any]]]:
    """Input, target and weight of the first positions of the first rows."""
    r, batch = ctx.readout(True), ctx.full
    rows, width = batch.ids.shape

    def cell(b: int, t: int) -> dict[str, Any]:
        counts = bool(r.trained[b, t])
        return {
            "input": int(batch.ids[b, t]), "real": bool(batch.real[b, t]),
            "target": int(r.target[b, t]) if counts else None,
            "next": int(batch.ids[b, t + 1]) if batch.has_target[b, t] else None,
            "weight": float(r.weight[b, t]) if counts else 0.0,
        }  # fmt: skip

    return [[cell(b, t) for t in range(min(_SHOWN, width))] for b in range(min(_ROWS, rows))]


def _visibility(ctx: Context) -> dict[str, Any]:
    """How far logit i moves with token j, as a fraction of the largest move: cell (i, j).

    Copies of the longest row, each with one token swapped, in a single run.
    """
    row = ctx.work.unpadded().rows([0]).cols(0, _WINDOW)
    n = row.ids.shape[1]
    one = torch.eye(n + 1, dtype=torch.bool, device=row.ids.device)[:, :n]
    edited = row.rows([0] * (n + 1)).swap(one, ctx.seed)
    with ctx.weights(True):
        logits = ctx.model.observe(edited).logits
    effect = moved(logits[:n], logits[n:].expand(n, -1, -1)).T
    top = effect[torch.isfinite(effect)].max().clamp_min(1e-12)
    b, start = divmod(int(row.slot[0, 0]), ctx.full.ids.shape[1])
    where = {"row": b, "start": start, "tokens": row.ids[0].tolist(), "doc": row.doc[0].tolist(),
             "swapped": (edited.ids[:n] != row.ids).diagonal().tolist()}  # fmt: skip
    return {**where, "cells": torch.nan_to_num(effect / top, posinf=1.0).tolist()}
