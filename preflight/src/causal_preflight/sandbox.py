"""Put a model back exactly as it was found: parameters, gradients, buffers, modes, attributes."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

_TORCH_OWN = frozenset(vars(nn.Module())) - {"training"}  # bookkeeping of nn.Module itself
_VECTOR_SIZE = 0.5  # root mean square given to a gate or bias that is zero


class Sandbox:
    """Snapshot of a model, with a copy of its parameters: `rewind` before every run of the loss."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.params = list(model.parameters())
        self.values = [p.detach().clone() for p in self.params]
        self.grads = [(p.grad, p.requires_grad) for p in self.params]
        homes = [(vars(m), _TORCH_OWN) for m in self.modules]
        homes += [(m._buffers, frozenset()) for m in self.modules]
        self.saved = [
            (home, own, {k: (v, _content(v)) for k, v in home.items() if k not in own})
            for home, own in homes
        ]
        for p in self.params:
            p.grad = None

    @torch.no_grad()
    def rewind(self, seed: int, train: bool) -> None:
        """Same state, mode and seed for every run; calls `reset()` of modules that have one."""
        self._restore_state()
        root = self.modules[0]
        if not (train and root.training):  # else submodules in eval mode stay in it
            root.train(train)
        for m in self.modules:
            reset = getattr(m, "reset", None)
            if callable(reset):
                with suppress(TypeError):  # takes arguments: not one that clears a hidden state
                    reset()
        torch.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)

    @torch.no_grad()
    def restore(self) -> None:
        """Everything as it was found, gradients included."""
        self._restore_state()
        for p, v, (grad, requires_grad) in zip(self.params, self.values, self.grads, strict=True):
            p.copy_(v)
            p.grad = grad
            p.requires_grad_(requires_grad)

    def _restore_state(self) -> None:
        for home, own, saved in self.saved:
            for k in [k for k in home if k not in own and k not in saved]:
                del home[k]
            for k, (v, content) in saved.items():
                home[k] = v
                if isinstance(v, Tensor):
                    v.detach().copy_(content)  # always: batch norm writes past the version counter
                elif content is not None:
                    v.clear()
                    (v.extend if type(v) is list else v.update)(content)

    @contextmanager
    def rescaled_weights(self, seed: int, add_noise: bool = False) -> Iterator[None]:
        """Context: weights rescaled so that no path is (nearly) zero; `add_noise`: another draw.

        Zeros become noise, small matrices grow to 1/sqrt(fan in): above it, scores would outgrow a
        correct mask of finite values.
        """
        gen = torch.Generator().manual_seed(seed)

        def noise(p: Tensor) -> Tensor:
            return torch.randn(p.shape, generator=gen).to(p)

        try:
            with torch.no_grad():
                for p in self.params:
                    if not (p.requires_grad and p.is_floating_point() and p.numel()):
                        continue
                    size = p.float().pow(2).mean().sqrt().item()
                    wanted = (p.shape[0] / p.numel()) ** 0.5 if p.ndim > 1 else _VECTOR_SIZE
                    if size == 0:
                        p.copy_(noise(p) * wanted)
                    elif size < wanted and (p.ndim > 1 or size < 0.01):
                        p.mul_(wanted / size)
                    if add_noise:
                        p.add_(noise(p) * p.std())
            yield
        finally:
            with torch.no_grad():
                for p, v in zip(self.params, self.values, strict=True):
                    p.copy_(v)


def _content(value: Any) -> Any:
    """What is needed to undo a change made inside `value`."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.copy() if type(value) in (list, dict, set) else None


@contextmanager
def preserved_random_states() -> Iterator[None]:
    """The random states of torch (and its CUDA devices), Python and NumPy return at the end."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    numpy, python = sys.modules.get("numpy"), random.getstate()
    kept = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(cuda):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(kept)
