"""What the audit says: findings, what could not be examined, and how to print them."""

import textwrap
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LABELS = ("shift", "pad", "causal", "norm", "eos", "position")


@dataclass(frozen=True)
class Finding:
    """One fault, with its evidence."""

    label: str
    """one of LABELS"""
    probe: str
    """the probe that saw it"""
    seen: str
    """what was seen, in a sentence with a few tokens of evidence"""
    remedy: str
    """how to mend it"""
    size: float = float("nan")
    """how large; the sentence in `seen` names the unit"""
    row: int | None = None
    """row of the batch"""
    position: int | None = None
    """position within the row"""
    token: int | None = None
    """token id there"""


@dataclass
class Report:
    """The outcome of one preflight."""

    findings: list[Finding] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """probe -> why it could not be examined on this model and batch"""
    sampled: list[str] = field(default_factory=list)
    """what was looked at in part only"""
    passed: list[str] = field(default_factory=list)
    """probes that ran and found nothing"""
    pictures: dict[str, Any] = field(default_factory=dict)
    """alignment and visibility, as plain lists, for the page"""
    seconds: float = 0.0
    forwards: int = 0
    """calls of the loss that the audit made"""

    @property
    def faults(self) -> set[str]:
        return {f.label for f in self.findings}

    def to_dict(self) -> dict[str, Any]:
        """Plain data: `json.dumps(report.to_dict())` works; a size that is not a number is null."""
        found = [asdict(f) for f in self.findings]
        for f in found:
            f["size"] = f["size"] if abs(f["size"]) < float("inf") else None
        return {
            "faults": [label for label in LABELS if label in self.faults],
            "findings": found,
            "skipped": dict(self.skipped),
            "sampled": list(self.sampled),
            "passed": list(self.passed),
            "seconds": round(self.seconds, 3),
            "forwards": self.forwards,
        }

    def to_html(self, path: str | Path | None = None) -> str:
        """One self-contained page; written to `path` where given."""
        from causal_lm.preflight.page import page

        html = page(self)
        if path is not None:
            Path(path).write_text(html, encoding="utf-8")
        return html

    def __str__(self) -> str:
        if self.findings:
            head = "preflight: FAULTS " + ", ".join(x for x in LABELS if x in self.faults)
        else:
            head = "preflight: no fault found"
        lines = [f"{head}  ({self.forwards} passes, {self.seconds:.2f} s)"]
        for f in self.findings:
            lines += _cell(f.label.upper(), f"{f.seen} [{f.probe}]") + _cell("", f"-> {f.remedy}")
        if self.passed:
            lines += _cell("clean", ", ".join(self.passed))
        for name, why in self.skipped.items():
            lines += _cell("skipped", f"{name}: {why}")
        for note in self.sampled:
            lines += _cell("sampled", note)
        return "\n".join(lines)


def _cell(head: str, text: str) -> list[str]:
    body = textwrap.wrap(text, 88) or [""]
    return [f"  {h:<9} {line}" for h, line in zip([head] + [""] * len(body), body, strict=False)]
