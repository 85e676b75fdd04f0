"""Find tensors in whatever a model returns, replace one of them, and bring logits to (b, t, V)."""

import copy
from typing import Any

import torch
from torch import Tensor

Layout = tuple[int, ...]
"""Permutation that takes logits to (b, t, V), and back; () for flat logits (n, V)."""


def layouts(shape: torch.Size, ids: torch.Size, vocab: int) -> list[Layout]:
    """Layouts in which a tensor can be the logits of ids (b, t) over at least `vocab` ids."""
    b, t = ids
    if len(shape) == 2:
        return [()] if shape[1] >= vocab and shape[0] <= b * t else []
    fits = {
        (0, 1, 2): shape[0] == b,
        (0, 2, 1): shape[0] == b and shape[2] in (t, t - 1),
        (1, 0, 2): shape[1] == b != t and shape[0] in (t, t - 1),
    }
    return [layout for layout, fit in fits.items() if fit and shape[layout[2]] >= vocab]


def to_btv(t: Tensor, layout: Layout) -> Tensor:
    """Any layout -> (b, t, V), or (1, n, V) for flat logits."""
    return t.permute(layout) if layout else t[None]


def iter_float_tensors(output: Any, path: tuple = ()) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Float tensors in an output, at most two levels deep, each with the path to it."""
    if isinstance(output, Tensor):
        return [(path, output)] if output.is_floating_point() else []
    inner = _entries(output).items() if len(path) < 2 else ()
    return [hit for k, v in inner for hit in iter_float_tensors(v, (*path, k))]


def get(output: Any, path: tuple[Any, ...]) -> Any:
    """The entry at `path`, None where there is none."""
    for k in path:
        output = _entries(output).get(k)
    return output


def put(output: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of `output` with the entry at `path` replaced."""
    if not path:
        return value
    k, rest = path[0], path[1:]
    inner = put(get(output, (k,)), rest, value)
    if isinstance(output, (tuple, list)):
        items = [inner if i == k else x for i, x in enumerate(output)]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    new = copy.copy(output)
    (new if isinstance(new, dict) else vars(new))[k] = inner
    return new


def _entries(output: Any) -> dict[Any, Any]:
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    return dict(output) if isinstance(output, dict) else getattr(output, "__dict__", {})
