"""One self-contained page: what the loss trained, what the logits saw, what each token weighs."""

from collections.abc import Callable
from html import escape
from typing import Any

from causal_lm.preflight.report import LABELS, Report

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


def to_html(report: Report, name: Callable[[int], str] = str) -> str:
    """HTML of a report, which needs nothing else to be shown; `name` reads a token id."""
    faults = [x for x in LABELS if x in report.faults]
    found = [(f.label.upper(), f.seen, f.remedy) for f in report.findings]
    notes = [("clean", ", ".join(report.passed)), *(("sampled", x) for x in report.sampled)]
    notes += [(f"skipped: {name}", why) for name, why in report.skipped.items()]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Preflight</title>'
        f"<style>{_STYLE}</style><h1>Preflight</h1>"
        f'<p class="verdict{" bad" if faults else ""}">'
        f"{'Faults: ' + ', '.join(faults) if faults else 'No fault found'} "
        f"({report.forwards} passes in {report.seconds:.2f} s)</p>"
        + _list(found)
        + _alignment(report.pictures.get("alignment") or [], name)
        + _visibility(report.pictures.get("visibility") or {}, name)
        + f"<h2>What was examined</h2>{_list(notes)}</html>"
    )


def _list(rows: list[Any]) -> str:
    lines = ("".join(f"<td>{escape(x)}</td>" for x in row) for row in rows)
    return f'<table class="list">{"".join(f"<tr>{x}</tr>" for x in lines)}</table>'


def _alignment(rows: list[list[dict[str, Any]]], name: Callable[[int], str]) -> str:
    """Per row of the batch: input, trained target and weight of every position."""
    top = max((abs(c["weight"]) for row in rows for c in row), default=0.0) or 1.0
    out = (
        "<h2>What each position was trained on</h2><p>Read off the gradient of the loss. Green: "
        "the next token of the same document. Red: anything else. A dot: not counted. Grey inputs "
        "are PAD. The darker the third line, the more the token weighs in the loss.</p>"
    )
    for b, row in enumerate(rows):
        inputs = "".join(_td(name(c["input"]), "" if c["real"] else "pad") for c in row)
        targets = "".join(_target(c, name) for c in row)
        weights = "".join(_shade(abs(c["weight"]) / top, f"{c['weight']:.3g}") for c in row)
        lines = ((f"row {b}", inputs), ("trained on", targets), ("weight", weights))
        table = "".join(f"<tr><th>{head}</th>{cells}</tr>" for head, cells in lines)
        out += f'<div class="wrap"><table>{table}</table></div>'
    return out if rows else ""


def _td(text: str, kind: str) -> str:
    return f'<td class="{kind}">{escape(text)}</td>'


def _target(c: dict[str, Any], name: Callable[[int], str]) -> str:
    if c["target"] is None:
        return _td("·", "none")
    return _td(name(c["target"]), "right" if c["target"] == c["next"] else "wrong")


def _shade(share: float, title: str, hue: str = _BLUE) -> str:
    return f'<td title="{title}" style="background:rgba({hue},{min(1.0, share):.3f})"></td>'


def _visibility(seen: dict[str, Any], name: Callable[[int], str]) -> str:
    """The map as measured, beside the triangle as it should be."""
    if not seen:
        return ""
    tokens = [escape(name(token)) for token in seen["tokens"]]
    doc, cells = seen["doc"], seen["cells"]
    n = range(len(tokens))

    def allowed(i: int, j: int) -> float:
        return float(j <= i and doc[i] == doc[j])

    def measured(i: int, j: int) -> float:
        return float(cells[i][j] ** 0.25)  # a faint leak must show

    def grid(cell: Callable[[int, int], float]) -> str:
        table = "<tr><th></th>" + "".join(f"<th>{x}</th>" for x in tokens) + "</tr>"
        for i in n:
            hue = [_BLUE if allowed(i, j) else _RED for j in n]
            line = (_shade(cell(i, j), f"input {j}, logit {i}", hue[j]) for j in n)
            table += f"<tr><th>{tokens[i]}</th>{''.join(line)}</tr>"
        return f'<table class="map">{table}</table>'

    return (
        f"<h2>Which input moves which logit</h2><p>Row {seen['row']}, from position "
        f"{seen['start']}; one line per logit, one column per swapped token, on woken weights. "
        "Left as measured (fourth root of the share of the largest move; red where nothing may "
        f'show), right as it should be.</p><div class="pair">{grid(measured)}{grid(allowed)}</div>'
    )
