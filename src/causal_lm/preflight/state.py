"""Leave no trace: a sandbox that puts a model back exactly as it was found.

The audit runs the model dozens of times, in both modes, on altered weights. Nothing of that may
reach the training run that follows, not even the next random number. What is put back: parameters,
their gradients (also whether there were any) and `requires_grad`; buffers; plain attributes of
modules, where some keep a hidden state; the mode of every submodule; the random state of the CPU
and of every CUDA device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

_TORCH_OWN = frozenset(vars(nn.Module()))  # bookkeeping of nn.Module itself
_AWAKE = 0.5  # size given to a gate or bias that was exactly zero


class Sandbox:
    """Snapshot of a model; `rewind` before every look, `restore` at the end.

    Costs one copy of the parameters in memory while the audit runs.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.modes = [m.training for m in self.modules]
        self.params = list(model.parameters())
        self.values = [p.detach().clone() for p in self.params]
        self.grads = [p.grad for p in self.params]
        self.needs_grad = [p.requires_grad for p in self.params]
        self.buffers = [
            (m, k, b, None if b is None else b.detach().clone())
            for m in self.modules
            for k, b in m._buffers.items()
        ]
        self.attributes = [
            (m, {k: (v, _frozen(v)) for k, v in vars(m).items() if k not in _TORCH_OWN})
            for m in self.modules
        ]
        self.cpu_rng = torch.get_rng_state()
        ready: bool = torch.cuda.is_initialized()
        self.cuda_rng = torch.cuda.get_rng_state_all() if ready else []
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
        for m, mode in zip(self.modules, self.modes, strict=True):
            m.training = mode
        for p, v, g, needs in zip(
            self.params, self.values, self.grads, self.needs_grad, strict=True
        ):
            p.copy_(v)
            p.grad = g
            p.requires_grad_(needs)
        torch.set_rng_state(self.cpu_rng)
        if self.cuda_rng:
            torch.cuda.set_rng_state_all(self.cuda_rng)

    def _restore_state(self) -> None:
        for m, k, b, value in self.buffers:
            m._buffers[k] = b
            if b is not None and value is not None:
                b.copy_(value)  # always: batch norm writes past the version counter
        for m, saved in self.attributes:
            for k in [k for k in vars(m) if k not in _TORCH_OWN and k not in saved]:
                del m.__dict__[k]
            for k, (v, content) in saved.items():
                m.__dict__[k] = v
                _thaw(v, content)

    @contextmanager
    def woken(self, seed: int) -> Iterator[None]:
        """Weights under which every path carries signal; the originals come back on leaving.

        Causality is a property of the architecture: it must hold for any weights. But
        zero-initialised projections and gates hide a leak, and matrices of size 0.02 shrink it
        below rounding. So what is exactly zero gets noise, and small matrices are scaled up to
        1/sqrt(fan in). Large weights are left alone: scaling those further would outgrow
        perfectly good finite masks.
        """
        gen, woken = torch.Generator().manual_seed(seed), []
        try:
            with torch.no_grad():
                for p, v in zip(self.params, self.values, strict=True):
                    if p.requires_grad and p.is_floating_point() and p.numel():
                        woken.append((p, v))
                        if not _wake(p, gen):
                            woken.pop()
            yield
        finally:
            with torch.no_grad():
                for p, v in woken:
                    p.copy_(v)


def _wake(p: Tensor, gen: torch.Generator) -> bool:
    """Was there anything to change?"""
    size = p.float().pow(2).mean().sqrt().item()
    wanted = (p.shape[0] / p.numel()) ** 0.5 if p.ndim > 1 else _AWAKE
    if size == 0:
        p.copy_(torch.randn(p.shape, generator=gen).to(p) * wanted)
    elif size < wanted and (p.ndim > 1 or size < 0.01):
        p.mul_(wanted / size)
    else:
        return False
    return True


def _frozen(value: Any) -> Any:
    """What is needed to undo a change made inside `value`, or None where nothing is kept."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if type(value) in (list, dict, set):
        return value.copy()
    return None


def _thaw(value: Any, content: Any) -> None:
    if isinstance(value, Tensor):
        value.detach().copy_(content)
    elif type(value) is list:
        value[:] = content
    elif type(value) in (dict, set):
        value.clear()
        value.update(content)
