"""Registry of set-ups: right ones, and faulty ones that are each one edit away from one.

A set-up is a function of a seed that returns (model, batch, loss_fn, keywords of preflight).
`@right` registers one that must raise no alarm, `@faulty(label, twin)` one that must be named.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .parts import EOS, PAD, Batch, Tiny, padded, token_mean

Setup = tuple[nn.Module, Batch, Any, dict[str, Any]]
RIGHT: dict[str, Callable[[int], Setup]] = {}
FAULTY: dict[str, tuple[str, str, Callable[[int], Setup]]] = {}
KNOWN = {"pad_id": PAD, "eos_id": EOS}


def right(build: Callable[[int], Setup]) -> Callable[[int], Setup]:
    RIGHT[build.__name__] = build
    return build


def faulty(label: str, twin: Callable[[int], Setup]) -> Callable[..., Any]:
    def register(build: Callable[[int], Setup]) -> Callable[[int], Setup]:
        FAULTY[build.__name__] = (label, twin.__name__, build)
        return build

    return register


def case(
    make: Callable[[], nn.Module] = Tiny,
    batch: Callable[[int], Batch] = padded,
    loss: Any = token_mean,
    **kw: Any,
) -> Callable[[int], Setup]:
    """The common shape of a case: a model, a batch and a loss, all seeded."""

    def build(seed: int) -> Setup:
        torch.manual_seed(seed)
        return make().eval() if seed % 2 else make(), batch(seed), loss, {**KNOWN, **kw}

    return build


def add_right(name: str, build: Callable[[int], Setup]) -> Callable[[int], Setup]:
    build.__name__ = name
    return right(build)


def add(label: str, twin: Callable[[int], Setup], name: str, build: Callable[[int], Setup]) -> None:
    build.__name__ = name
    faulty(label, twin)(build)


class Cases:
    """A collection of its own: right set-ups by name, faulty ones with label and right twin."""

    def __init__(self) -> None:
        self.right: dict[str, Callable[[int], Setup]] = {}
        self.faulty: dict[str, tuple[str, str, Callable[[int], Setup]]] = {}

    def add_right(self, name: str, build: Callable[[int], Setup]) -> Callable[[int], Setup]:
        build.__name__ = name
        self.right[name] = build
        return build

    def add(
        self, label: str, twin: Callable[[int], Setup], name: str, build: Callable[[int], Setup]
    ) -> None:
        self.faulty[name] = label, twin.__name__, build

    def pair(self, name: str, right: Callable[[int], Setup], **faulty: Any) -> None:
        """A right set-up; and each `label_detail=build` that is one edit away from it."""
        twin = self.add_right(name, right)
        for key, build in faulty.items():
            self.add(key.partition("_")[0], twin, f"{name}: {key}", build)
