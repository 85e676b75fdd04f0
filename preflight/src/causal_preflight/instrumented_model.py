"""Run any loss on an edited batch, and catch the logits on their way from the model into the loss.

Two modules are found first, by one run with hooks on all of them. The *input module* is the first
that is called with the token ids. The *logits module* is the one whose output holds the logits: the
tensor whose gradient looks like that of a cross-entropy.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from causal_preflight.audit_batch import AuditBatch
from causal_preflight.gradient_fit import fit
from causal_preflight.locate import iter_integer_tensors, locate, place
from causal_preflight.nested_outputs import Layout, get, iter_float_tensors, layouts, put, to_btv
from causal_preflight.sandbox import Sandbox

_NO_LOGITS = 0.5  # residual of the fit from which a tensor is surely no logits
_NO_GRADIENT = 0.4  # residual given to a tensor without a gradient to judge by
_MAX_FITTED = 2**21  # numbers are enough to tell logits from hidden states
_TRAINED = 1e-3  # fraction of the largest weight below which a position has no target
LossFn = Callable[[Any, Any], Tensor]


@dataclass
class Observation:
    """Loss and logits of one run. Logits are float32 (B, T, V), NaN where none were made."""

    loss: float
    logits: Tensor
    made: Tensor
    """(B, T) bool: positions for which logits were made"""


@dataclass
class Readout:
    """What the loss trained, per position (B, T): see `gradient_fit.fit`. 0 where nothing."""

    loss: float
    target: Tensor
    weight: Tensor
    onehot_weight: Tensor
    max_abs_grad: Tensor
    grad_sum: Tensor
    residual: float
    pieces: int
    """pieces of logits that the loss used: several calls, or a head applied in chunks"""

    @cached_property
    def trained(self) -> Tensor:
        """(B, T) bool: positions that the loss trains on a target."""
        weight = self.weight.abs()
        least = _TRAINED * weight.max().clamp_min(1e-300)
        return weight.minimum(self.onehot_weight.abs()) > least


@dataclass
class _Run:
    """State of one run: which slots the current call holds, and the logits caught so far."""

    batch: AuditBatch
    slots: Tensor | None = None
    used: set[int] = field(default_factory=set)
    caught: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def enter(self, args: Any) -> bool:
        """Note which slots of the batch the call that begins here holds, if any."""
        found = [locate(t, self.batch, self.used) for t in iter_integer_tensors(args)]
        known = [slots for slots in found if slots is not None]
        if known:  # position ids can equal a row of ids: the largest match is the batch
            self.slots = max(known, key=Tensor.numel)
        return bool(known)

    def placed(self, pieces: list[Tensor]) -> list[Tensor]:
        """The slots of each caught piece of logits; pieces of one call follow each other."""
        out: list[Tensor] = []
        for _, group in groupby(self.caught, key=lambda c: id(c[0])):
            calls = list(group)
            shapes = [p.shape for p in pieces[len(out) : len(out) + len(calls)]]
            placed = place(calls[0][0], shapes, self.batch)
            if placed is None:
                raise RuntimeError("it cannot be told to which positions the logits belong")
            out += placed
        return out


class InstrumentedModel:
    """A model with its loss, run again and again from the same state.

    `forwards` counts the runs of the loss; `dtype` is the lowest precision that a module puts out.
    """

    def __init__(
        self,
        module: nn.Module,
        loss_fn: LossFn | None,
        sandbox: Sandbox,
        seed: int,
        rebuild: Callable[[dict[str, Any]], Any],
    ) -> None:
        self.module, self.loss_fn = module, loss_fn or _loss_of_model
        self.sandbox, self.seed, self.rebuild = sandbox, seed, rebuild
        self.forwards = 0
        self.input_module: nn.Module | None = None
        self.logits_module: nn.Module | None = None
        self.path: tuple[Any, ...] = ()
        self.layout: Layout = ()
        self.replaceable = True
        self.dtype = torch.float32

    def run(self, batch: AuditBatch, train: bool = False) -> Tensor:
        """The loss on this batch, with its graph; always from the same state and seed."""
        self.sandbox.rewind(self.seed, train)
        self.forwards += 1
        raw = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.raw.items()}
        with torch.enable_grad():
            loss = self.loss_fn(self.module, self.rebuild(raw))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("loss_fn must return the scalar training loss as a tensor")
        return loss

    def grads(self, loss: Tensor, of: list[Any]) -> list[Tensor | None]:
        """Gradients by `backward`, as checkpointing needs, unless the loss has called it itself."""
        if loss.requires_grad:
            loss.backward()
        grads = [t.grad for t in of]
        for p in self.sandbox.params:
            p.grad = None
        return grads

    def discover(self, batch: AuditBatch) -> None:
        """Find input module, logits module and layout; without logits `logits_module` is None."""
        run, found = _Run(batch), list[tuple[nn.Module, tuple[Any, ...], Tensor, Layout]]()
        vocab = 1 + int(max(batch.ids.max(), 0 if batch.labels is None else batch.labels.max()))

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if run.enter((args, kwargs)) and self.input_module is None:
                self.input_module = module

        def after(module: nn.Module, args: Any, output: Any) -> None:
            for path, t in iter_float_tensors(output):
                if t.dtype.itemsize < self.dtype.itemsize:
                    self.dtype = t.dtype
                if run.slots is not None and t.requires_grad and t.ndim in (2, 3):
                    options = layouts(t.shape, run.slots.shape, vocab)
                    found.extend((module, path, t, layout) for layout in options)
                    if options:
                        t.retain_grad()

        modules = self.sandbox.modules
        hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in modules]
        hooks += [m.register_forward_hook(after) for m in modules]
        loss = self._run_hooked(batch, False, hooks)
        best, known = 2 * _NO_LOGITS, set[tuple[int, Layout]]()
        grads = self.grads(loss, [t for _, _, t, _ in found])
        for (module, path, t, layout), g in zip(found, grads, strict=True):
            if g is None or (id(t), layout) in known:  # a parent returns the tensor of its child
                continue
            known.add((id(t), layout))
            few = slice(None, None, 1 + t.numel() // _MAX_FITTED)
            z, g = (to_btv(x, layout).flatten(0, 1)[few] for x in (t.detach(), g))
            # Without a gradient (a NaN loss, no target) the last tensor of the right shape is it.
            blank = not bool(torch.isfinite(g).all()) or not bool((g != 0).any())
            residual = _NO_GRADIENT if blank else fit(z[None], g[None])[2]
            if residual < 0.5 * best or (blank and best >= _NO_GRADIENT):
                best = max(residual, 1e-5)
                self.logits_module, self.path, self.layout = module, path, layout

    def observe(self, batch: AuditBatch, train: bool = False) -> Observation:
        """Run the loss and keep the logits."""
        run, loss = self._catch(batch, train, lambda t: t)
        pieces = [to_btv(t.detach(), self.layout) for _, t in run.caught]
        shape, size, v = batch.ids.shape, batch.ids.numel(), pieces[0].shape[-1]
        logits = torch.full((size, v), float("nan"), device=batch.ids.device)
        made = torch.zeros(size, dtype=torch.bool, device=logits.device)
        for slots, t in zip(run.placed(pieces), pieces, strict=True):
            keep = slots >= 0
            made[slots[keep]] = True
            logits[slots[keep]] = t[keep].float()
        return Observation(float(loss.detach()), logits.view(*shape, v), made.view(shape))

    def readout(self, batch: AuditBatch, train: bool = False) -> Readout:
        """Run the loss and read targets and weights off d loss / d logits.

        The logits are replaced by moderate noise on their way into the loss, the same at every
        position: what the loss trains does not depend on what the model predicts, and a confident
        or broken model would blur the reading. Where the loss is computed before the hook can act
        (inside the module that returns the logits), the model's own logits are read instead.
        """
        leaves: list[Tensor] = []

        def replace(t: Tensor) -> Tensor:
            if self.replaceable:
                gen = torch.Generator().manual_seed(0)  # fixed: independent of the audit's seed
                wide = to_btv(t.detach().float(), self.layout)
                noise = torch.randn(wide.shape[-1], generator=gen).to(wide.device)
                z = torch.where(torch.isneginf(wide), wide, noise)
                t = (z.permute(self.layout) if self.layout else z[0]).clone().requires_grad_()
            elif t.requires_grad:
                t.retain_grad()
            leaves.append(t)
            return t

        run, loss = self._catch(batch, train, replace)
        grads = self.grads(loss, leaves)
        if self.replaceable and all(g is None for g in grads):
            self.replaceable = False
            return self.readout(batch, train)
        ids = batch.ids
        exact = torch.float32 if ids.device.type == "mps" else torch.float64
        target = torch.full((ids.numel(),), -1, device=ids.device)
        values, residual = torch.zeros(4, ids.numel(), dtype=exact, device=ids.device), 0.0
        pieces = [to_btv(t.detach(), self.layout) for t in leaves]
        for slots, z, g in zip(run.placed(pieces), pieces, grads, strict=True):
            if g is None:
                continue
            y, new, rest = fit(z, to_btv(g, self.layout))
            keep = slots >= 0
            slots, y, new = slots[keep], y[keep], new[:, keep].to(exact)
            stronger = new[0].abs() >= values[0, slots].abs()
            target[slots] = torch.where(stronger, y, target[slots])
            values.index_add_(1, slots, new)
            residual = max(residual, rest)
        weight, onehot, largest, total = values.view(4, *ids.shape)
        target, nats = target.view(ids.shape), float(loss.detach())
        return Readout(nats, target, weight, onehot, largest, total, residual, len(leaves))

    def _catch(
        self, batch: AuditBatch, train: bool, edit: Callable[[Tensor], Tensor]
    ) -> tuple[_Run, Tensor]:
        """Run with the logits caught, and `edit` applied to them on their way into the loss."""
        if self.logits_module is None or self.input_module is None:
            raise RuntimeError("no logits to look at")
        run = _Run(batch)

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            t = get(output, self.path)
            if run.slots is None or not isinstance(t, Tensor):
                return None
            run.caught.append((run.slots, t))
            new = edit(t)
            return None if new is t else put(output, self.path, new)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            run.enter((args, kwargs))

        hooks = [self.input_module.register_forward_pre_hook(before, with_kwargs=True)]
        hooks.append(self.logits_module.register_forward_hook(after))
        loss = self._run_hooked(batch, train, hooks)
        if not run.caught:
            raise RuntimeError("the logits were not seen in this run")
        return run, loss

    def _run_hooked(self, batch: AuditBatch, train: bool, hooks: list[Any]) -> Tensor:
        try:
            return self.run(batch, train)
        finally:
            for hook in hooks:
                hook.remove()


def _loss_of_model(model: Any, batch: Any) -> Tensor:
    loss = get(model(**batch), ("loss",)) if isinstance(batch, dict) else None
    if not isinstance(loss, Tensor):
        raise ValueError("the model returns no `.loss`: pass loss_fn(model, batch)")
    return loss
