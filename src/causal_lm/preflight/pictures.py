"""Data for the page: alignment, weights and the visibility map of a short stretch of one row."""

import torch

from causal_lm.preflight.context import Context, moved, trained
from causal_lm.preflight.report import Finding

_WINDOW = 16  # tokens a side of the map


def pictures(ctx: Context) -> list[Finding]:
    """Fills `Report.pictures`; finds nothing by itself.

    The map: copies of one row, each with one token swapped, in a single run. Cell (i, j) is how far
    logit i moves with token j, as a share of the largest move.
    """
    r, frame = ctx.readout(True), ctx.full
    on = trained(r)
    rows = []
    for b in range(min(4, len(frame.ids))):
        cells = []
        for t in range(min(48, frame.ids.shape[1])):
            counts = bool(on[b, t])
            cells.append(
                {
                    "input": int(frame.ids[b, t]),
                    "real": bool(frame.real[b, t]),
                    "target": int(r.target[b, t]) if counts else None,
                    "next": int(frame.ids[b, t + 1]) if bool(frame.next_ok[b, t]) else None,
                    "weight": float(r.weight[b, t]) if counts else 0.0,
                }
            )
        rows.append(cells)
    ctx.report.pictures["alignment"] = rows
    ctx.report.pictures["visibility"] = _map(ctx)
    return []


def _map(ctx: Context) -> dict[str, object]:
    b = int(ctx.work.real.sum(1).argmax())
    start = int(ctx.work.real[b].long().argmax())
    part = ctx.work.rows([b]).cols(start, start + _WINDOW)
    n = part.ids.shape[1]
    tiled = part.rows([0] * (n + 1))
    with ctx.subject.box.woken(ctx.seed):
        one = torch.zeros_like(tiled.real)
        one[torch.arange(n), torch.arange(n)] = True
        logits = ctx.subject.look(tiled.swap(one, ctx.seed)).logits
        effect = moved(logits[:n], logits[n:].expand(n, -1, -1)).T  # (i, j)
    top = effect[torch.isfinite(effect)].max().clamp_min(1e-12)
    cells = torch.nan_to_num(effect / top, posinf=1.0).tolist()
    return {
        "row": ctx.rows[b],
        "start": start,
        "tokens": part.ids[0].tolist(),
        "cells": cells,
        "docs": part.doc[0].tolist(),
    }
