"""Find tensors in what a model takes and returns, and the slots of the batch that they hold.

A slot is a place in the flattened batch, row * T + column; -1 stands for none.
"""

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from causal_preflight.batch import IGNORE, AuditBatch
from causal_preflight.report import require

KeyPath = tuple[Any, ...]
Layout = tuple[int, ...]
"""Permutation that takes logits to (b, t, V), stacked heads to (k, b, t, V); () for flat (n, V)."""
_TB = (1, 0, 2)  # (t, b, V), which is not told from (b, t, V) where b is t
_ORDERS = {3: ((0, 1, 2), (0, 2, 1), _TB), 4: ((2, 0, 1, 3), (0, 1, 2, 3), (1, 0, 2, 3))}
_NODES = 30  # of the graph that makes the logits, from its end
_CLOSE = 0.6  # fraction of equal ids from which a shifted or altered copy counts as the batch


class Head(NamedTuple):
    """Where logits are made: at `path` of a module's output, the `number`-th for each position.

    They belong `ahead` columns later. `replaceable`: the loss is computed from that output. With a
    `weight`, these are hidden states of which a fused loss makes the logits; `accepted` ones fit.
    """

    module: nn.Module
    path: KeyPath
    layout: Layout
    number: int = 0
    ahead: int = 0
    replaceable: bool = True
    weight: Tensor | None = None
    bias: Tensor | None = None
    accepted: bool = False

    def to_btv(self, t: Tensor, i: int) -> Tensor:
        """The i-th logits (b, t, V), or their gradients, of a tensor that the module puts out."""
        wide = to_btv(t, self.layout)
        return wide[i] if wide.ndim == 4 else wide

    def logits(self, out: Tensor) -> Tensor:
        """The logits (..., V), in float32, of what the module puts out."""
        if self.weight is not None:
            out = F.linear(out.to(self.weight.dtype), self.weight, self.bias).detach()
        return out.float()


def iter_tensors(value: Any, depth: int, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Tensor]]:
    """Tensors in arguments or outputs, at most `depth` levels deep, each with the path to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif len(path) < depth:
        for k, v in _entries(value).items():
            yield from iter_tensors(v, depth, (*path, k))


def get_path(output: Any, path: KeyPath) -> Any:
    """The entry at `path`, None where there is none."""
    for k in path:
        output = _entries(output).get(k)
    return output


def set_path(output: Any, path: KeyPath, value: Any) -> Any:
    """A copy of `output` with the entry at `path` replaced."""
    if not path:
        return value
    k, rest = path[0], path[1:]
    inner = set_path(get_path(output, (k,)), rest, value)
    if isinstance(output, (tuple, list)):
        items = [inner if i == k else x for i, x in enumerate(output)]
        return type(output)(*items) if hasattr(output, "_fields") else type(output)(items)
    new = copy.copy(output)
    (new if isinstance(new, dict) else vars(new))[k] = inner
    return new


def _entries(value: Any) -> dict[Any, Any]:
    if isinstance(value, (tuple, list)):
        return dict(enumerate(value))
    return dict(value) if isinstance(value, dict) else getattr(value, "__dict__", {})


def layouts(shape: torch.Size, ids: torch.Size, vocab: int) -> list[Layout]:
    """Layouts in which a tensor can be the logits of ids (b, t) over at least `vocab` ids."""
    b, t = ids
    if len(shape) == 2:
        return [()] if shape[1] >= vocab and shape[0] <= b * t else []
    found = [o for o in _ORDERS[len(shape)] if shape[o[-3]] == b and shape[o[-1]] >= vocab]
    found = [o for o in found if b != t or o != _TB]
    return [o for o in found if o == (0, 1, 2) or shape[o[-2]] in (t, t - 1)]


def to_btv(t: Tensor, layout: Layout) -> Tensor:
    """Any layout -> (b, t, V), (1, n, V) for flat logits, (k, b, t, V) for stacked heads."""
    return t.permute(layout) if layout else t[None]


def graph(t: Tensor) -> set[Any]:
    """The nodes that a tensor was computed by, each with the number of an output of it."""
    edges, seen = [(t.grad_fn, t.output_nr)], set[Any]()
    while edges:
        if (edge := edges.pop()) not in seen and edge[0] is not None:
            seen.add(edge)
            edges += edge[0].next_functions
    return seen


def slots_of_call(arguments: Any, batch: AuditBatch, used: set[int]) -> Tensor | None:
    """The slots of the largest part of the batch among the arguments of a call, if there is any."""
    found = [locate(t, batch, used) for _, t in iter_tensors(arguments, 3)]
    best = max((slots for slots in found if slots is not None), key=Tensor.numel, default=None)
    used.update([] if best is None else best[:, 0].tolist())  # once: labels may equal the ids
    return best


def locate(t: Tensor, batch: AuditBatch, used: set[int]) -> Tensor | None:
    """The slots (b, t) that a tensor of ids holds, or None if it is not part of the batch.

    Tried in turn: the whole batch, as it is, transposed or flattened, with or without PAD; rows in
    any order and any window of columns; nearly the batch (a BOS put in front, a few ids altered).
    Prefers windows that no earlier call `used`: equal rows of several calls get different slots.
    """
    if t.is_floating_point() or t.dtype == torch.bool or t.ndim not in (1, 2):
        return None
    t, flat, ids = t.to(batch.ids), batch.ids.flatten(), batch.ids
    slots = torch.arange(ids.numel(), device=ids.device).view_as(ids)
    for whole in (slots, slots.T, slots.view(1, -1), slots[batch.real][None]):
        if torch.equal(t if t.ndim == 2 else t[None], flat[whole]):
            return whole
    if t.ndim == 1:
        return None
    hit = _window(t, ids, slots, used)
    return _nearly(t, ids, slots) if hit is None and len(t) == len(ids) else hit


def _window(t: Tensor, ids: Tensor, slots: Tensor, used: set[int]) -> Tensor | None:
    """Rows in any order, at the first start where none was used before (or the fewest were)."""
    best: tuple[int, Tensor] | None = None
    for start in range(ids.shape[1] - t.shape[1] + 1):
        window = slice(start, start + t.shape[1])
        same = (ids[:, window][None] == t[:, None]).all(-1)  # (b, B)
        if not bool(same.any(1).all()):
            continue
        first = slots[:, start].tolist()
        rows: list[int] = []
        for fits in (line.nonzero()[:, 0].tolist() for line in same):
            rows.append(min(fits, key=lambda r: (r in rows, first[r] in used)))
        overlap = len(used & {first[r] for r in rows})
        if best is None or overlap < best[0]:
            best = overlap, slots[rows, window]
        if not overlap:
            break
    return None if best is None else best[1]


def _nearly(t: Tensor, ids: Tensor, slots: Tensor) -> Tensor | None:
    """Rows in order, moved by up to two columns, most ids equal."""
    best, hit = _CLOSE, None
    for shift in (0, -1, 1, -2, 2):
        cols = torch.arange(t.shape[1], device=ids.device) + shift
        inside = (cols >= 0) & (cols < ids.shape[1])
        cols = cols.clamp(0, ids.shape[1] - 1)
        equal = float((t == ids[:, cols])[:, inside].float().mean())
        if equal > best:
            best, hit = equal, torch.where(inside, slots[:, cols], -1)
    return hit


def first_column(logits: Tensor, width: int) -> int | None:
    """The first of `width` columns of hidden states that logits are made of, by their graph.

    None if positions are chosen otherwise than by a slice.
    """
    nodes: list[tuple[Any, int]] = [(logits.grad_fn, 0)]
    starts, chosen = list[int](), False
    for node, start in nodes:  # breadth first
        if node is None:
            continue
        if node.name() == "SliceBackward0" and node._saved_dim == 1:
            size, begin = node._saved_self_sym_sizes[1], node._saved_start
            begin -= 2**64 if begin >= 2**63 else 0  # negative numbers are saved unsigned
            start += begin if begin >= 0 else max(0, size + begin)
            if size == width:
                starts.append(start)
                continue
        chosen |= node.name().startswith(("Index", "Split", "Gather"))
        nodes += [(n, start) for n, _ in node.next_functions if len(nodes) < _NODES]
    return min(starts, default=None if chosen else 0)


def place(
    slots: Tensor, shapes: list[torch.Size], first: int | None, batch: AuditBatch
) -> list[Tensor]:
    """Slots for the logits (b', t', V) that one call of the model gave, in one piece or several.

    Pieces, as of a head applied chunk by chunk, follow each other. Fewer logits than ids begin at
    column `first`, more are the last. Flat ones (1, n, V) are all slots, all but the last column,
    or only those that are real or have a target. UnexaminableError if none of these fits.
    """
    b, widths = len(slots), [s[1] for s in shapes]
    flat, total = b > 1 and all(s[0] == 1 for s in shapes), sum(widths)
    if total < (slots.numel() if flat else slots.shape[1]):
        slots = slots[:, first or 0 :] if flat or first is not None else slots[:, :0]
    if flat:
        wanted = batch.has_target & (batch.label_of_next != IGNORE)
        masks = [m.flatten()[slots] for m in (wanted, batch.has_target, batch.real)]
        options = [slots.flatten(), slots[:, :-1].flatten(), *(slots[m] for m in masks)]
        slots = next((o[None] for o in options if len(o) == total), slots[:, :0])
    elif total > slots.shape[1] > 0:
        slots = torch.cat([slots.new_full((b, total - slots.shape[1]), -1), slots], 1)
    require(slots.shape[1] >= total, "the positions of the logits are unknown")
    return list(slots[:, :total].split(widths, 1))


class EmbeddingNoise(TorchFunctionMode):
    """Adds noise to the looked-up vectors of chosen slots; the head may share the table."""

    def __init__(self, batch: AuditBatch, where: Tensor, seed: int) -> None:
        super().__init__()
        self.batch, self.where, self.seed, self.hits = batch, where, seed, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name not in ("embedding", "__getitem__") or not isinstance(out, Tensor):
            return out
        for _, t in iter_tensors((args[1:] if name == "__getitem__" else args, kwargs), 3):
            slots = locate(t, self.batch, set())
            if slots is not None and out.is_floating_point() and out.shape[:-1] == t.shape:
                hit = (self.where.flatten()[slots] & (slots >= 0)).reshape(t.shape).to(out.device)
                self.hits += int(hit.sum())
                gen = torch.Generator().manual_seed(self.seed)
                noise = torch.randn(out.shape, generator=gen).to(out) * hit[..., None]
                return out + noise * out.detach().float().std().clamp_min(0.1).to(out)
        return out
