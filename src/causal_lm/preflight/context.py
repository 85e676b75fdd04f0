"""What all probes share: the subject, the batch, the part of it that is probed, and tolerances."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from causal_lm.preflight.frame import Frame
from causal_lm.preflight.report import Finding, Report
from causal_lm.preflight.subject import Look, Readout, Subject

Probe = Callable[["Context"], list[Finding]]

# Relative to the spread of the logits. Runs of equal shape differ by less than rounding; runs of
# another shape (a row alone, PAD appended) take other kernels and differ by several roundings.
_ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_RESHAPED = 4.0
COUNTS = 1e-6  # share of the largest pull below which a position plays no part in the loss
TRAINED = 1e-3  # share of the largest weight below which a position has no target


@dataclass
class Context:
    """One audit in progress."""

    subject: Subject
    full: Frame
    work: Frame
    """a few rows of `full`: what the flow probes run on"""
    rows: list[int]
    """where the rows of `work` lie in `full`"""
    seed: int
    report: Report
    first: int = 0
    """where the columns of `work` begin in `full`; its findings count positions from there"""
    blamed: set[str] = field(default_factory=set)
    """mechanisms already found (future, company, documents, padding), not to be reported twice"""
    _readouts: dict[bool, Readout] = field(default_factory=dict)
    _looks: dict[bool, Look] = field(default_factory=dict)

    def readout(self, train: bool) -> Readout:
        """Of the whole batch; cached."""
        if train not in self._readouts:
            self._readouts[train] = self.subject.readout(self.full, train)
        return self._readouts[train]

    def base(self, train: bool = False) -> Look:
        """Logits of `work` as it is; cached."""
        if train not in self._looks:
            self._looks[train] = self.subject.look(self.work, train)
        return self._looks[train]

    @cached_property
    def counted(self) -> Tensor:
        """(R, T) bool on `work`: real positions with a target, in either mode."""
        hit = trained(self.readout(False)) | trained(self.readout(True))
        return hit[self.rows][:, self.first :][:, : self.work.ids.shape[1]] & self.work.real

    @cached_property
    def tolerance(self) -> float:
        """Relative, for runs of equal shape; grows slowly with depth."""
        depth: int = sum(1 for m in self.subject.box.modules if m._parameters)
        growth: float = max(1.0, (depth / 100) ** 0.5)
        return _ROUNDING.get(self.subject.dtype, 2e-2) * growth

    def bound(self, logits: Tensor, where: Tensor, reshaped: bool = False) -> float:
        """Largest change of logits (R, T, V) at `where` (R, T) that may be rounding."""
        z = logits[where]
        z = z[torch.isfinite(z).any(-1)]
        z = torch.where(torch.isfinite(z), z, 0.0)
        if not z.numel():
            return 0.0
        spread = float((z - z.mean(-1, keepdim=True)).pow(2).mean().sqrt())
        rounding = self.tolerance * (_RESHAPED if reshaped else 1.0)
        return rounding * spread + 0.05 * rounding * float(z.abs().max())


def trained(r: Readout) -> Tensor:
    """(B, T) bool: positions that the loss trains on a target."""
    return r.weight.abs().minimum(r.sharp.abs()) > TRAINED * r.weight.abs().max().clamp_min(1e-300)


def moved(a: Tensor, b: Tensor) -> Tensor:
    """(R, T): largest change over the vocabulary; NaN against a number is an infinite change."""
    change = (a - b).abs()
    change = torch.where(a == b, 0.0, change)  # inf - inf
    change = torch.where(torch.isnan(a) & torch.isnan(b), 0.0, change)
    return torch.nan_to_num(change, nan=float("inf")).amax(-1)
