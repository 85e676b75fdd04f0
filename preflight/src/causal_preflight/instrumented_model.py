"""The model under audit, seen from outside: run the loss, catch the logits that it used.

Any loss is run as it stands, on an edited batch; a forward hook catches the logits on their way
from the model into the loss. Two things must be found out first, by one run with hooks everywhere:
the *door*, the module whose calls are told the ids, and the *site*, the module (and the entry of
its output) that makes the logits: the one whose gradient looks like that of a cross-entropy.
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
from causal_preflight.locate import integers, locate, place
from causal_preflight.nested_outputs import Layout, get, iter_float_tensors, layouts, put, to_btv
from causal_preflight.sandbox import Sandbox

_NO_LOGITS, _BLANK = 0.5, 0.4  # residual of the fit: surely no logits; not to be judged
_ENOUGH = 2**21  # numbers are enough to tell logits from hidden states
_TRAINED = 1e-3  # share of the largest weight below which a position has no target
LossFn = Callable[[Any, dict[str, Any]], Tensor]


@dataclass
class Look:
    """What one run of the loss showed. Logits are float32 (B, T, V), NaN where none were made."""

    loss: float
    logits: Tensor
    seen: Tensor
    """(B, T) bool: positions for which logits were made"""


@dataclass
class Readout:
    """What the loss trained, per position (B, T): see `fit.fit`. Weight 0 where nothing."""

    loss: float
    target: Tensor
    weight: Tensor
    sharp: Tensor
    pull: Tensor
    lump: Tensor
    residual: float
    calls: int
    """pieces of logits that the loss used"""

    @cached_property
    def trained(self) -> Tensor:
        """(B, T) bool: positions that the loss trains on a target."""
        weight = self.weight.abs()
        return weight.minimum(self.sharp.abs()) > _TRAINED * weight.max().clamp_min(1e-300)


@dataclass
class _Run:
    """Scratch of one run: which slots the current call holds, and what has been caught."""

    frame: AuditBatch
    slots: Tensor | None = None
    used: set[int] = field(default_factory=set)
    caught: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def enter(self, args: Any) -> bool:
        """Note which slots of the batch the call that begins here holds, if any."""
        found = [locate(t, self.frame, self.used) for t in integers(args)]
        known = [slots for slots in found if slots is not None]
        if known:  # positions may look like a row of ids: the largest match is meant
            self.slots = max(known, key=Tensor.numel)
        return bool(known)

    def placed(self, pieces: list[Tensor]) -> list[Tensor]:
        """The slots of every piece of logits caught; pieces of one call lie side by side."""
        out: list[Tensor] = []
        for _, group in groupby(self.caught, key=lambda c: id(c[0])):
            calls = list(group)
            shapes = [p.shape for p in pieces[len(out) : len(out) + len(calls)]]
            placed = place(calls[0][0], shapes, self.frame)
            if placed is None:
                raise RuntimeError("the logits hold slots that cannot be told")
            out += placed
        return out


class InstrumentedModel:
    """A model with its loss, replayable. `forwards` counts the runs of the loss."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None, box: Sandbox, seed: int) -> None:
        self.model, self.loss_fn, self.box, self.seed = model, loss_fn or _own_loss, box, seed
        self.forwards = 0
        self.door: nn.Module | None = None
        self.site: nn.Module | None = None
        self.path: tuple[Any, ...] = ()
        self.layout: Layout = ()
        self.replaceable = True
        self.dtype = torch.float32

    def run(self, frame: AuditBatch, train: bool = False) -> Tensor:
        """The loss on this batch, with its graph; always from the same state and seed."""
        self.box.rewind(self.seed, train)
        self.forwards += 1
        batch = {k: v.clone() if isinstance(v, Tensor) else v for k, v in frame.batch.items()}
        with torch.enable_grad():
            loss = self.loss_fn(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("loss_fn must return the scalar training loss as a tensor")
        return loss

    def grads(self, loss: Tensor, of: list[Any]) -> list[Tensor | None]:
        """By `backward`, which suits checkpointing, unless the loss has called it itself."""
        if loss.requires_grad:
            loss.backward()
        grads = [t.grad for t in of]
        for p in self.box.params:
            p.grad = None
        return grads

    def discover(self, frame: AuditBatch) -> None:
        """Find door, site and layout. Without logits `site` stays None."""
        run, found = _Run(frame), list[tuple[nn.Module, tuple[Any, ...], Tensor, Layout]]()
        need = int(max(frame.ids.max(), 0 if frame.labels is None else frame.labels.max())) + 1

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if run.enter((args, kwargs)) and self.door is None:
                self.door = module

        def after(module: nn.Module, args: Any, output: Any) -> None:
            for path, t in iter_float_tensors(output):
                if t.dtype.itemsize < self.dtype.itemsize:
                    self.dtype = t.dtype
                if run.slots is not None and t.requires_grad and t.ndim in (2, 3):
                    options = layouts(t.shape, run.slots.shape, need)
                    found.extend((module, path, t, layout) for layout in options)
                    if options:
                        t.retain_grad()

        hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in self.box.modules]
        hooks += [m.register_forward_hook(after) for m in self.box.modules]
        loss = self._hooked(frame, False, hooks)
        best, known = 2 * _NO_LOGITS, set[tuple[int, Layout]]()
        grads = self.grads(loss, [t for _, _, t, _ in found])
        for (module, path, t, layout), g in zip(found, grads, strict=True):
            if g is None or (id(t), layout) in known:  # a parent hands on its child's tensor
                continue
            known.add((id(t), layout))
            few = slice(None, None, 1 + t.numel() // _ENOUGH)
            z, g = (
                to_btv(t.detach(), layout).flatten(0, 1)[few],
                to_btv(g, layout).flatten(0, 1)[few],
            )
            # No gradient to judge by (a NaN loss, no target): the last tensor of the right shape.
            blank = not bool(torch.isfinite(g).all()) or not bool((g != 0).any())
            doubt = _BLANK if blank else fit(z[None], g[None])[2]
            if doubt < 0.5 * best or (blank and best >= _BLANK):
                best = max(doubt, 1e-5)
                self.site, self.path, self.layout = module, path, layout

    def look(self, frame: AuditBatch, train: bool = False) -> Look:
        """Run and keep the logits."""
        run, loss = self._catch(frame, train, lambda t: t)
        pieces = [to_btv(t.detach(), self.layout) for _, t in run.caught]
        size, v = frame.ids.numel(), pieces[0].shape[-1]
        canvas = torch.full((size, v), float("nan"), device=frame.ids.device)
        seen = torch.zeros(size, dtype=torch.bool, device=canvas.device)
        for at, t in zip(run.placed(pieces), pieces, strict=True):
            keep = at >= 0
            seen[at[keep]] = True
            canvas[at[keep]] = t[keep].float()
        return Look(
            float(loss.detach()), canvas.view(*frame.ids.shape, v), seen.view(frame.ids.shape)
        )

    def readout(self, frame: AuditBatch, train: bool = False) -> Readout:
        """Run, and read targets and weights off d loss / d logits.

        The logits are replaced by well-tempered noise on their way into the loss, the same at every
        position: what the loss trains does not depend on what the model says, and a confident or
        broken model would drown the reading. Where the loss is computed before the hook can act
        (inside the very module that returns the logits), the model's own logits are read instead.
        """
        leaves: list[Tensor] = []

        def temper(t: Tensor) -> Tensor:
            if self.replaceable:
                gen = torch.Generator().manual_seed(0)  # a constant: not to hang on the seed
                wide = to_btv(t.detach().float(), self.layout)
                noise = torch.randn(wide.shape[-1], generator=gen).to(wide.device)
                z = torch.where(torch.isneginf(wide), wide, noise)
                t = (z.permute(self.layout) if self.layout else z[0]).clone().requires_grad_()
            elif t.requires_grad:
                t.retain_grad()
            leaves.append(t)
            return t

        run, loss = self._catch(frame, train, temper)
        grads = self.grads(loss, leaves)
        if self.replaceable and all(g is None for g in grads):
            self.replaceable = False
            return self.readout(frame, train)
        return self._collect(run, float(loss.detach()), leaves, grads)

    def _collect(
        self, run: _Run, loss: float, leaves: list[Tensor], grads: list[Tensor | None]
    ) -> Readout:
        ids = run.frame.ids
        exact = torch.float32 if ids.device.type == "mps" else torch.float64
        target = torch.full((ids.numel(),), -1, device=ids.device)
        values, residual = torch.zeros(4, ids.numel(), dtype=exact, device=ids.device), 0.0
        pieces = [to_btv(t.detach(), self.layout) for t in leaves]
        for at, z, g in zip(run.placed(pieces), pieces, grads, strict=True):
            if g is None:
                continue
            y, new, left = fit(z, to_btv(g, self.layout))
            keep = at >= 0
            slots, y, new = at[keep], y[keep], new[:, keep].to(exact)
            stronger = new[0].abs() >= values[0, slots].abs()
            target[slots] = torch.where(stronger, y, target[slots])
            values.index_add_(1, slots, new)
            residual = max(residual, left)
        weight, sharp, pull, lump = values.view(4, *ids.shape)
        return Readout(
            loss, target.view(ids.shape), weight, sharp, pull, lump, residual, len(leaves)
        )

    def _catch(
        self, frame: AuditBatch, train: bool, edit: Callable[[Tensor], Tensor]
    ) -> tuple[_Run, Tensor]:
        """Run with the logits caught, and `edit` applied to them on their way into the loss."""
        if self.site is None or self.door is None:
            raise RuntimeError("no logits to look at")
        run = _Run(frame)

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            t = get(output, self.path)
            if run.slots is None or not isinstance(t, Tensor):
                return None
            run.caught.append((run.slots, t))
            new = edit(t)
            return None if new is t else put(output, self.path, new)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            run.enter((args, kwargs))

        hooks = [self.door.register_forward_pre_hook(before, with_kwargs=True)]
        loss = self._hooked(frame, train, [*hooks, self.site.register_forward_hook(after)])
        if not run.caught:
            raise RuntimeError("the logits were not seen in this run")
        return run, loss

    def _hooked(self, frame: AuditBatch, train: bool, hooks: list[Any]) -> Tensor:
        try:
            return self.run(frame, train)
        finally:
            for h in hooks:
                h.remove()


def _own_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    loss = get(model(**batch), ("loss",))
    if not isinstance(loss, Tensor):
        raise ValueError("the model returns no `.loss`: pass loss_fn(model, batch)")
    return loss
