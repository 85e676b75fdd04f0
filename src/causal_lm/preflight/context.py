"""What all probes share: the subject, the batch, the part of it that is probed, and tolerances."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
TRAINED = 1e-3  # share of the largest weight below which a position has no target


@dataclass
class Context:
    """One audit in progress.

    `work` is a few rows of `full`, for the probes of logits: `rows` says where its rows lie in
    `full`, `first` where its columns begin. `blamed` holds the mechanisms found so far (future,
    company, documents, padding, ...), which later probes must not report a second time.
    """

    subject: Subject
    full: Frame
    work: Frame
    rows: list[int]
    seed: int
    report: Report
    first: int = 0
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

    @cached_property
    def counted(self) -> Tensor:
        """(R, T) bool on `work`: real positions with a target, in either mode."""
        hit = trained(self.readout(False)) | trained(self.readout(True))
        return hit[self.rows][:, self.first :][:, : self.work.ids.shape[1]] & self.work.real

    def weights(self, woken: bool) -> AbstractContextManager[None]:
        return self.subject.box.woken(self.seed) if woken else nullcontext()

    @cached_property
    def tolerance(self) -> float:
        """Relative, for runs of equal shape; grows slowly with depth."""
        depth = sum(1 for m in self.subject.box.modules if m._parameters)
        return float(_ROUNDING.get(self.subject.dtype, 2e-2) * max(1.0, (depth / 100) ** 0.5))

    def bound(self, logits: Tensor, where: Tensor, reshaped: bool = False) -> float:
        """Largest change of logits (R, T, V) at `where` (R, T) that may be rounding."""
        z = logits[where]
        z = z[torch.isfinite(z).any(-1)]
        if not z.numel():
            return 0.0
        z = torch.where(torch.isfinite(z), z, 0.0)
        spread = float((z - z.mean(-1, keepdim=True)).pow(2).mean().sqrt())
        rounding = self.tolerance * (_RESHAPED if reshaped else 1.0)
        return rounding * (spread + 0.05 * float(z.abs().max()))

    def worst(
        self, new: Tensor, base: Tensor, watch: Tensor, reshaped: bool = False
    ) -> tuple[float, int, int] | None:
        """Size, row and column of the largest move at `watch` (R, T); None if it is rounding."""
        change = torch.where(watch, moved(new, base), 0.0)
        if not float(change.max()) > self.bound(base, watch, reshaped):
            return None
        return float(change.max()), *divmod(int(change.argmax()), change.shape[1])

    def finding(
        self, label: str, probe: str, seen: str, remedy: str, hit: tuple[float, int, int]
    ) -> Finding:
        """`hit` is size, row and column on `work`; `seen` may speak of {row}, {t} and {size}."""
        size, b, t = hit
        token, b = int(self.work.ids[b, t]), self.rows[b]
        seen = seen.format(row=b, t=t + self.first, size=f"{size:.3g}")
        return Finding(label, probe, seen, remedy, size, b, t + self.first, token)


def trained(r: Readout) -> Tensor:
    """(B, T) bool: positions that the loss trains on a target."""
    return r.weight.abs().minimum(r.sharp.abs()) > TRAINED * r.weight.abs().max().clamp_min(1e-300)


def moved(a: Tensor, b: Tensor) -> Tensor:
    """(R, T): largest change over the vocabulary; NaN against a number is an infinite change."""
    change = torch.where(a == b, 0.0, (a - b).abs())  # inf - inf
    change = torch.where(torch.isnan(a) & torch.isnan(b), 0.0, change)
    return torch.nan_to_num(change, nan=float("inf")).amax(-1)
