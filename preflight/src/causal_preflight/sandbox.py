"""Put a model back exactly as it was found: parameters, gradients, buffers, modes, attributes."""

import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager, suppress
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_TORCH_OWN = frozenset(vars(nn.Module())) - {"training"}  # bookkeeping of nn.Module itself
_BASIC = {"builtins", "abc", "typing", "types", "collections"}  # packages of plain objects
_LARGE = 10_000  # entries above which those of a container are not looked into
_LARGE_TENSOR = 2**26  # values above which a tensor that is no buffer is not copied
_ATOMS = (str, bytes, int, float, type, type(None), FunctionType, MethodType, ModuleType)
_VECTOR_SIZE = 0.5  # root mean square given to a gate or bias that is zero


class Sandbox:
    """Snapshot of a model, with a copy of its parameters: `rewind` before every run of the loss."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = list(model.modules())
        self.params = list(model.parameters())
        self.values = [p.detach().clone() for p in self.params]
        self.undo, held = _undo_changes(self.modules)
        self.grads = [(p, p.grad, p.requires_grad) for p in [*self.params, *held]]
        for p, _, _ in self.grads:
            p.grad = None
        # An optimizer that steps inside backward would train the model.
        found = [hooks for p in self.params if (hooks := p._post_accumulate_grad_hooks)]
        self.hooks = [(hooks, dict(hooks)) for hooks in found]
        for hooks in found:
            hooks.clear()

    @torch.no_grad()
    def rewind(self, seed: int, train: bool) -> None:
        """Same state, mode and seed for every run; calls `reset()` of modules that have one."""
        self._restore_state()
        root = self.modules[0]
        if not (train and root.training):  # else submodules in eval mode stay in it
            root.train(train)
        torch.manual_seed(seed)
        random.seed(seed)
        if "numpy" in sys.modules:
            sys.modules["numpy"].random.seed(seed % 2**32)
        for m in self.modules:
            if callable(reset := getattr(m, "reset", None)):
                kept = [(p, p.clone()) for p in m.parameters()]  # some draw new weights
                with suppress(TypeError):  # takes arguments: not one that clears a hidden state
                    reset()
                for p, value in kept:
                    p.copy_(value)

    @torch.no_grad()
    def restore(self) -> None:
        """Everything as it was found, gradients included."""
        self._restore_state()
        for p, v in zip(self.params, self.values, strict=True):
            p.copy_(v)
        for p, grad, requires_grad in self.grads:
            p.grad = grad
            p.requires_grad_(requires_grad)
        for hooks, were in self.hooks:
            hooks.update(were)

    def _restore_state(self) -> None:
        for undo in self.undo:
            undo()

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
                        p.add_(noise(p) * p.std(correction=0))
            yield
        finally:
            with torch.no_grad():
                for p, v in zip(self.params, self.values, strict=True):
                    p.copy_(v)


def _undo_changes(modules: list[nn.Module]) -> tuple[list[Callable[[], Any]], list[nn.Parameter]]:
    """Calls that put back what modules hold now, and parameters of modules in plain containers.

    Containers are followed, and objects whose class comes from a package of the model's modules or
    from Python's basic types: trainers, loggers and data loaders are left alone.
    """
    packages = {type(m).__module__.partition(".")[0] for m in modules} - {"torch", "lightning"}
    packages |= _BASIC
    own = {id(p) for m in modules for p in m._parameters.values()}
    buffers = {id(b) for m in modules for b in m._buffers.values()}
    pending, seen, undo, held = list[Any](modules), set[int](), list[Callable[[], Any]](), []
    for value in pending:  # which grows, and keeps alive what `seen` numbers
        if id(value) in seen or isinstance(value, _ATOMS):
            continue
        seen.add(id(value))
        if isinstance(value, nn.Parameter):
            held += [] if id(value) in own else [value]
        elif isinstance(value, Tensor):
            dense = value.layout == torch.strided and torch._debug_has_internal_overlap(value) != 1
            is_kept = id(value) in buffers or value.numel() <= _LARGE_TENSOR
            if dense and is_kept and not value.is_inference():  # what can change in place
                undo.append(partial(value.detach().copy_, value.detach().clone()))
        elif isinstance(value, torch.Generator):
            undo.append(partial(value.set_state, value.get_state()))
        elif isinstance(value, list | dict | set | deque):
            content = dict(value) if isinstance(value, dict) else list(value)
            undo.append(partial(_put_back, value, content))
            if len(content) <= _LARGE:
                pending += content.values() if isinstance(content, dict) else content
        elif isinstance(value, tuple):
            pending += value
        elif isinstance(value, nn.Module):
            content = {k: v for k, v in vars(value).items() if k not in _TORCH_OWN}
            undo.append(partial(_put_back, vars(value), content, _TORCH_OWN))
            pending += [*content.values(), value._buffers]
            pending += [*value._parameters.values(), *value._modules.values()]
        elif hasattr(value, "__dict__") and (
            isinstance(value, torch.amp.GradScaler)
            or packages.issuperset(c.__module__.partition(".")[0] for c in type(value).__mro__)
        ):
            pending.append(vars(value))
    return undo, held


def _put_back(value: Any, content: Any, but: Set[str] = frozenset()) -> None:
    """Give a container its content again, `but` some keys, by the methods of its plain base."""
    kind: Any = next(k for k in (list, OrderedDict, dict, set, deque) if isinstance(value, k))
    if but:
        for k in value.keys() - content.keys() - but:
            del value[k]
    else:
        kind.clear(value)
    (kind.update if isinstance(value, dict | set) else kind.extend)(value, content)


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
