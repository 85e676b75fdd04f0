"""The report as one HTML page, with what the loss trained and which inputs change which logits."""

from collections.abc import Callable, Iterable
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

import torch

from causal_preflight.context import Context, moved
from causal_preflight.report import Finding, Report

_WINDOW = 16  # tokens a side of the visibility map
_ROWS, _COLS = 4, 48  # of the alignment table
_BLUE, _RED = "38,92,150", "200,64,47"


def pictures(ctx: Context) -> list[Finding]:
    """Fill `Report.pictures`; reports no finding."""
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
    page = files("causal_preflight").joinpath("page.html").read_text(encoding="utf-8")
    seen = report.pictures.get("visibility") or {}
    return Template(page).substitute(
        color="" if report.clean else "bad", verdict=escape(report.verdict),
        findings=_list((f.label.upper(), f.seen, f.remedy) for f in report.findings),
        alignment=_alignment(report.pictures.get("alignment") or [], name),
        row=seen.get("row"), start=seen.get("start"), maps=_maps(seen, name) if seen else "",
        notes=_list(report.notes()),
    )  # fmt: skip


def _list(rows: Iterable[tuple[str, ...]]) -> str:
    lines = ("".join(f"<td>{escape(x)}</td>" for x in row) for row in rows)
    return f'<table class="list">{"".join(f"<tr>{x}</tr>" for x in lines)}</table>'


def _alignment(rows: list[list[dict[str, Any]]], name: Callable[[int], str]) -> str:
    """Per row of the batch: input, trained target and weight of every position."""
    top = max((abs(c["weight"]) for row in rows for c in row), default=0.0) or 1.0
    out = ""
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
    return out


def _shade(strength: float, title: str, hue: str = _BLUE) -> str:
    return f'<td title="{title}" style="background:rgba({hue},{min(1.0, strength):.3f})"></td>'


def _maps(seen: dict[str, Any], name: Callable[[int], str]) -> str:
    """The measured map of visibility beside the one that is allowed."""
    tokens, n = [escape(name(token)) for token in seen["tokens"]], range(len(seen["tokens"]))
    allowed = [[float(j <= i and seen["doc"][i] == seen["doc"][j]) for j in n] for i in n]
    measured = [[cell**0.25 for cell in line] for line in seen["cells"]]  # a faint leak must show
    out = ""
    for strengths in (measured, allowed):
        table = "<tr><th></th>" + "".join(f"<th>{x}</th>" for x in tokens) + "</tr>"
        for i in n:
            hue = [_BLUE if x else _RED for x in allowed[i]]
            line = (_shade(strengths[i][j], f"input {j}, logit {i}", hue[j]) for j in n)
            table += f"<tr><th>{tokens[i]}</th>{''.join(line)}</tr>"
        out += f'<table class="map">{table}</table>'
    return out
