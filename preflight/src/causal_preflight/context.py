"""What all probes share: the model, the batch, the part of it that is probed, and tolerances."""

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from causal_preflight.batch import AuditBatch
from causal_preflight.gradient_fit import Readout
from causal_preflight.instrumented_model import InstrumentedModel, Observation
from causal_preflight.report import REMEDIES, Finding, Report, require

Probe = Callable[["Context"], Iterable[Finding]]

# Relative to the spread of the logits. Runs of equal shape differ by less than rounding; runs of
# another shape (a row alone, PAD appended) take other kernels and differ by several roundings.
_ROUNDING = {torch.float32: 2e-5, torch.float16: 4e-3}
_COARSE = 2e-2  # bfloat16 and below
_RESHAPED = 4.0
NONE_COUNTS = "no logit that counts is left to watch"


@dataclass(frozen=True)
class Move:
    """How far logits moved at most, and at which slot (-1: at none)."""

    size: float
    slot: int = -1


@dataclass
class Context:
    """One audit in progress; `work` is a few rows of `full`, for the probes that compare logits.

    Effects of what is in `explained` ("future", "padding", ...) are not reported by later probes.
    """

    model: InstrumentedModel
    full: AuditBatch
    work: AuditBatch
    seed: int
    report: Report
    explained: set[str] = field(default_factory=set)
    _readouts: dict[bool, Readout] = field(default_factory=dict)
    _observed: dict[tuple[bool, bool], Observation] = field(default_factory=dict)

    def readout(self, train: bool) -> Readout:
        """What the loss trains on the whole batch; cached."""
        if train not in self._readouts:
            self._readouts[train] = self.model.readout(self.full, train)
        return self._readouts[train]

    @property
    def base(self) -> Observation:
        """Logits of the unedited `work`, in eval mode."""
        return self.observe(self.work)

    def observe(
        self, batch: AuditBatch, train: bool = False, rescaled: bool = False
    ) -> Observation:
        """Loss and logits of a batch, under `weights(rescaled)`; those of `work` are cached."""
        if batch is not self.work:
            return self.model.observe(batch, train)
        if (train, rescaled) not in self._observed:
            self._observed[train, rescaled] = self.model.observe(batch, train)
        return self._observed[train, rescaled]

    def counted(self, batch: AuditBatch) -> Tensor:
        """(B, T) bool: real positions with a target in either mode; no EOS between documents."""
        hit = (self.readout(False).trained | self.readout(True).trained) & self.full.real
        hit &= ~self.full.opening_eos  # which may belong to either
        return hit.flatten()[batch.slot] & batch.real & (batch.slot >= 0)

    def weights(self, rescaled: bool) -> AbstractContextManager[None]:
        """The model's weights, or those of `Sandbox.rescaled_weights`."""
        return self.model.sandbox.rescaled_weights(self.seed) if rescaled else nullcontext()

    @cached_property
    def tolerance(self) -> float:
        """Relative, for runs of equal shape; grows slowly with depth."""
        depth = sum(bool(m._parameters) for m in self.model.sandbox.modules)
        return float(_ROUNDING.get(self.model.dtype, _COARSE) * max(1.0, (depth / 100) ** 0.5))

    def bound(self, logits: Tensor, where: Tensor) -> float:
        """Largest change of logits (B, T, V) at `where` (B, T) that may be rounding."""
        z = logits[where & torch.isfinite(logits).any(-1)].nan_to_num(0.0, 0.0, 0.0)
        if not z.numel():
            return 0.0
        spread = (z - z.mean(-1, keepdim=True)).pow(2).mean().sqrt() + 0.05 * z.abs().max()
        return self.tolerance * float(spread)

    def largest_move(
        self, batch: AuditBatch, new: Tensor, old: Tensor, watch: Tensor, reshaped: bool = False
    ) -> Move | None:
        """The largest move of logits at `watch` (B, T) of the batch; None if it is rounding."""
        change = torch.where(watch, moved(new, old), 0.0)
        size = float(change.max())
        if not size > self.bound(old, watch) * (_RESHAPED if reshaped else 1.0):
            return None
        return Move(size, int(batch.slot.flatten()[change.argmax()]))

    def compare(self, batch: AuditBatch, other: AuditBatch) -> Move | None:
        """The largest move of a counted logit between two batches that share slots."""
        a, b = self.observe(batch), self.model.observe(other)
        made = a.made.flatten().nonzero()[:, 0]
        index_of_slot = batch.slot.new_full((self.full.slot.numel() + 1,), -1)
        index_of_slot[batch.slot.flatten()[made]] = made
        index_of_slot[-1] = -1  # slot -1 is in no batch
        index = index_of_slot[other.slot]
        watch = self.counted(other) & b.made & (index >= 0)
        require(watch.any(), NONE_COUNTS)
        old = a.logits.flatten(0, 1)[index]
        return self.largest_move(other, b.logits, old, watch, reshaped=True)

    def finding(self, label: str, seen: str, remedy: str, move: Move) -> Finding:
        """`seen` is a format string of {row}, {t}, {size}, and {where}, a clause with all three."""
        size, (row, t) = f"{move.size:.3g}", divmod(move.slot, self.full.ids.shape[1])
        where = f"row {row}: the logits at position {t} move by {size}"
        seen = seen.format(row=row, t=t, size=size, where=where)
        place = (row, t, int(self.full.ids[row, t])) if move.slot >= 0 else ()
        return Finding(label, seen, REMEDIES[remedy], move.size, *place)

    def finding_at(self, label: str, seen: str, remedy: str, hit: Tensor, size: float) -> Finding:
        """Finding at the first True of `hit`, (B, T) of the whole batch."""
        return self.finding(label, seen, remedy, Move(size, int(hit.flatten().long().argmax())))


def moved(a: Tensor, b: Tensor) -> Tensor:
    """(B, T): largest change over the vocabulary; NaN against a number is an infinite change."""
    same = (a == b) | (torch.isnan(a) & torch.isnan(b))  # inf - inf is NaN
    return torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=float("inf")).amax(-1)
