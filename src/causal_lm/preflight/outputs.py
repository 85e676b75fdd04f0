"""Whatever a model returns: find the tensors in it, replace one, and turn logits to (b, t, V)."""

import copy
from typing import Any

from torch import Tensor


def btv(t: Tensor, layout: str) -> Tensor:
    """Any layout -> (b, t, V), or (1, b*t, V) for flat logits."""
    if layout == "bvt":
        return t.transpose(1, 2)
    if layout == "tbv":
        return t.transpose(0, 1)
    return t[None] if layout == "nv" else t


def back(z: Tensor, layout: str, like: Tensor) -> Tensor:
    out = btv(z, layout) if layout in ("bvt", "tbv") else z
    return out.reshape(like.shape)


def floats(output: Any, path: tuple[Any, ...] = ()) -> list[tuple[tuple[Any, ...], Tensor]]:
    """Float tensors in an output with the way to each; at most two levels deep."""
    if isinstance(output, Tensor):
        return [(path, output)] if output.is_floating_point() else []
    if len(path) >= 2 or output is None:
        return []
    if isinstance(output, dict):
        items: list[tuple[Any, Any]] = list(output.items())
    elif isinstance(output, (tuple, list)):
        items = list(enumerate(output))
    else:
        items = list(vars(output).items()) if hasattr(output, "__dict__") else []
    return [hit for k, v in items for hit in floats(v, (*path, k))]


def get(output: Any, path: tuple[Any, ...]) -> Any:
    for k in path:
        try:
            output = output[k] if isinstance(output, (dict, tuple, list)) else getattr(output, k)
        except (KeyError, IndexError, AttributeError):
            return None
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
    if isinstance(new, dict):
        new[k] = inner
    else:
        object.__setattr__(new, k, inner)
    return new
