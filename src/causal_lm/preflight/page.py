"""One self-contained page: what the loss trained, what the logits saw, what each token weighs."""

from html import escape
from typing import Any

from causal_lm.preflight.report import LABELS, Report

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:72rem;margin:2rem auto;padding:0 1rem;
color:#1d2329;background:#fff}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .4rem}p{margin:.3rem 0;color:#56616b}
.wrap{overflow-x:auto}table{border-collapse:collapse;font:12px/1.2 ui-monospace,monospace}
td,th{padding:3px 5px;text-align:center;min-width:1.5rem;border:1px solid #e3e7ea;font-weight:400}
th{color:#56616b;text-align:right;white-space:nowrap;border:0}
.list td{text-align:left;vertical-align:top;font:14px/1.45 system-ui,sans-serif;padding:.5rem}
.right{background:#cfe8dc}.wrong{background:#f4a79d;font-weight:600}.none{color:#a9b2b9}
.pad{background:#eceff1;color:#a9b2b9}.map td{width:1.5rem;height:1.2rem;padding:0}
.pair{display:flex;gap:2.5rem;flex-wrap:wrap}.tag{font-weight:600;text-transform:uppercase}
.verdict{padding:.7rem 1rem;border-left:6px solid #2f8f68;background:#eef7f2;margin:1rem 0}
.verdict.bad{border-color:#c8402f;background:#fdf0ee}
"""


def page(report: Report) -> str:
    """HTML of a report; needs nothing else to be shown."""
    faults = [x for x in LABELS if x in report.faults]
    verdict = "Faults: " + ", ".join(faults) if faults else "No fault found"
    parts = [
        f'<div class="verdict{" bad" if faults else ""}"><b>{verdict}</b> '
        f"({report.forwards} passes in {report.seconds:.2f} s)</div>",
        _findings(report),
        _alignment(report.pictures.get("alignment") or []),
        _visibility(report.pictures.get("visibility") or {}),
        _notes(report),
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>Preflight</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style><h1>Preflight</h1>{''.join(parts)}</html>"
    )


def _findings(report: Report) -> str:
    rows = "".join(
        f'<tr><td class="tag">{escape(f.label)}</td><td>{escape(f.seen)}</td>'
        f"<td>{escape(f.remedy)}</td></tr>"
        for f in report.findings
    )
    return f'<table class="list">{rows}</table>' if rows else ""


def _alignment(rows: list[list[dict[str, Any]]]) -> str:
    """Per row of the batch: input, trained target and weight of every position."""
    if not rows:
        return ""
    top = max((abs(c["weight"]) for row in rows for c in row), default=0.0) or 1.0
    tables = []
    for b, row in enumerate(rows):
        head = "".join(f"<th>{t}</th>" for t in range(len(row)))
        inputs = "".join(_td(c["input"], "" if c["real"] else "pad") for c in row)
        targets = "".join(_target(c) for c in row)
        weights = "".join(_shade(abs(c["weight"]) / top, f"{c['weight']:.3g}") for c in row)
        tables.append(
            f'<div class="wrap"><table><tr><th>row {b}</th>{head}</tr><tr><th>input</th>{inputs}'
            f"</tr><tr><th>trained on</th>{targets}</tr><tr><th>weight</th>{weights}</tr></table>"
            "</div><p></p>"
        )
    return (
        "<h2>What each position was trained on</h2><p>Read off the gradient of the loss. Green: "
        "the next token of the same document. Red: anything else. A dot: not counted. Grey inputs "
        "are PAD. The darker the third line, the more the token weighs in the loss.</p>"
        + "".join(tables)
    )


def _td(text: Any, kind: str) -> str:
    return f'<td class="{kind}">{text}</td>'


def _target(c: dict[str, Any]) -> str:
    if c["target"] is None:
        return _td("·", "none")
    return _td(c["target"], "right" if c["target"] == c["next"] else "wrong")


def _shade(share: float, title: str, hue: str = "38,92,150") -> str:
    return f'<td title="{title}" style="background:rgba({hue},{min(1.0, share):.3f})"></td>'


def _visibility(seen: dict[str, Any]) -> str:
    """The map as measured, beside the triangle as it should be."""
    if not seen:
        return ""
    tokens, docs = seen["tokens"], seen["docs"]
    n = len(tokens)
    head = "".join(f"<th>{x}</th>" for x in tokens)

    def grid(cell: Any, hue: Any) -> str:
        lines = (
            f"<tr><th>{tokens[i]}</th>"
            + "".join(
                _shade(cell(i, j), f"input {j} moves logit {i}: {cell(i, j):.2g}", hue(i, j))
                for j in range(n)
            )
            + "</tr>"
            for i in range(n)
        )
        return f'<table class="map"><tr><th></th>{head}</tr>{"".join(lines)}</table>'

    def allowed(i: int, j: int) -> float:
        return float(j <= i and docs[i] == docs[j])

    measured = grid(
        lambda i, j: seen["cells"][i][j] ** 0.25,  # a faint leak must show
        lambda i, j: "38,92,150" if allowed(i, j) else "200,64,47",
    )
    return (
        "<h2>Which input moves which logit</h2><p>Row "
        f"{seen['row']}, from position {seen['start']}; one line per logit, one column per swapped "
        "token, on woken weights. Left as measured (fourth root of the share of the largest move; "
        "red where nothing may show), right as it should be.</p>"
        f'<div class="pair">{measured}{grid(allowed, lambda i, j: "38,92,150")}</div>'
    )


def _notes(report: Report) -> str:
    lines = [("clean", ", ".join(report.passed))] if report.passed else []
    lines += [(f"skipped: {name}", why) for name, why in report.skipped.items()]
    lines += [("sampled", note) for note in report.sampled]
    rows = "".join(f"<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>" for a, b in lines)
    return f'<h2>What was examined</h2><table class="list">{rows}</table>'
