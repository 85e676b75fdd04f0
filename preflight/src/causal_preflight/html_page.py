"""The report as one HTML page, with pictures of what the loss trained and what the logits saw."""

from collections.abc import Callable, Iterable
from html import escape
from typing import Any

import torch

from causal_preflight.context import Context, moved
from causal_preflight.report import Finding, Report

_WINDOW = 16  # tokens a side of the visibility map
_ROWS, _COLS = 4, 48  # of the alignment table

_BLUE, _RED = "38,92,150", "200,64,47"
_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem}
.wrap{overflow-x:auto}table{border-collapse:collapse;margin-bottom:1rem}
td,th{padding:3px 5px;border:1px solid #e3e7ea;font:12px/1.3 ui-monospace,monospace}
.list td{text-align:left;vertical-align:top;font:inherit}
.map td{width:1.1rem;height:1.1rem;padding:0}.map th{border:0;padding:2px 4px}
.right{background:#cfe8dc}.wrong{background:#f4a79d}.none,.pad{color:#a9b2b9}
.pair{display:flex;gap:2.5rem;flex-wrap:wrap}.verdict{padding:.7rem 1rem;background:#eef7f2}
.bad{background:#fdf0ee}
"""


def pictures(ctx: Context) -> list[Finding]:
    """Fill `Report.pictures`; reports no finding."""
    r, batch = ctx.readout(True), ctx.full
    rows, width = batch.ids.shape

    def cell(b: int, t: int) -> dict[str, Any]:
        counts = bool(r.trained[b, t])
        return {
            "input": int(batch.ids[b, t]),
            "real": bool(batch.real[b, t]),
            "target": int(r.target[b, t]) if counts else None,
            "next": int(batch.ids[b, t + 1]) if batch.has_target[b, t] else None,
            "weight": float(r.weight[b, t]) if counts else 0.0,
        }

    cells = [[cell(b, t) for t in range(min(_COLS, width))] for b in range(min(_ROWS, rows))]
    ctx.report.pictures = {"alignment": cells, "visibility": _map(ctx)}
    return []


def _map(ctx: Context) -> dict[str, Any]:
    """How far logit i moves with token j, as a fraction of the largest move: cell (i, j).

    Copies of the longest row, each with one token swapped, in a single run.
    """
    row = ctx.work.unpadded_row(int(ctx.work.real.sum(1).argmax())).cols(0, _WINDOW)
    n = row.ids.shape[1]
    one = torch.eye(n + 1, dtype=torch.bool, device=row.ids.device)[:, :n]
    with ctx.weights(True):
        logits = ctx.model.observe(row.rows([0] * (n + 1)).swap(one, ctx.seed)).logits
    effect = moved(logits[:n], logits[n:].expand(n, -1, -1)).T
    top = effect[torch.isfinite(effect)].max().clamp_min(1e-12)
    b, start = divmod(int(row.slot[0, 0]), ctx.full.ids.shape[1])
    where = {"row": b, "start": start, "tokens": row.ids[0].tolist(), "doc": row.doc[0].tolist()}
    return {**where, "cells": torch.nan_to_num(effect / top, posinf=1.0).tolist()}


def to_html(report: Report, name: Callable[[int], str] = str) -> str:
    """One self-contained HTML page of a report; `name` turns a token id into text."""
    found = [(f.label.upper(), f.seen, f.remedy) for f in report.findings]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Preflight</title>'
        f"<style>{_STYLE}</style><h1>Preflight</h1>"
        f'<p class="verdict{"" if report.clean else " bad"}">{escape(report.verdict)}</p>'
        + _list(found)
        + _alignment(report.pictures.get("alignment") or [], name)
        + _visibility(report.pictures.get("visibility") or {}, name)
        + f"<h2>What was examined</h2>{_list(report.notes())}</html>"
    )


def _list(rows: Iterable[tuple[str, ...]]) -> str:
    lines = ("".join(f"<td>{escape(x)}</td>" for x in row) for row in rows)
    return f'<table class="list">{"".join(f"<tr>{x}</tr>" for x in lines)}</table>'


def _alignment(rows: list[list[dict[str, Any]]], name: Callable[[int], str]) -> str:
    """Per row of the batch: input, trained target and weight of every position."""
    top = max((abs(c["weight"]) for row in rows for c in row), default=0.0) or 1.0
    out = (
        "<h2>What each position was trained on</h2><p>Read off the gradient of the loss. Green: "
        "the next token of the same document. Red: anything else. A dot: not counted. Gray inputs "
        "are PAD. The darker the third line, the larger the weight of the token.</p>"
    )

    for b, row in enumerate(rows):
        lines = {f"row {b}": "", "trained on": "", "weight": ""}
        for c in row:
            kind = "right" if c["target"] == c["next"] else "wrong"
            target = ("·", "none") if c["target"] is None else (name(c["target"]), kind)
            source = name(c["input"]), "" if c["real"] else "pad"
            for head, (text, style) in zip(lines, (source, target), strict=False):
                lines[head] += f'<td class="{style}">{escape(text)}</td>'
            lines["weight"] += _shade(abs(c["weight"]) / top, f"{c['weight']:.3g}")
        table = "".join(f"<tr><th>{head}</th>{cells}</tr>" for head, cells in lines.items())
        out += f'<div class="wrap"><table>{table}</table></div>'
    return out if rows else ""


def _shade(strength: float, title: str, hue: str = _BLUE) -> str:
    return f'<td title="{title}" style="background:rgba({hue},{min(1.0, strength):.3f})"></td>'


def _visibility(seen: dict[str, Any], name: Callable[[int], str]) -> str:
    """The measured map beside the one that is allowed."""
    if not seen:
        return ""
    tokens, n = [escape(name(token)) for token in seen["tokens"]], range(len(seen["tokens"]))
    doc, cells = seen["doc"], seen["cells"]
    allowed = [[float(j <= i and doc[i] == doc[j]) for j in n] for i in n]
    measured = [[cells[i][j] ** 0.25 for j in n] for i in n]  # a faint leak must show

    def grid(strengths: list[list[float]]) -> str:
        table = "<tr><th></th>" + "".join(f"<th>{x}</th>" for x in tokens) + "</tr>"
        for i in n:
            hue = [_BLUE if x else _RED for x in allowed[i]]
            line = (_shade(strengths[i][j], f"input {j}, logit {i}", hue[j]) for j in n)
            table += f"<tr><th>{tokens[i]}</th>{''.join(line)}</tr>"
        return f'<table class="map">{table}</table>'

    return (
        f"<h2>Which input moves which logit</h2><p>Row {seen['row']}, from position "
        f"{seen['start']}; one line per logit, one column per swapped token; rescaled weights. "
        "Left as measured (fourth root of the fraction of the largest move; red where nothing may "
        f'show), right as it should be.</p><div class="pair">{grid(measured)}{grid(allowed)}</div>'
    )
