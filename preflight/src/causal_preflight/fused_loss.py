"""Audit a loss that hands out no logits: rebuild them from hidden states and the head's weights.

Fused linear cross-entropies (Liger, cut-cross-entropy, chunks under checkpointing) take the last
hidden states h and the weights W of the head. With h = 0 all logits are equal but for a bias, and
a target y of weight w leaves the gradient w (sum_v p_v W_v - W_y) at h: its direction names y.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_preflight import gradient_fit, locate
from causal_preflight.batch import AuditBatch
from causal_preflight.instrumented_model import InstrumentedModel, Observation, Readout

_TRIED = 6  # hidden states tried, the last one first
_FITS = 0.8  # twice the residual below which hidden states and head belong together
_CHUNK = 2**22  # values fitted at a time


@dataclass(eq=False)
class FusedLossModel(InstrumentedModel):
    """An InstrumentedModel; without logits, `weight` (V, D) and `bias` (V,) or None make them."""

    weight: Tensor | None = None
    bias: Tensor | None = None

    def find_head(self, batch: AuditBatch) -> bool:
        """Find the hidden states and the head that a fused loss is given; False: there are none."""
        before, best = (self.logits_module, self.path, self.layout, self.replaceable), _FITS
        found: tuple[Any, ...] = (*before, None, None)
        top, hidden = int(batch.ids.max()), self._hidden(batch)
        for module, path, layout, width in islice(reversed(hidden), _TRIED):
            for weight, bias in self._heads(top, width):
                self._use(module, path, layout, True, weight, bias)
                with suppress(RuntimeError):
                    r = self.readout(batch, True)
                    if r.residual < 0.5 * best and self.replaceable and bool(r.trained.any()):
                        found = (module, path, layout, True, weight, bias)
                        best = max(r.residual, 1e-3)
        self._use(*found)
        return self.weight is not None

    def _use(self, *found: Any) -> None:
        self.logits_module, self.path, self.layout, self.replaceable = found[:4]
        self.weight, self.bias = found[4:]

    def _hidden(self, batch: AuditBatch) -> list[tuple[nn.Module, locate.KeyPath, Any, int]]:
        """Outputs of modules (b, t, D) or (n, D) in the order of calls, with their widths."""
        found: dict[int, tuple[nn.Module, locate.KeyPath, Any, int, Tensor]] = {}

        def after(module: nn.Module, args: Any, output: Any) -> None:
            for path, t in locate.iter_tensors(output, 2):
                usable = t.requires_grad and t.ndim in (2, 3)
                fits = locate.layouts(t.shape, batch.ids.shape, 1) if usable else []
                if fits and fits[0] in ((), (0, 1, 2)):
                    found.setdefault(id(t), (module, path, fits[0], t.shape[-1], t))

        self.run(batch, True, [m.register_forward_hook(after) for m in self.sandbox.modules])
        return [hit[:4] for hit in found.values()]

    def _heads(self, top: int, width: int) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Matrices (V, width) with V above the largest id, and their biases; the last one first."""
        for module in reversed(self.sandbox.modules):
            for p in module.parameters(recurse=False):
                if p.ndim == 2 and p.shape[1] == width and len(p) > top:
                    yield p, getattr(module, "bias", None)

    def observe(self, batch: AuditBatch, train: bool = False) -> Observation:
        """Run the loss and keep the logits, rebuilt where the loss makes them."""
        seen = super().observe(batch, train)
        if self.weight is None:
            return seen
        bias = None if self.bias is None else self.bias.detach().float()
        return replace(seen, logits=F.linear(seen.logits, self.weight.detach().float(), bias))

    def readout(self, batch: AuditBatch, train: bool = False) -> Readout:
        """As for visible logits. A loss that is not the sum of the terms found is a residual."""
        r = super().readout(batch, train)
        if self.weight is not None and self.replaceable and bool((r.weight != 0).any()):
            nll = -self._at_zero().log()[r.target]
            expected = float((nll * r.weight).sum())
            r.residual = max(r.residual, min(1.0, abs(r.loss / expected - 1)))
        return r

    def stand_in(self, width: int) -> Tensor:
        """Zero in place of hidden states."""
        return super().stand_in(width) if self.weight is None else torch.zeros(width)

    def fit(self, logits: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, float]:
        """`gradient_fit.fit` of the logits, from the gradient (b, t, D) of hidden states 0."""
        if self.weight is None:
            return gradient_fit.fit(logits, grad)
        w = self.weight.detach().double()
        by_target = self._at_zero() @ w - w
        norm, parts, rest = by_target.norm(dim=1), list[Tensor](), 0.0
        flat = grad.reshape(-1, grad.shape[-1]).double().nan_to_num(0.0, 0.0, 0.0)
        for g in flat.split(max(1, _CHUNK // len(w))):
            along = g @ by_target.T / norm
            y = along.abs().argmax(-1)
            size = along.gather(1, y[:, None])[:, 0] / norm[y]
            rest += float((g - size[:, None] * by_target[y]).pow(2).sum())
            parts.append(torch.stack([y.double(), size, size, g.abs().amax(1), 0 * size]))
        target, *values = torch.cat(parts, 1).view(5, *grad.shape[:-1])
        return target.long(), torch.stack(values), (rest / float(flat.pow(2).sum() or 1)) ** 0.5

    def _at_zero(self) -> Tensor:
        """(V,) probabilities of the hidden state 0."""
        assert self.weight is not None
        z = torch.zeros(len(self.weight)) if self.bias is None else self.bias.detach()
        return z.to(self.weight.device).double().softmax(0)
