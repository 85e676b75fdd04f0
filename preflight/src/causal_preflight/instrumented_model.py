"""Run any loss on an edited batch, and catch the logits on their way from the model into the loss.

The *input module* is the first that is called with the token ids. A *head* puts out logits: tensors
whose gradient looks like that of a cross-entropy. One head is looked at at a time.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from causal_preflight import locate
from causal_preflight.batch import AuditBatch
from causal_preflight.gradient_fit import EXACT, Readout, fit, fit_hidden, is_distribution
from causal_preflight.locate import Head
from causal_preflight.report import require
from causal_preflight.sandbox import Sandbox

_NO_LOGITS = 0.5  # residual of the fit above which a tensor is not logits
_NO_HEAD = 0.2  # residual above which it is not those of a further head
_NO_GRADIENT = 0.4  # residual assumed for a tensor without a gradient
_MAX_FITTED = 2**21  # values fitted per tensor: enough to tell logits from hidden states
_STATES = (), (0, 1, 2), (1, 0, 2)  # layouts of hidden states
_NARROW = 8  # width below which their gradient fits the row of some target by chance
_SMALL_NOISE = 3e-3  # logits small enough that a cap or scale of them is a factor
LossFn = Callable[[Any, Any], Tensor]
Piece = tuple[Tensor, Tensor, int]
"""Slots (b, t); a tensor of logits; which of the heads that it stacks"""


class Observation(NamedTuple):
    """Loss of one run, its logits in float32 (B, T, V), and where there are any: `made` (B, T)."""

    loss: float
    logits: Tensor
    made: Tensor


@dataclass(eq=False)
class InstrumentedModel:
    """A model with its loss, run again and again from the same state.

    `forwards` counts the runs; `dtype` is the lowest precision that a module puts out; `frozen`:
    the embedding gets no gradient; `head` is looked at, one of `heads`, and its module has `count`
    of them; `always_train` runs it in train mode alone. `outputs`: hidden states, and their width.
    """

    module: nn.Module
    loss_fn: LossFn | None
    sandbox: Sandbox
    seed: int
    rebuild: Callable[[dict[str, Any]], Any]
    parted: bool = False
    forwards: int = 0
    input_module: nn.Module | None = None
    heads: list[Head] = field(default_factory=list)
    head: Head = field(init=False)
    outputs: list[tuple[Head, int]] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    frozen: bool = False
    always_train: bool = False
    count: int = 1

    def run(self, batch: AuditBatch, train: bool = False, hooks: Iterable[Any] = ()) -> Tensor:
        """The loss with its graph, always from the same state and seed; `hooks` are removed."""
        at, noise = batch.noised, None
        self.forwards += 1
        try:
            raws = [
                {k: v.clone() if isinstance(v, Tensor) else v for k, v in part.raw.items()}
                for part in (batch.halves() if self.parted else [batch])
            ]
            noise = None if at is None else locate.EmbeddingNoise(batch, at, self.seed)
            self.sandbox.rewind(self.seed, train or self.always_train)
            with torch.enable_grad(), noise or nullcontext():
                loss = (self.loss_fn or loss_of_model)(self.module, *map(self.rebuild, raws))
        finally:
            for hook in hooks:
                hook.remove()
        found = noise is None or noise.hits or not bool(noise.where.any())
        require(found, "the lookup of the embeddings was not found")
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("loss_fn must return the scalar training loss as a tensor")
        return loss

    def grads(self, loss: Tensor, tensors: list[Any]) -> list[Tensor | None]:
        """Gradients by `backward`, as checkpointing needs; leaves of `loss_fn` keep their own."""
        own = set(map(id, [*self.sandbox.params, *tensors]))
        leaves = [node.variable for node, _ in locate.graph(loss) if hasattr(node, "variable")]
        kept = [(leaf, leaf.grad) for leaf in leaves if id(leaf) not in own]
        for leaf, _ in kept:
            leaf.grad = None
        if loss.requires_grad:  # else the loss has called it itself
            loss.backward()
        grads = [t.grad for t in tensors]
        for leaf, grad in [*kept, *((p, None) for p in self.sandbox.params)]:
            leaf.grad = grad
        return grads

    def discover(self, batch: AuditBatch, top: int) -> None:
        """Find input module and heads; `top` is the largest id that embeddings must hold."""
        found: dict[tuple[int, locate.Layout], tuple[Head, Tensor]] = {}
        used, slots, last = set[int](), list[Tensor](), None  # of the current call
        vocab = 1 + int(max(batch.ids.max(), 0 if batch.labels is None else batch.labels.max()))

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if (hit := locate.slots_of_call((args, kwargs), batch, used)) is not None:
                rows = module.num_embeddings if isinstance(module, nn.Embedding) else top + 1
                if top >= rows and args and int(args[0].max()) == int(batch.ids.max()):
                    raise IndexError(f"id {top} is looked up in an embedding of {rows} rows")
                slots[:] = [hit]
                self.input_module = module if self.input_module is None else self.input_module

        def after(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal last
            for path, t in locate.iter_tensors(output, 2):
                if t.is_floating_point() and t.dtype.itemsize < self.dtype.itemsize:
                    self.dtype = t.dtype
                if slots and t.requires_grad and t.ndim in (2, 3, 4):
                    last = t
                    # A parent may return the tensor of its child: the first counts.
                    for layout in locate.layouts(t.shape, slots[0].shape, min(_NARROW, vocab)):
                        found.setdefault((id(t), layout), (Head(module, path, layout), t))
                        if locate.to_btv(t, layout).shape[-1] >= vocab:
                            t.retain_grad()

        modules = self.sandbox.modules
        hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in modules]
        loss = self.run(batch, True, hooks + [m.register_forward_hook(after) for m in modules])
        states = [hit for hit in found.values() if hit[0].layout in _STATES]
        self.outputs = [(head, t.shape[-1]) for head, t in states if t.shape[-1] >= _NARROW]
        wide = [(head, t) for head, t in found.values() if t.retains_grad]
        tables = [m.weight for m in modules if isinstance(m, nn.Embedding)]
        grads = self.grads(loss, [t for _, t in wide] + tables)
        self.frozen = bool(tables) and all(g is None for g in grads[len(wide) :])
        best: dict[int, tuple[float, Head, Tensor]] = {}
        for i, (head, t) in enumerate(wide):
            if (g := grads[i]) is None:
                continue
            few = slice(None, None, 1 + t.numel() // _MAX_FITTED)
            z, g = (locate.to_btv(x, head.layout).flatten(0, -2)[few] for x in (t.detach(), g))
            # Without a gradient (NaN loss, no target), the last tensor of the right shape is taken.
            blank = not bool(torch.isfinite(g).all()) or not bool((g != 0).any())
            residual = _NO_GRADIENT if blank else max(1e-5, fit(z[None], g[None])[2])
            # Of tensors that are made of one another, one is taken; others are further heads.
            past = locate.graph(t) if best else set()
            rivals = [n for n, (*_, s) in best.items() if blank or (s.grad_fn, s.output_nr) in past]
            least = min((best[n][0] for n in rivals), default=2 * _NO_LOGITS)
            # Soft targets: the gradient of each softmax sums to 0, whatever its target.
            soft = (
                not best and t is last and bool((g.sum(-1).abs() <= 1e-4 * g.abs().sum(-1)).all())
            )
            if residual < 0.5 * least or (blank and least >= _NO_GRADIENT) or soft:
                best = {n: hit for n, hit in best.items() if n not in rivals}
                best[i] = residual, head, t
        most = max(_NO_HEAD, min((hit[0] for hit in best.values()), default=0.0))
        self.heads = list(dict.fromkeys(head for rest, head, _ in best.values() if rest <= most))

    def observe(self, batch: AuditBatch, train: bool = False) -> Observation:
        """Run the loss and keep the logits; they are NaN where none were made."""
        loss, placed = self._catch(batch, train, lambda t: t)
        head = self.head
        pieces = [(slots, head.logits(head.to_btv(t.detach(), i))) for slots, t, i in placed]
        size, vocab = batch.ids.numel(), pieces[0][1].shape[-1]
        logits = torch.full((size, vocab), float("nan"), device=batch.ids.device)
        made = torch.zeros(size, dtype=torch.bool, device=logits.device)
        for slots, t in pieces:
            keep = slots >= 0
            made[slots[keep]] = True
            logits[slots[keep]] = t.to(logits.device)[keep]
        shape = batch.ids.shape
        return Observation(float(loss.detach()), logits.view(*shape, -1), made.view(shape))

    def gradients(
        self, batch: AuditBatch, train: bool = False, noise_size: float = 1.0
    ) -> tuple[float, list[tuple[Tensor, Tensor, Tensor]]]:
        """The loss; and of each piece of logits the slots, the logits and d loss / d logits.

        The logits are replaced by the same moderate noise at every position, as large or NaN logits
        would make a fit inaccurate, unless the module that returns them also computes the loss.
        Hidden states are replaced by 0.
        """
        head = self.head

        def stand_in(t: Tensor) -> Tensor:
            if head.weight is not None:
                t = torch.zeros_like(t).requires_grad_()
            elif head.replaceable:
                gen = torch.Generator().manual_seed(0)  # fixed: independent of the audit's seed
                wide = locate.to_btv(t.detach().float(), head.layout)
                noise = noise_size * torch.randn(wide.shape[-1], generator=gen).to(wide.device)
                noise = noise.softmax(-1) if is_distribution(wide) else noise
                z = torch.where(torch.isneginf(wide), wide, noise)
                back = sorted(range(len(head.layout)), key=head.layout.__getitem__)
                t = (z.permute(back) if back else z[0]).contiguous().requires_grad_()
            elif t.requires_grad:
                t.retain_grad()
            return t

        loss, placed = self._catch(batch, train, stand_in)
        grads = self.grads(loss, [leaf for _, leaf, _ in placed])
        if head.replaceable and head.weight is None and all(g is None for g in grads):
            self.head = head._replace(replaceable=False)
            return self.gradients(batch, train)
        pairs = [(*piece, g) for piece, g in zip(placed, grads, strict=True) if g is not None]

        def wide(t: Tensor, i: int) -> Tensor:
            return head.to_btv(t.detach(), i).to(batch.ids.device)

        return float(loss.detach()), [(slots, wide(z, i), wide(g, i)) for slots, z, i, g in pairs]

    def readout(self, batch: AuditBatch, train: bool = False, noise_size: float = 1.0) -> Readout:
        """Run the loss and read targets and weights off d loss / d logits.

        Where the fit is not exact, it is tried with small noise: what the loss does to the logits
        first, a cap or a scale, is a factor s there. Then weight is w s^2, onehot_weight w s.
        """
        loss, pieces = self.gradients(batch, train, noise_size)
        ids, head, weight = batch.ids, self.head, self.head.weight
        exact = torch.float32 if ids.device.type == "mps" else torch.float64
        target = torch.full((ids.numel(),), -1, device=ids.device)
        values, residual = torch.zeros(4, ids.numel(), dtype=exact, device=ids.device), 0.0
        for slots, z, g in pieces:
            y, new, rest = fit(z, g) if weight is None else fit_hidden(g, weight, head.bias)
            keep = slots >= 0
            slots, y, new = slots[keep], y[keep], new[:, keep].to(exact)
            stronger = new[0].abs() >= values[0, slots].abs()
            target[slots] = torch.where(stronger, y, target[slots])
            values.index_add_(1, slots, new)
            residual = max(residual, rest)
        if weight is not None:
            residual = 0.0 if head.accepted else residual
            log_p = head.logits(torch.zeros_like(weight[:1])).log_softmax(-1)[0].to(values)
            total, mean = float(values[0].sum()), -float(log_p[target] @ values[0])
            # Scaled logits or smoothed labels change the weights; those of a mean add up to 1.
            if mean and abs(loss / mean * total - 1) < 0.02 and abs(total - 1) > 1e-3:
                values /= total
        values = values.view(4, *ids.shape)
        r = Readout(loss, residual, len(pieces), target.view(ids.shape), *values)
        if weight is None and residual > EXACT and head.replaceable and noise_size > _SMALL_NOISE:
            other = self.readout(batch, train, _SMALL_NOISE)
            if other.residual < 0.1 * residual:
                r, r.scaled = other, True
                r.weight = (r.onehot_weight**2 / r.weight).nan_to_num(0.0)
        return r

    def _catch(
        self, batch: AuditBatch, train: bool, edit: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, list[Piece]]:
        """The loss, and the pieces of logits of the head, as `edit` passes them."""
        head, width, placed = self.head, batch.ids.shape[1], list[Piece]()
        assert self.input_module is not None
        used, calls = set[int](), list[tuple[Tensor, list[tuple[Tensor, int | None]]]]()
        self.count = 0

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            slots = locate.slots_of_call((args, kwargs), batch, used)
            # An embedding that looks up the coming tokens for a further head is no new pass.
            again = isinstance(module, nn.Embedding) and calls and slots is not None
            if slots is not None and not (again and torch.isin(slots, calls[-1][0]).any()):
                calls.append((slots, []))

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            t = locate.get_path(output, head.path)
            if not calls or not isinstance(t, Tensor) or t.ndim != (len(head.layout) or 2):
                return None
            slots, made = calls[-1]
            made.append((new := edit(t), locate.first_column(t, slots.shape[1])))
            # A copy: a loss may edit its logits in place, which is forbidden for leaves.
            return None if new is t else locate.set_path(output, head.path, new.clone())

        hooks = [self.input_module.register_forward_pre_hook(before, with_kwargs=True)]
        loss = self.run(batch, train, [*hooks, head.module.register_forward_hook(after)])
        for slots, made in calls:
            room = slots.shape[1] if head.layout else slots.numel()
            number, left, mine = 0, 0, []
            for t, first in made:
                for i in range(t.shape[head.layout[0]] if t.ndim == 4 else 1):
                    # Chunks of a head fit beside each other; where they do not, the next begins.
                    size = head.to_btv(t, i).shape[1]
                    number, left = (number, left) if size <= left else (number + 1, room)
                    left -= size
                    mine += [(t, first, i)] if number == head.number + 1 else []
            self.count = max(self.count, number)
            shapes = [head.to_btv(t, i).shape for t, _, i in mine]
            where = locate.place(slots, shapes, mine[0][1], batch) if mine else []
            for slots, (t, _, i) in zip(where, mine, strict=True):
                inside = (slots >= 0) & (slots % width < width - head.ahead)
                placed.append((torch.where(inside, slots + head.ahead, -1), t, i))
        require(placed, "the logits were not seen in this run")
        return loss, placed


def loss_of_model(model: Any, batch: Any) -> Tensor:
    loss = locate.get_path(model(**batch), ("loss",)) if isinstance(batch, Mapping) else None
    if not isinstance(loss, Tensor):
        raise ValueError("the model returns no `.loss`: pass loss_fn(model, batch)")
    return loss
