"""Run any loss on an edited batch, and catch the logits on their way from the model into the loss.

The *input module* is the first that is called with the token ids. The *logits module* is the one
whose output holds the logits: the tensor whose gradient looks like that of a cross-entropy.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from causal_preflight import locate
from causal_preflight.batch import AuditBatch
from causal_preflight.gradient_fit import EXACT, fit, is_distribution
from causal_preflight.sandbox import Sandbox

_NO_LOGITS = 0.5  # residual of the fit above which a tensor is not logits
_NO_GRADIENT = 0.4  # residual assumed for a tensor without a gradient
_MAX_FITTED = 2**21  # values fitted per tensor: enough to tell logits from hidden states
_SMALL_NOISE = 3e-3
_TRAINED = 1e-3  # fraction of the largest weight below which a position has no target
LossFn = Callable[[Any, Any], Tensor]


@dataclass
class Observation:
    """Loss of one run, its logits in float32 (B, T, V), and where there are any: `made` (B, T)."""

    loss: float
    logits: Tensor
    made: Tensor


@dataclass
class Readout:
    """What the loss trained, per position (B, T): see `gradient_fit.fit`. 0 where nothing.

    `pieces` counts the pieces of logits that it used: several calls, or a head applied in chunks.
    `scaled` tells whether the loss caps or scales them.
    """

    loss: float
    residual: float
    pieces: int
    target: Tensor
    weight: Tensor
    onehot_weight: Tensor
    max_abs_grad: Tensor
    grad_sum: Tensor
    scaled: bool = False

    @cached_property
    def trained(self) -> Tensor:
        """(B, T) bool: positions that the loss trains on a target."""
        weight = self.weight.abs()
        least = _TRAINED * weight.max().clamp_min(1e-300)
        return weight.minimum(self.onehot_weight.abs()) > least


@dataclass(eq=False)
class InstrumentedModel:
    """A model with its loss, run again and again from the same state.

    `forwards` counts the runs; `dtype` is the lowest precision that a module puts out;
    `replaceable` tells whether the loss is computed from what the logits module returns.
    """

    module: nn.Module
    loss_fn: LossFn | None
    sandbox: Sandbox
    seed: int
    rebuild: Callable[[dict[str, Any]], Any]
    forwards: int = 0
    input_module: nn.Module | None = None
    logits_module: nn.Module | None = None
    path: locate.KeyPath = ()
    layout: locate.Layout = ()
    replaceable: bool = True
    dtype: torch.dtype = torch.float32

    def run(self, batch: AuditBatch, train: bool = False, hooks: Iterable[Any] = ()) -> Tensor:
        """The loss with its graph, always from the same state and seed; `hooks` are removed."""
        raw = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.raw.items()}
        self.forwards += 1
        try:
            self.sandbox.rewind(self.seed, train)
            with torch.enable_grad():
                loss = (self.loss_fn or loss_of_model)(self.module, self.rebuild(raw))
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("loss_fn must return the scalar training loss as a tensor")
        return loss

    def grads(self, loss: Tensor, tensors: list[Any]) -> list[Tensor | None]:
        """Gradients by `backward`, as checkpointing needs, unless the loss has called it itself."""
        if loss.requires_grad:
            loss.backward()
        grads = [t.grad for t in tensors]
        for p in self.sandbox.params:
            p.grad = None
        return grads

    def discover(self, batch: AuditBatch) -> None:
        """Find input module, logits module and layout; without logits `logits_module` is None."""
        found: dict[tuple[int, locate.Layout], tuple[nn.Module, locate.KeyPath, Tensor]] = {}
        used, slots, last = set[int](), list[Tensor](), None  # of the current call
        vocab = 1 + int(max(batch.ids.max(), 0 if batch.labels is None else batch.labels.max()))

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if (hit := locate.slots_of_call((args, kwargs), batch, used)) is not None:
                slots[:] = [hit]
                self.input_module = module if self.input_module is None else self.input_module

        def after(module: nn.Module, args: Any, output: Any) -> None:
            nonlocal last
            for path, t in locate.iter_tensors(output, 2):
                if t.is_floating_point() and t.dtype.itemsize < self.dtype.itemsize:
                    self.dtype = t.dtype
                if slots and t.requires_grad and t.ndim in (2, 3):
                    last = t
                    for layout in locate.layouts(t.shape, slots[0].shape, vocab):
                        # A parent may return the tensor of its child: the first counts.
                        found.setdefault((id(t), layout), (module, path, t))
                        t.retain_grad()

        modules = self.sandbox.modules
        hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in modules]
        loss = self.run(batch, False, hooks + [m.register_forward_hook(after) for m in modules])
        best, grads = 2 * _NO_LOGITS, self.grads(loss, [t for _, _, t in found.values()])
        for ((_, layout), (module, path, t)), g in zip(found.items(), grads, strict=True):
            if g is None:
                continue
            few = slice(None, None, 1 + t.numel() // _MAX_FITTED)
            z, g = (locate.to_btv(x, layout).flatten(0, 1)[few] for x in (t.detach(), g))
            # Without a gradient (NaN loss, no target), the last tensor of the right shape is taken.
            blank = not bool(torch.isfinite(g).all()) or not bool((g != 0).any())
            residual = _NO_GRADIENT if blank else max(1e-5, fit(z[None], g[None])[2])
            if residual < 0.5 * best or (blank and best >= _NO_GRADIENT):
                best = residual
                self.logits_module, self.path, self.layout = module, path, layout
            elif (self.logits_module is None and t is last and not blank
                  and bool((g.sum(-1).abs() <= 1e-4 * g.abs().sum(-1)).all())):  # fmt: skip
                # Soft targets: the gradient of each softmax sums to 0, whatever its target.
                self.logits_module, self.path, self.layout = module, path, layout

    def observe(self, batch: AuditBatch, train: bool = False) -> Observation:
        """Run the loss and keep the logits; they are NaN where none were made."""
        loss, placed = self._catch(batch, train, lambda t: t)
        placed = [(slots, locate.to_btv(t.detach(), self.layout)) for slots, t in placed]
        shape, size, vocab = batch.ids.shape, batch.ids.numel(), placed[0][1].shape[-1]
        logits = torch.full((size, vocab), float("nan"), device=batch.ids.device)
        made = torch.zeros(size, dtype=torch.bool, device=logits.device)
        for slots, t in placed:
            keep = slots >= 0
            made[slots[keep]] = True
            logits[slots[keep]] = t[keep].float()
        return Observation(float(loss.detach()), logits.view(*shape, -1), made.view(shape))

    def gradients(
        self, batch: AuditBatch, train: bool = False, noise_size: float = 1.0
    ) -> tuple[float, list[tuple[Tensor, ...]]]:
        """The loss; and of each piece of logits the slots, the logits and d loss / d logits.

        The logits are replaced by the same moderate noise at every position, as large or NaN logits
        would make a fit inaccurate, unless the module that returns them also computes the loss.
        """

        def replace(t: Tensor) -> Tensor:
            if self.replaceable:
                gen = torch.Generator().manual_seed(0)  # fixed: independent of the audit's seed
                wide = locate.to_btv(t.detach().float(), self.layout)
                noise = noise_size * torch.randn(wide.shape[-1], generator=gen).to(wide.device)
                noise = noise.softmax(-1) if is_distribution(wide) else noise
                z = torch.where(torch.isneginf(wide), wide, noise)
                t = (z.permute(self.layout) if self.layout else z[0]).clone().requires_grad_()
            elif t.requires_grad:
                t.retain_grad()
            return t

        loss, placed = self._catch(batch, train, replace)
        grads = self.grads(loss, [leaf for _, leaf in placed])
        if self.replaceable and all(g is None for g in grads):
            self.replaceable = False
            return self.gradients(batch, train)
        pieces = [(s, leaf, g) for (s, leaf), g in zip(placed, grads, strict=True) if g is not None]
        wide = [(s, *(locate.to_btv(x.detach(), self.layout) for x in pair)) for s, *pair in pieces]
        return float(loss.detach()), wide

    def readout(self, batch: AuditBatch, train: bool = False, noise_size: float = 1.0) -> Readout:
        """Run the loss and read targets and weights off d loss / d logits.

        Where the fit is not exact, it is tried with small noise: what the loss does to the logits
        first, a cap or a scale, is a factor s there. Then weight is w s^2, onehot_weight w s.
        """
        loss, pieces = self.gradients(batch, train, noise_size)
        ids = batch.ids
        exact = torch.float32 if ids.device.type == "mps" else torch.float64
        target = torch.full((ids.numel(),), -1, device=ids.device)
        values, residual = torch.zeros(4, ids.numel(), dtype=exact, device=ids.device), 0.0
        for slots, z, g in pieces:
            y, new, rest = fit(z, g)
            keep = slots >= 0
            slots, y, new = slots[keep], y[keep], new[:, keep].to(exact)
            stronger = new[0].abs() >= values[0, slots].abs()
            target[slots] = torch.where(stronger, y, target[slots])
            values.index_add_(1, slots, new)
            residual = max(residual, rest)
        target, values = target.view(ids.shape), values.view(4, *ids.shape)
        r = Readout(loss, residual, len(pieces), target, *values)
        if residual > EXACT and self.replaceable and noise_size > _SMALL_NOISE:
            other = self.readout(batch, train, _SMALL_NOISE)
            if other.residual < 0.1 * residual:
                r, r.scaled = other, True
                r.weight = (r.onehot_weight**2 / r.weight).nan_to_num(0.0)
        return r

    def _catch(
        self, batch: AuditBatch, train: bool, edit: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        """The loss; and the slots of each piece of logits, with the piece as `edit` passes it."""
        if self.logits_module is None or self.input_module is None:
            raise RuntimeError("no logits to look at")
        used, calls = set[int](), list[tuple[Tensor, list[Tensor], list[int]]]()

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if (slots := locate.slots_of_call((args, kwargs), batch, used)) is not None:
                calls.append((slots, [], []))

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            t = locate.get_path(output, self.path)
            if not calls or not isinstance(t, Tensor):
                return None
            slots, pieces, starts = calls[-1]
            starts.append(locate.first_column(t, slots.shape[1]) or 0)
            pieces.append(new := edit(t))
            return None if new is t else locate.set_path(output, self.path, new)

        hooks = [self.input_module.register_forward_pre_hook(before, with_kwargs=True)]
        loss = self.run(batch, train, [*hooks, self.logits_module.register_forward_hook(after)])
        placed: list[tuple[Tensor, Tensor]] = []
        for slots, pieces, starts in calls:
            shapes = [locate.to_btv(t, self.layout).shape for t in pieces]
            if pieces and sum(s[:2].numel() for s in shapes) < slots.numel():
                slots = slots[:, starts[0] :]  # as of the last k positions alone
            placed += zip(locate.place(slots, shapes, batch) if pieces else [], pieces, strict=True)
        if not placed:
            raise RuntimeError("the logits were not seen in this run")
        return loss, placed


def loss_of_model(model: Any, batch: Any) -> Tensor:
    loss = locate.get_path(model(**batch), ("loss",)) if isinstance(batch, dict) else None
    if not isinstance(loss, Tensor):
        raise ValueError("the model returns no `.loss`: pass loss_fn(model, batch)")
    return loss
