"""What all probes share: the subject, the batch, the part of it that is probed, and tolerances."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from causal_preflight.audit_batch import AuditBatch
from causal_preflight.instrumented_model import InstrumentedModel, Look, Readout
from causal_preflight.report import REMEDIES, Finding, Report

Probe = Callable[["Context"], list[Finding]]

# Relative to the spread of the logits. Runs of equal shape differ by less than rounding; runs of
# another shape (a row alone, PAD appended) take other kernels and differ by several roundings.
_ROUNDING = {torch.float32: 2e-5, torch.float16: 4e-3}
_COARSE = 2e-2  # bfloat16 and below
_RESHAPED = 4.0


@dataclass(frozen=True)
class Move:
    """How far logits moved at most, and at which slot of the audited batch, if at one."""

    size: float
    at: int = -1


@dataclass
class Context:
    """One audit in progress.

    `work` is a few rows of `full`, for the probes of logits. `blamed` holds the mechanisms found so
    far (future, company, documents, padding, ...), which later probes must not report again.
    """

    subject: InstrumentedModel
    full: AuditBatch
    work: AuditBatch
    seed: int
    report: Report
    blamed: set[str] = field(default_factory=set)
    _readouts: dict[bool, Readout] = field(default_factory=dict)

    def readout(self, train: bool) -> Readout:
        """Of the whole batch; cached."""
        if train not in self._readouts:
            self._readouts[train] = self.subject.readout(self.full, train)
        return self._readouts[train]

    @cached_property
    def base(self) -> Look:
        """Logits of `work` as it is, in eval mode."""
        return self.subject.look(self.work)

    def counted(self, frame: AuditBatch) -> Tensor:
        """(B, T) bool: real positions with a target, in either mode."""
        hit = (self.readout(False).trained | self.readout(True).trained) & self.full.real
        return hit.flatten()[frame.at] & frame.real & (frame.at >= 0)

    def weights(self, woken: bool) -> AbstractContextManager[None]:
        return self.subject.box.rescaled_weights(self.seed) if woken else nullcontext()

    @cached_property
    def tolerance(self) -> float:
        """Relative, for runs of equal shape; grows slowly with depth."""
        depth = sum(1 for m in self.subject.box.modules if m._parameters)
        return float(_ROUNDING.get(self.subject.dtype, _COARSE) * max(1.0, (depth / 100) ** 0.5))

    def bound(self, logits: Tensor, where: Tensor) -> float:
        """Largest change of logits (B, T, V) at `where` (B, T) that may be rounding."""
        z = logits[where]
        z = z[torch.isfinite(z).any(-1)]
        if not z.numel():
            return 0.0
        z = torch.where(torch.isfinite(z), z, 0.0)
        spread = (z - z.mean(-1, keepdim=True)).pow(2).mean().sqrt() + 0.05 * z.abs().max()
        return self.tolerance * float(spread)

    def worst(
        self, frame: AuditBatch, new: Tensor, old: Tensor, watch: Tensor, reshaped: bool = False
    ) -> Move | None:
        """The largest move at `watch` (B, T) of the frame; None if it is rounding."""
        change = torch.where(watch, moved(new, old), 0.0)
        size = float(change.max())
        if not size > self.bound(old, watch) * (_RESHAPED if reshaped else 1.0):
            return None
        return Move(size, int(frame.at.flatten()[change.argmax()]))

    def elsewhere(self, frame: AuditBatch, other: AuditBatch) -> Move | None:
        """The largest move of a counted logit of `frame` that stands in `other` as well."""
        a = self.base if frame is self.work else self.subject.look(frame)
        b = self.subject.look(other)
        seen = a.seen.flatten().nonzero()[:, 0]
        home = frame.at.new_full((self.full.at.numel() + 1,), -1)
        home[frame.at.flatten()[seen]] = seen
        home[-1] = -1  # what is in no slot is nowhere
        slots = home[other.at]
        watch = self.counted(other) & b.seen & (slots >= 0)
        return self.worst(other, b.logits, a.logits.flatten(0, 1)[slots], watch, reshaped=True)

    def finding(self, label: str, seen: str, remedy: str, move: Move) -> Finding:
        """`seen` may speak of {row}, {t} and {size}, and of {where}, which says all of them."""
        size, (row, t) = f"{move.size:.3g}", divmod(move.at, self.full.ids.shape[1])
        where = f"row {row}: the logits at position {t} move by {size}"
        seen = seen.format(row=row, t=t, size=size, where=where)
        place = (row, t, int(self.full.ids[row, t])) if move.at >= 0 else ()
        return Finding(label, seen, REMEDIES[remedy], move.size, *place)

    def first(self, label: str, seen: str, remedy: str, hit: Tensor, size: float) -> Finding:
        """`hit` (B, T) of the whole batch holds the evidence."""
        return self.finding(label, seen, remedy, Move(size, int(hit.flatten().long().argmax())))


def moved(a: Tensor, b: Tensor) -> Tensor:
    """(B, T): largest change over the vocabulary; NaN against a number is an infinite change."""
    change = torch.where(a == b, 0.0, (a - b).abs())  # inf - inf
    change = torch.where(torch.isnan(a) & torch.isnan(b), 0.0, change)
    return torch.nan_to_num(change, nan=float("inf")).amax(-1)
