"""Leave no trace: a sandbox that puts a model back exactly as it was found.

What is put back: parameters, their gradients (also whether there were any) and `requires_grad`;
buffers; plain attributes of modules, where some keep a hidden state; the mode of every submodule.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_TORCH_OWN = frozenset(vars(nn.Module())) - {"training"}  # bookkeeping of nn.Module itself
_AWAKE = 0.5  # size given to a gate or bias that was exactly zero


class Sandbox:
    """Snapshot of a model; `rewind` before every look, `restore` at the end.

    Costs one copy of the parameters in memory while the audit runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.params = list(model.parameters())
        self.values = [p.detach().clone() for p in self.params]
        self.grads = [(p.grad, p.requires_grad) for p in self.params]
        homes = [(vars(m), _TORCH_OWN) for m in self.modules]
        homes += [(m._buffers, frozenset()) for m in self.modules]
        self.saved = [
            (home, own, {k: (v, _frozen(v)) for k, v in home.items() if k not in own})
            for home, own in homes
        ]
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def rewind(self, seed: int, train: bool) -> None:
        """The same starting point for every look: state, mode and seed; `reset()` where offered."""
        self._restore_state()
        for m in self.modules:
            m.training = train
            reset = getattr(m, "reset", None)
            if callable(reset):
                try:
                    reset()
                except TypeError:  # needs arguments: not the kind that clears a hidden state
                    continue
        torch.manual_seed(seed)

    @torch.no_grad()
    def restore(self) -> None:
        self._restore_state()
        for p, v, (grad, needs) in zip(self.params, self.values, self.grads, strict=True):
            p.copy_(v)
            p.grad = grad
            p.requires_grad_(needs)

    def _restore_state(self) -> None:
        for home, own, saved in self.saved:
            for k in [k for k in home if k not in own and k not in saved]:
                del home[k]
            for k, (v, content) in saved.items():
                home[k] = v
                if isinstance(v, Tensor):
                    v.detach().copy_(content)  # always: batch norm writes past the version counter
                elif type(v) is list:
                    v[:] = content
                elif type(v) in (dict, set):
                    v.clear()
                    v.update(content)

    @contextmanager
    def rescaled_weights(self, seed: int, stir: bool = False) -> Iterator[None]:
        """Weights under which every path carries signal; the originals come back on leaving.

        Causality is a property of the architecture: it must hold for any weights. But
        zero-initialised projections and gates hide a leak, and matrices of size 0.02 shrink it
        below rounding. So what is exactly zero gets noise, and small matrices are scaled up to
        1/sqrt(fan in). Large weights are left alone: scaling those further would outgrow
        perfectly good finite masks. `stir` adds noise of the size of each, for another draw.
        """
        gen = torch.Generator().manual_seed(seed)
        try:
            with torch.no_grad():
                for p in self.params:
                    if p.requires_grad and p.is_floating_point() and p.numel():
                        _wake(p, gen)
                        if stir:
                            p.add_(torch.randn(p.shape, generator=gen).to(p) * p.std())
            yield
        finally:
            with torch.no_grad():
                for p, v in zip(self.params, self.values, strict=True):
                    p.copy_(v)


def _wake(p: Tensor, gen: torch.Generator) -> None:
    size = p.float().pow(2).mean().sqrt().item()
    wanted = (p.shape[0] / p.numel()) ** 0.5 if p.ndim > 1 else _AWAKE
    if size == 0:
        p.copy_(torch.randn(p.shape, generator=gen).to(p) * wanted)
    elif size < wanted and (p.ndim > 1 or size < 0.01):
        p.mul_(wanted / size)


def _frozen(value: Any) -> Any:
    """What is needed to undo a change made inside `value`."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if type(value) in (list, dict, set) else None
