"""What the audit says: findings, what could not be examined, and how to print them."""

import textwrap
from dataclasses import asdict, dataclass, field
from typing import Any

LABELS = ("shift", "pad", "causal", "norm", "eos", "position")


@dataclass(frozen=True)
class Finding:
    """One fault: one of LABELS, the probe that saw it, what it saw, and how to mend it.

    `size` is in the unit that `seen` names; `row`, `position` and `token` say where.
    """

    label: str
    probe: str
    seen: str
    remedy: str
    size: float = float("nan")
    row: int | None = None
    position: int | None = None
    token: int | None = None


@dataclass
class Report:
    """The outcome of one preflight.

    `skipped` maps a probe to why it could not be examined; `sampled` says what was looked at in
    part only; `passed` lists the probes that ran and found nothing; `pictures` holds the alignment
    and the visibility as plain lists, for the page; `forwards` counts the runs of the loss.
    """

    findings: list[Finding] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    sampled: list[str] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    pictures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    forwards: int = 0

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
