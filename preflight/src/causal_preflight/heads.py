"""Several heads: what each is trained on, which is the main one, and probes of the others.

A head of multi-token prediction (arXiv:2404.19737, arXiv:2412.19437) is trained on token t + k.
With its logits placed k - 1 columns later, the rules for the next token hold for it as well.
"""

from contextlib import suppress
from dataclasses import replace
from typing import Any

from causal_preflight import invariance, targets, visibility
from causal_preflight.context import Context, Probe
from causal_preflight.gradient_fit import Readout
from causal_preflight.locate import Head
from causal_preflight.report import REMEDIES, Finding, Report, UnexaminableError, require

FITS, _UNFIT = 0.05, 0.4  # residuals below which logits, or hidden states, are those of the loss
_TRIED = 6  # hidden states that are tried, the last ones first
_SURE = 0.01  # residual below which no others are tried
_SIGHT = (
    visibility.cross_row, visibility.future, visibility.documents,
    invariance.embedding, invariance.extension,
)  # fmt: skip


def arrange(ctx: Context) -> float:
    """Read every head once, and look at the main one: the next token, the largest weight.

    The heads must have the offsets 1, 2, 3, ..., each once. Heads before the main one, or all of
    them, may repeat its offset (deep supervision). Over a frozen model the offsets may begin at 2
    (Medusa, arXiv:2401.10774). A head of another
    offset stays where it is, and `alignment` reports it.

    Returns:
        The residual below which logits rebuilt of a fused loss replace those found; 0: these fit.
    """
    model, read, why = ctx.model, list[tuple[Head, Readout, int | None]](), ""
    for head in model.heads:
        number, model.count = 0, 1
        while number < model.count:
            model.head = head._replace(number=number)
            try:
                r = model.readout(ctx.full, True)
                read.append((model.head, r, targets.offset_of(ctx.full, r, 8)))
            except UnexaminableError:  # as for a classifier of rows
                pass
            except Exception as problem:
                why = f"{type(problem).__name__}: {problem}".splitlines()[0]
            number += 1
    if not read:
        ctx.report.skipped |= {"logits": why} if why else {}
        model.heads = []
        return _UNFIT
    read = [hit for hit in read if bool(hit[1].trained.any())] or read[-1:]
    known = {k for _, _, k in read}
    first = 2 if model.frozen and {2, 3} <= known and 1 not in known else 1
    last = next(k for k in range(first, len(read) + 3) if k not in known) - 1
    rank = [(k == first, k is not None, round(float(r.weight.abs().sum()), 4)) for _, r, k in read]
    main = max(range(len(read)), key=lambda i: (rank[i], i if last > first else -i))
    heads, taken = list[Head](), set[int]()
    for i in (main, *(i for i in range(len(read)) if i != main and rank[i][1])):
        head, r, k = read[i][0], read[i][1], read[i][2] or 0
        again = k in taken and last > first and not (k == first and i < main)
        ahead = k - 1 + again if first <= k <= last else 0
        leaves_row = bool(r.trained[:, r.trained.shape[1] - ahead :].any())
        heads.append(head._replace(ahead=0 if leaves_row else ahead))
        taken.add(k)
    if len(heads) < len(read):
        ctx.report.remarks.append(f"heads: {len(heads)} of {len(read)} are trained on next tokens")
    model.heads, model.head = heads, heads[0]
    r = read[main][1]
    ctx._readouts = {} if model.head.ahead else {True: r}
    if not bool(r.trained.any()):
        return _UNFIT
    # Gradients of soft targets sum to 0 at each position.
    soft = bool((r.grad_sum.abs() <= 1e-3 * r.max_abs_grad).all())
    return 0.0 if r.residual <= FITS else 0.01 if soft else min(_UNFIT, r.residual / 2)


def rebuild(ctx: Context, limit: float) -> float | None:
    """Make the logits visible that a fused loss keeps to itself (Liger, cut-cross-entropy).

    Any matrix with more rows than the largest id may be the head, any output the hidden states.
    Returns the residual of the best fit, None if it is above `limit`.
    """
    model, found, modules = ctx.model, None, ctx.model.sandbox.modules
    own = [(p, m) for m in reversed(modules) for p in m.parameters(recurse=False) if p.ndim == 2]
    for states, width in model.outputs[: -_TRIED - 1 : -1]:
        for weight, m in ((w, m) for p, m in own for w in (p, p.T)):
            fits = weight.shape[1] == width and len(weight) > int(ctx.work.ids.max())
            if limit < _SURE or not fits:
                continue
            bias: Any = getattr(m, "bias", None) if weight.is_leaf else None
            model.head = states._replace(weight=weight, bias=bias)
            with suppress(Exception):  # of a loss that is given what it is not made for
                r = model.readout(ctx.work, True)
                if r.residual < limit and bool(r.trained.any()):
                    limit, found = r.residual, model.head._replace(accepted=True)
    model.heads = [found] if found else model.heads
    if model.heads:
        model.head = model.heads[0]
    return limit if found else None


def further_heads(ctx: Context) -> list[Finding]:
    """A further head must be trained on its own offset, and see nothing beyond its own place."""
    model, found = ctx.model, dict[str, Finding]()
    main, *further = model.heads
    require(further, "there is one head")
    try:
        for number, head in enumerate(further, 2):
            # What another fault moves already is not examined again.
            sight = () if ctx.explained or found else _SIGHT
            seen = _examine(ctx, head, targets.alignment, *sight)
            same = [h for h in model.heads if h.ahead == head.ahead]
            if [f.label for f in seen] == ["causal"] and len(same) > 1:
                # One that reads a few coming tokens, and no more, has the targets of another one.
                far = head._replace(ahead=head.ahead + len(further))
                if not _examine(ctx, far, visibility.future):
                    seen = [replace(seen[0], label="shift", remedy=REMEDIES["heads"])]
            found |= {f.label: replace(f, seen=f"head {number}: {f.seen}") for f in seen}
    finally:
        model.head, model.always_train = main, False
    ctx.explained |= {"pad target" if label == "pad" else label for label in found}
    return list(found.values())


def _examine(ctx: Context, head: Head, *probes: Probe) -> list[Finding]:
    """What the first of the probes that finds anything in this head finds."""
    model = ctx.model
    model.head, model.always_train = head, False
    own = replace(ctx, report=Report(), explained=set(), _readouts={}, _observed={})
    try:
        own.observe(ctx.work)
    except UnexaminableError:  # made in training only
        model.always_train = True
    for probe in probes:
        if model.always_train and probe is invariance.extension:
            continue  # it compares runs of two shapes, which differ in dropout
        with suppress(UnexaminableError):
            if seen := list(probe(own)):
                return seen
    return []
