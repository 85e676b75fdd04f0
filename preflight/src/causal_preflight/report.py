"""What the audit reports: findings, what could not be examined, and how to print them."""

from collections.abc import Callable, Set
from dataclasses import asdict, dataclass, field, replace
from textwrap import wrap
from typing import Any

LABELS = ("shift", "pad", "causal", "reduction", "eos", "position")
ALIASES = {"norm": "reduction"}  # earlier words, still understood in `Report.faults`
REMEDIES = {
    "targets": "train logits[:, t] on input_ids[:, t + 1]; shift once, within a row and a document",
    "heads": "train a head that reads k more tokens on the token k + 1 ahead; shift for each head",
    "pad targets": "give PAD targets the label -100 by mask or length; drop them before the mean",
    "dropped": "count every real target whose label is not -100: check what the loss slices",
    "logits": "return logits: cross_entropy applies the softmax itself",
    "eos": "end each document in EOS and count it; tell PAD by mask or length, not by a shared id",
    "divide": "sum the token losses and divide once, by the targets of all micro-batches and ranks",
    "clamp": "clamp each count that divides to at least 1, or skip rows without targets",
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
    """Raise UnexaminableError with the text `otherwise` unless the condition holds."""
    if not condition:
        raise UnexaminableError(otherwise)


class Faults(frozenset[str]):
    """Labels of the faults found; `norm`, the earlier word for `reduction`, is understood."""

    def in_order(self) -> list[str]:
        """As in LABELS, and `loop` last."""
        return sorted(self, key=(*LABELS, "loop").index)

    def __contains__(self, label: object) -> bool:
        return super().__contains__(ALIASES.get(str(label), label))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Set) and set(self) == {ALIASES.get(x, x) for x in other}

    __hash__ = frozenset.__hash__


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
    `remarks`: what is no fault, but should be known.
    `passed`: probes that ran and found nothing. `pictures`: plain lists for `to_html`. `forwards`:
    runs of the loss.
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
    def faults(self) -> Faults:
        """The labels of the findings."""
        return Faults(f.label for f in self.findings)

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
        faults = ", ".join(self.faults.in_order())
        cost = f"({self.forwards} forward passes, {self.seconds:.1f} s)"
        return f"{f'FAULTS {faults}' if faults else 'no fault found'} {cost}"

    def examine(self, name: str, look: Callable[[], list[Finding]]) -> None:
        """Run a probe: note its findings, that it found nothing, or why it could not look."""
        try:
            found = look()
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
        return {"faults": self.faults.in_order(), "audited": self.audited, **plain}

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
