"""Data for the page: alignment and weights of a few rows, visibility of a short stretch of one."""

from typing import Any

import torch

from causal_lm.preflight.context import Context, moved, trained
from causal_lm.preflight.report import Finding

_WINDOW = 16  # tokens a side of the visibility map
_ROWS, _COLS = 4, 48  # of the alignment table


def pictures(ctx: Context) -> list[Finding]:
    """Fills `Report.pictures`; finds nothing by itself."""
    r, frame = ctx.readout(True), ctx.full
    on, rows = trained(r), []
    for b in range(min(_ROWS, len(frame.ids))):
        cells = []
        for t in range(min(_COLS, frame.ids.shape[1])):
            counts = bool(on[b, t])
            cell: dict[str, Any] = {"input": int(frame.ids[b, t]), "real": bool(frame.real[b, t])}
            cell["target"] = int(r.target[b, t]) if counts else None
            cell["next"] = int(frame.ids[b, t + 1]) if bool(frame.next_ok[b, t]) else None
            cells.append({**cell, "weight": float(r.weight[b, t]) if counts else 0.0})
        rows.append(cells)
    ctx.report.pictures = {"alignment": rows, "visibility": _map(ctx)}
    return []


def _map(ctx: Context) -> dict[str, Any]:
    """How far logit i moves with token j, as a share of the largest move: cell (i, j).

    Copies of the longest row, each with one token swapped, in a single run.
    """
    b = int(ctx.work.real.sum(1).argmax())
    start = int(ctx.work.real[b].long().argmax())
    part = ctx.work.rows([b]).cols(start, start + _WINDOW)
    n = part.ids.shape[1]
    tiled = part.rows([0] * (n + 1))
    one = torch.eye(n + 1, dtype=torch.bool, device=part.ids.device)[:, :n]
    with ctx.weights(True):
        logits = ctx.subject.look(tiled.swap(one, ctx.seed)).logits
    effect = moved(logits[:n], logits[n:].expand(n, -1, -1)).T
    top = effect[torch.isfinite(effect)].max().clamp_min(1e-12)
    cells = torch.nan_to_num(effect / top, posinf=1.0).tolist()
    where = {"row": ctx.rows[b], "start": start + ctx.first}
    return {**where, "tokens": part.ids[0].tolist(), "doc": part.doc[0].tolist(), "cells": cells}
