"""What the audit reports: findings, what could not be examined; as text and as an HTML page."""

from collections.abc import Callable, Iterable, Set
from dataclasses import asdict, dataclass, field, replace
from html import escape
from importlib.resources import files
from string import Template
from textwrap import wrap
from typing import Any

LABELS = ("shift", "pad", "causal", "reduction", "eos", "position")
REMEDIES = {
    "targets": "train logits[:, t] on input_ids[:, t + 1]; shift once, within a row and a document",
    "heads": "train a head that reads k more tokens on the token k + 1 ahead; shift for each head",
    "pad targets": "give PAD targets the label -100 by mask or length; drop them before the mean",
    "dropped": "count every real target whose label is not -100: check what the loss slices",
    "logits": "return logits: cross_entropy applies the softmax itself",
    "eos": "end each document in EOS and count it; tell PAD by mask or length, not by a shared id",
    "divide": "sum the token losses and divide once, by the targets of all micro-batches and ranks",
    "clamp": "clamp each count that divides to at least 1, or skip rows without targets",
    "overflow": "take log_softmax, not log(softmax), and keep each term of the loss in range",
    "mask future": "mask keys j > i before the softmax (sdpa: True = may attend; nn.Transformer: "
    "True = masked out); no norm, pooling or convolution may use later positions",
    "rows": "no layer may mix rows: check batch_first, BatchNorm, and views that merge axes",
    "documents": "attend only where document_ids[i] == document_ids[j]; or pack without documents",
    "pad keys": "hide PAD keys from real queries; check what True means in the layer's mask",
    "by value": "tell PAD by mask or length, not by an id that real tokens have too",
    "no key": "leave every query at least one key, if only itself, also at PAD",
    "positions": "count positions 0, 1, 2, ... from the first real token of each document",
    "length": "count positions from the first real token; use the padded length nowhere",
    "row length": "let no feature of a position depend on how many tokens follow in its row",
    "axis": "index positions along time, not along the batch (check batch_first)",
    "cache": "offset positions and masks by the length of what is cached already",
}
PLAIN_WORDS = {  # probe -> what it checks
    "finite": "finite numbers", "alignment": "next-token targets",
    "soft": "next-token targets", "dropped": "next-token targets",
    "ending": "EOS", "reduction": "token weights", "emptied": "rows without targets",
    "cross_row": "rows apart", "future": "causal mask", "documents": "documents apart",
    "context": "sight of earlier tokens", "embedding": "PAD hidden", "extension": "PAD added",
    "order": "positions", "alone": "positions", "length": "positions", "packed": "positions",
    "decoding": "decoding with a cache", "further_heads": "heads",
}  # fmt: skip


class UnexaminableError(Exception):
    """A probe cannot examine what it is given; `Report.skipped` gets the reason."""


class PreflightError(ValueError):
    """The preflight found a fault, and `on_fault` is "error"."""


def require(condition: object, otherwise: str) -> None:
    """Raise UnexaminableError(otherwise) unless the condition holds."""
    if not condition:
        raise UnexaminableError(otherwise)


@dataclass(frozen=True)
class Finding:
    """One fault: one of LABELS, what was seen, how to fix it, and the probe that saw it.

    `size` is in the unit that `seen` names; `row`, `position` and `token` say where.
    """

    label: str
    seen: str
    remedy: str
    size: float = float("nan")
    row: int | None = None
    position: int | None = None
    token: int | None = None
    probe: str = ""


@dataclass
class Report:
    """The outcome of one preflight.

    `skipped`: probe -> why it could not be examined. `sampled`: what was examined in part only.
    `passed`: probes that found nothing. `pictures`: plain lists for `to_html`. `forwards`: runs of
    the loss. `remarks`: what is no fault, but should be known.
    """

    findings: list[Finding] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    sampled: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    pictures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    forwards: int = 0
    remarks: list[str] = field(default_factory=list)

    @property
    def faults(self) -> Set[str]:
        """The labels of the findings, in the order of LABELS, and `loop` last."""
        found = {f.label for f in self.findings}
        return dict.fromkeys(x for x in (*LABELS, "loop") if x in found).keys()

    @property
    def audited(self) -> bool:
        """Whether the targets could be determined; without them no other result is meaningful."""
        return bool(self.findings or "alignment" in self.passed)

    @property
    def clean(self) -> bool:
        """Audited, and no fault found."""
        return self.audited and not self.findings

    @property
    def verdict(self) -> str:
        """One line: the faults, or that there are none, or that nothing could be examined."""
        if not self.audited:
            why = (self.skipped.get(k) for k in ("preflight", "logits", "alignment"))
            return f"NOT AUDITED: {next(filter(None, why), 'nothing could be examined')}"
        faults = ", ".join(self.faults)
        cost = f"({self.forwards} forward passes, {self.seconds:.1f} s)"
        return f"{f'FAULTS {faults}' if faults else 'no fault found'} {cost}"

    def examine(self, name: str, look: Callable[[], Iterable[Finding]]) -> None:
        """Run a probe: note its findings, that it found nothing, or why it could not look."""
        try:
            found = list(look())
        except Exception as problem:  # one probe that fails must not end the audit
            why = (str(problem).splitlines() or [""])[0]
            own = isinstance(problem, UnexaminableError)
            self.skipped[name] = (why if own else f"{type(problem).__name__}: {why}")[:200]
            return
        self.findings += [replace(f, probe=name) for f in found]
        if not found:
            self.passed.append(name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `json.dumps(report.to_dict())` works; a size that is not a number is null."""
        plain = asdict(self)
        for f in plain["findings"]:
            f["size"] = f["size"] if abs(f["size"]) < float("inf") else None
        return {"faults": list(self.faults), "audited": self.audited, **plain}

    def __str__(self) -> str:
        return self._text(self.notes())

    def summary(self) -> str:
        """The verdict, the findings, and in plain words what was checked and what was not."""
        passed = dict.fromkeys(PLAIN_WORDS.get(x, x) for x in self.passed)
        skipped = dict.fromkeys(PLAIN_WORDS.get(x, x) for x in self.skipped)
        skipped = {word: None for word in skipped if word not in passed}
        lists = ("checked", passed), ("skipped", skipped)
        notes = [("noted", note) for note in self.remarks]
        return self._text(notes + [(head, ", ".join(words)) for head, words in lists if words])

    def _text(self, notes: list[tuple[str, str]]) -> str:
        lines, cells = [f"preflight: {self.verdict}"], list[tuple[str, str]]()
        for f in self.findings:
            cells += [(f.label.upper(), f"{f.seen} [{f.probe}]"), ("", f"-> {f.remedy}")]
        for head, text in cells + notes:
            lines += wrap(text, 100, initial_indent=f"  {head:<9} ", subsequent_indent=" " * 12)
        return "\n".join(lines)

    def notes(self) -> list[tuple[str, str]]:
        """What was examined, what was not, and what in part only."""
        notes = [("checked", ", ".join(self.passed))] if self.passed else []
        notes += [("skipped", f"{name}: {why}") for name, why in self.skipped.items()]
        notes += [("noted", note) for note in self.remarks]
        return notes + [("sampled", note) for note in self.sampled]


def to_html(report: Report, name: Callable[[int], str] = str) -> str:
    """One self-contained HTML page of a report; `name` turns a token id into text."""
    page = files("causal_preflight").joinpath("page.html").read_text(encoding="utf-8")
    seen = report.pictures.get("visibility") or {}
    return Template(page).substitute(
        title=escape(report.verdict.split(":")[0]),
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
        lines = {"input": "", "trained on": "", "weight": ""}
        for c in row:
            kind = "right" if c["target"] == c["next"] else "wrong"
            target = ("·", "none") if c["target"] is None else (name(c["target"]), kind)
            source = name(c["input"]), "" if c["real"] else "pad"
            for head, (text, style) in zip(lines, (source, target), strict=False):
                lines[head] += f'<td class="{style}">{escape(text)}</td>'
            lines["weight"] += _shade(abs(c["weight"]) / top, f"{c['weight']:.3g}")
        body = (f'<tr><th scope="row">{head}</th>{cells}</tr>' for head, cells in lines.items())
        out += _table("tokens", f"Row {b} of the batch", "".join(body))
    return out


def _table(kind: str, caption: str, body: str) -> str:
    """A table that scrolls by itself, reachable by keyboard."""
    table = f'<table class="{kind}"><caption>{caption}</caption>{body}</table>'
    return f'<div class="wrap" tabindex="0" role="region" aria-label="{caption}">{table}</div>'


def _shade(strength: float, title: str, kind: str = "seen") -> str:
    style = f'class="{kind}" style="--s:{min(1.0, strength):.3f}"'
    return f'<td title="{title}" {style} aria-label="{title}"></td>'


def _maps(seen: dict[str, Any], name: Callable[[int], str]) -> str:
    """The measured map of visibility beside the one that is allowed."""
    tokens, n = [escape(name(token)) for token in seen["tokens"]], range(len(seen["tokens"]))
    allowed = [[float(j <= i and seen["doc"][i] == seen["doc"][j]) for j in n] for i in n]
    measured = [[cell**0.25 for cell in line] for line in seen["cells"]]  # a faint leak must show
    swapped = seen.get("swapped") or [True] * len(tokens)
    out = ""
    for caption, strengths, tried in (
        ("Measured (fourth root of the fraction of the largest move)", measured, swapped),
        ("As it should be", allowed, [True] * len(tokens)),
    ):
        heads = "".join(f'<th scope="col"><span>{x}</span></th>' for x in tokens)
        body = f"<thead><tr><td></td>{heads}</tr></thead>"
        for i in n:
            line = (
                _shade(strengths[i][j], f"logit {i}, input {j}: {strengths[i][j]:.2f}",
                       "seen" if allowed[i][j] else "leak")
                if tried[j] else f'<td class="na" title="input {j} was not swapped">–</td>'
                for j in n
            )  # fmt: skip
            body += f'<tr><th scope="row">{tokens[i]}</th>{"".join(line)}</tr>'
        out += _table("map", caption, body)
    return out
