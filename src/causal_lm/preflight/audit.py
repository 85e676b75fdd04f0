"""The audit itself: understand the batch, find the logits, run every probe, leave no trace."""

import time
from typing import Any

from torch import nn

from causal_lm.preflight import flow, fused, norm, padding, past, pictures, position, readout
from causal_lm.preflight.context import Context, Probe
from causal_lm.preflight.frame import Frame, UnexaminableError
from causal_lm.preflight.report import Report
from causal_lm.preflight.state import Sandbox
from causal_lm.preflight.subject import LossFn, Subject
from causal_lm.preflight.understand import understand

_ROWS = 4  # rows that the flow probes run on
_COLS = 512  # columns, likewise
_SLOTS = 2**27  # logits of the whole batch that are read in one go

# In this order: what an earlier probe has explained, a later one does not report again.
PROBES: tuple[Probe, ...] = (
    padding.finite,
    readout.alignment,
    readout.ending,
    norm.reduction,
    norm.emptied,
    flow.company,
    flow.future,
    flow.documents,
    past.past,
    padding.embedding,
    padding.extension,
    position.order,
    position.alone,
    position.packed,
    position.decoding,
    pictures.pictures,
)


def preflight(
    model: nn.Module,
    batch: dict[str, Any],
    loss_fn: LossFn | None = None,
    *,
    pad_id: int | None = None,
    eos_id: int | None = None,
    seed: int = 0,
) -> Report:
    """Prove the alignments of a causal language model by behaviour.

    Args:
        model: any module; it may return a tensor, a tuple, a dict or an object with `.logits`.
        batch: `input_ids` (B, T) and, where there are any, `attention_mask` (1 = real), `labels`
            (not shifted, -100 = ignore), `position_ids`, `document_ids` (-1 at PAD), each (B, T).
        loss_fn: `loss_fn(model, batch)` -> scalar training loss; may call the model several times.
            Without it, `model(**batch).loss`.
        pad_id: the id of PAD; told from the batch where it can be.
        eos_id: the id that ends a document.
        seed: of the swapped tokens and of the dropout in train mode.

    Returns:
        A `Report`; `report.faults` is a set of "shift", "pad", "causal", "norm", "eos", "position".

    Raises:
        ValueError: the batch cannot be audited, or the model raises on it as it stands.

    Parameters, buffers, gradients, modes and random state are left exactly as they were.
    """
    started = time.perf_counter()
    frame = understand(batch, pad_id, eos_id)
    _check_range(model, frame)
    report = Report()
    box = Sandbox(model)
    subject = Subject(model, loss_fn, box, seed)
    try:
        full = _sampled(frame, report)
        part, rows, first = _working_part(full, report)
        ctx = Context(subject, full, part, rows, seed, report, first)
        _start(ctx)
        probes = PROBES if subject.site is not None else (fused.labels,)
        if subject.site is None:
            report.skipped["logits"] = "no logits between model and loss (fused?): labels perturbed"
        for probe in probes:
            _run(probe, ctx)
        if "lag" in ctx.blamed:  # inputs shifted inside the model: offset 0 is the right one
            report.findings[:] = [f for f in report.findings if f.label != "shift"]
            report.passed.append("alignment")
    finally:
        box.restore()
    report.forwards, report.seconds = subject.forwards, time.perf_counter() - started
    return report


def _start(ctx: Context) -> None:
    """Find the logits, on a few rows; on all of them where the loss insists on its batch."""
    subject, part = ctx.subject, ctx.work
    try:
        try:
            subject.discover(part)
        except Exception:
            if part is ctx.full:
                raise
            ctx.work, ctx.rows, ctx.first = ctx.full, list(range(len(ctx.full.ids))), 0
            ctx.report.sampled.clear()
            subject.discover(ctx.full)
    except Exception as problem:
        why = f"{type(problem).__name__}: {problem}".splitlines()[0]
        if isinstance(problem, IndexError):
            why += f" (ids reach {int(ctx.full.ids.max())}: is the embedding large enough?)"
        raise ValueError(f"the loss could not be computed on the plain batch: {why}") from problem
    try:
        if subject.site is not None:
            ctx.readout(True)
    except RuntimeError:  # logits of slots that cannot be told: as good as none
        subject.site = None


def _run(probe: Probe, ctx: Context) -> None:
    name = getattr(probe, "__name__", str(probe))
    try:
        found = probe(ctx)
    except Exception as problem:  # a probe must never take the audit down
        why = (str(problem).splitlines() or [""])[0]
        why = why if isinstance(problem, UnexaminableError) else f"{type(problem).__name__}: {why}"
        ctx.report.skipped[name] = why[:200]
        return
    if found:
        ctx.report.findings.extend(found)
        if name == "alignment":  # then the weights say nothing more
            ctx.blamed.update({"pad": "pad target", "shift": "shift"}[f.label] for f in found)
    elif name != "pictures":
        ctx.report.passed.append(name)


def _check_range(model: nn.Module, frame: Frame) -> None:
    """Ids beyond the embedding crash late and, on a GPU, without a word."""
    sizes = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    top = int(frame.ids.max())
    if sizes and top >= max(sizes):
        raise ValueError(
            f"input_ids hold id {top}, but the largest embedding has {max(sizes)} rows: "
            "enlarge the embedding or check the tokenizer"
        )


def _sampled(frame: Frame, report: Report) -> Frame:
    rows, width = frame.ids.shape
    most = max(2, _SLOTS // max(1, width * (int(frame.ids.max()) + 1)))
    if rows <= most:
        return frame
    report.sampled.append(f"loss: the first {most} of {rows} rows")
    return frame.rows(list(range(most)))


def _working_part(frame: Frame, report: Report) -> tuple[Frame, list[int], int]:
    """A few rows that differ: the longest, the shortest, and those between."""
    rows, width = frame.ids.shape
    index = list(range(rows))
    if rows > _ROWS:
        by_length = sorted(index, key=lambda b: (int(frame.real[b].sum()), b))
        index = [by_length[round(i * (rows - 1) / (_ROWS - 1))] for i in range(_ROWS)]
        report.sampled.append(f"flow: rows {', '.join(map(str, index))} of {rows}")
    part = frame.rows(index) if rows > _ROWS else frame
    start = 0
    if width > _COLS:
        start = width - _COLS if bool(frame.left.any()) else 0
        part = part.cols(start, start + _COLS)
        report.sampled.append(f"flow: columns {start} to {start + _COLS - 1} of {width}")
    return part, index, start
