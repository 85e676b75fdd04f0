"""Whatever a model returns: find the tensors in it, replace one, and turn logits to (b, t, V)."""

import copy
from typing import Any

import torch
from torch import Tensor

# How to permute logits to (b, t, V), which is also the way back; () for flat ones (n, V).
Layout = tuple[int, ...]


def layouts(shape: torch.Size, ids: torch.Size, need: int) -> list[Layout]:
    """Layouts in which a tensor may be the logits of a call with ids (b, t) over >= need ids."""
    b, t = ids
    if len(shape) == 2:
        return [()] if shape[1] >= need and shape[0] <= b * t else []
    fits = {
        (0, 1, 2): shape[0] == b,
        (0, 2, 1): shape[0] == b and shape[2] in (t, t - 1),
        (1, 0, 2): shape[1] == b != t and shape[0] in (t, t - 1),
    }
    return [layout for layout, fit in fits.items() if fit and shape[layout[2]] >= need]


def to_btv(t: Tensor, layout: Layout) -> Tensor:
    """Any layout -> (b, t, V), or (1, n, V) for flat logits."""
    return t.permute(layout) if layout else t[None]


def iter_float_tensors(
    output: Any, path: tuple[Any, ...] = ()
) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Float tensors in an output with the way to each; at most two levels deep."""
    if isinstance(output, Tensor):
        return [(path, output)] if output.is_floating_point() else []
    inner = _parts(output).items() if len(path) < 2 else ()
    return [hit for k, v in inner for hit in iter_float_tensors(v, (*path, k))]


def get(output: Any, path: tuple[Any, ...]) -> Any:
    for k in path:
        output = _parts(output).get(k)
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


def _parts(output: Any) -> dict[Any, Any]:
    if isinstance(output, (tuple, list)):
        return dict(enumerate(output))
    return dict(output) if isinstance(output, dict) else getattr(output, "__dict__", {})
