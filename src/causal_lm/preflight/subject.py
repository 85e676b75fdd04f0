"""The model under audit, seen from outside: run the loss, catch the logits that it used.

Any loss is run as it stands, on an edited batch; a forward hook catches the logits on their way
from the model into the loss. Two things must be found out first, by one run with hooks everywhere:

* the *site*, the module (and the entry of its output) that makes the logits: the one whose output
  the loss depends on, and whose gradient looks like that of a cross-entropy;
* for each call, which (row, column) of the batch each slot holds, by matching the ids that the
  call was given with the ids of the batch. A loss may call the model on row slices, on
  `ids[:, :-1]`, on transposed or flattened ids.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from causal_lm.preflight.fit import fit
from causal_lm.preflight.frame import Frame
from causal_lm.preflight.locate import Slots, canonical, integers, locate, place
from causal_lm.preflight.outputs import back, btv, floats, get, put
from causal_lm.preflight.state import Sandbox

_NO_LOGITS, _BLANK = 0.5, 0.4  # residual of the fit: surely no logits; not to be judged
_ENOUGH = 2**21  # numbers are enough to tell logits from hidden states
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


@dataclass
class _Run:
    """Scratch of one run: where we are, and what has been caught."""

    frame: Frame
    slots: Slots | None = None
    used: set[tuple[int, int]] = field(default_factory=set)
    caught: list[tuple[Slots, Tensor]] = field(default_factory=list)


class Subject:
    """A model with its loss, replayable. `forwards` counts the runs of the loss."""

    def __init__(self, model: nn.Module, loss_fn: LossFn | None, box: Sandbox, seed: int) -> None:
        self.model, self.loss_fn, self.box, self.seed = model, loss_fn or _own_loss, box, seed
        self.forwards = 0
        self.door: nn.Module | None = None
        self.site: nn.Module | None = None
        self.path: tuple[Any, ...] = ()
        self.layout = "btv"
        self.replaceable = True
        self.dtype = torch.float32

    # -- running -------------------------------------------------------------------------------

    def run(self, frame: Frame, train: bool = False) -> Tensor:
        """The loss on this batch, with its graph; always from the same state and seed."""
        self.box.rewind(self.seed, train)
        self.forwards += 1
        batch = {k: v.clone() if isinstance(v, Tensor) else v for k, v in frame.batch.items()}
        with torch.enable_grad():
            loss = self.loss_fn(self.model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("loss_fn must return the scalar training loss as a tensor")
        return loss

    def gradients(self, frame: Frame) -> list[Tensor | None]:
        """Of the training loss, for every parameter; by `backward`, which suits checkpointing."""
        loss = self.run(frame, True)
        if loss.requires_grad:
            loss.backward()
        grads = [p.grad for p in self.box.params]
        for p in self.box.params:
            p.grad = None
        return grads

    def discover(self, frame: Frame) -> Tensor:
        """Find door, site and layout. Returns the loss. Without logits `site` stays None."""
        run = _Run(frame)
        found: list[tuple[nn.Module, tuple[Any, ...], Tensor, Slots]] = []
        need = int(max(frame.ids.max(), 0 if frame.labels is None else frame.labels.max())) + 1

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if self._enter(run, args, kwargs) and self.door is None:
                self.door = module

        def after(module: nn.Module, args: Any, output: Any) -> None:
            for path, t in floats(output):
                if t.dtype.itemsize < self.dtype.itemsize:
                    self.dtype = t.dtype
                if run.slots is not None and t.requires_grad and t.ndim in (2, 3):
                    found.append((module, path, t, run.slots))

        hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in self.box.modules]
        hooks += [m.register_forward_hook(after) for m in self.box.modules]
        try:
            loss = self.run(frame)
        finally:
            for h in hooks:
                h.remove()
        self._choose(loss, found, need)
        return loss

    def _choose(self, loss: Tensor, found: list[Any], need: int) -> None:
        options = [
            (module, path, t, layout)
            for module, path, t, slots in found
            for layout in canonical(t.shape, slots.shape, need)
        ]
        if not options or not loss.requires_grad:
            return
        grads = self._candidate_grads(loss, [o[2] for o in options])
        best, known = 2 * _NO_LOGITS, set[tuple[int, str]]()
        for (module, path, t, layout), g in zip(options, grads, strict=True):
            if g is None or (id(t), layout) in known:  # a parent hands on its child's tensor
                continue
            known.add((id(t), layout))
            few = slice(None, None, 1 + t.numel() // _ENOUGH)
            z, g = btv(t.detach(), layout).flatten(0, 1)[few], btv(g, layout).flatten(0, 1)[few]
            # No gradient to judge by (a NaN loss, no target): the last tensor of the right shape.
            blank = not bool(torch.isfinite(g).all()) or not bool((g != 0).any())
            doubt = _BLANK if blank else fit(z[None], g[None])[2]
            if doubt < 0.5 * best or (blank and best >= _BLANK):
                best = max(doubt, 1e-5)
                self.site, self.path, self.layout = module, path, layout

    def _candidate_grads(self, loss: Tensor, tensors: list[Tensor]) -> list[Tensor | None]:
        try:
            return list(torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True))
        except RuntimeError:  # reentrant checkpointing takes a whole backward or nothing
            for t in tensors:
                t.retain_grad()
            loss.backward()
            for p in self.box.params:
                p.grad = None
            return [t.grad for t in tensors]

    def look(self, frame: Frame, train: bool = False) -> Look:
        """Run and keep the logits."""
        run, loss = self._hooked(frame, train, None)
        shape = frame.ids.shape
        pieces = [btv(t.detach(), self.layout) for _, t in run.caught]
        canvas = torch.full((*shape, pieces[0].shape[-1]), float("nan"), device=frame.ids.device)
        seen = torch.zeros(shape, dtype=torch.bool, device=canvas.device)
        for at, t in zip(_placed(run, pieces), pieces, strict=True):
            keep = at.rows >= 0
            seen[at.rows[keep], at.cols[keep]] = True
            canvas[at.rows[keep], at.cols[keep]] = t[keep].float()
        return Look(float(loss.detach()), canvas, seen)

    def readout(self, frame: Frame, train: bool = False) -> Readout:
        """Run, and read targets and weights off d loss / d logits.

        The logits are replaced by well-tempered noise on their way into the loss, the same at every
        position: what the loss trains does not depend on what the model says, and a confident or
        broken model would drown the reading. Where the loss is computed before the hook can act
        (inside the very module that returns the logits), the model's own logits are read instead.
        """
        leaves: list[Tensor] = []

        def temper(t: Tensor) -> Tensor:
            gen = torch.Generator().manual_seed(0)  # a constant: the loss must not hang on the seed
            wide = btv(t, self.layout)
            noise = torch.randn(wide.shape[-1], generator=gen).to(wide.device)
            z = torch.where(torch.isneginf(wide), wide.float(), noise.expand(wide.shape))
            leaves.append(z.detach().clone().requires_grad_())
            return back(leaves[-1], self.layout, t)

        run, loss = self._hooked(frame, train, temper if self.replaceable else None)
        if not self.replaceable:
            leaves = [t for _, t in run.caught]
        grads = _grads(loss, leaves)
        if self.replaceable and all(g is None for g in grads):
            self.replaceable = False
            return self.readout(frame, train)
        if not self.replaceable:
            leaves = [btv(t.detach(), self.layout) for t in leaves]
            grads = [None if g is None else btv(g, self.layout) for g in grads]
        return self._collect(frame, float(loss.detach()), run, leaves, grads)

    def _collect(
        self, frame: Frame, loss: float, run: _Run, leaves: list[Tensor], grads: list[Tensor | None]
    ) -> Readout:
        shape, device = frame.ids.shape, frame.ids.device
        exact = torch.float32 if device.type == "mps" else torch.float64
        target = torch.full(shape, -1, device=device)
        values, residual = torch.zeros(4, *shape, dtype=exact, device=device), 0.0
        for at, z, g in zip(_placed(run, leaves), leaves, grads, strict=True):
            if g is None:
                continue
            y, new, left = fit(z.detach(), g)
            keep = at.rows >= 0
            place = at.rows[keep], at.cols[keep]
            stronger = new[0][keep].abs() >= values[0][place].abs()
            target[place] = torch.where(stronger, y[keep], target[place])
            for total, value in zip(values, new, strict=True):
                total.index_put_(place, value[keep].to(exact), accumulate=True)
            residual = max(residual, left)
        weight, sharp, pull, lump = values
        return Readout(loss, target, weight, sharp, pull, lump, residual, len(leaves))

    def _hooked(
        self, frame: Frame, train: bool, edit: Callable[[Tensor], Tensor] | None
    ) -> tuple[_Run, Tensor]:
        if self.site is None or self.door is None:
            raise RuntimeError("no logits to look at")
        run = _Run(frame)

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._enter(run, args, kwargs)

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            t = get(output, self.path)
            slots = run.slots
            if slots is None or not isinstance(t, Tensor):
                return None
            run.caught.append((slots, t))
            return None if edit is None else put(output, self.path, edit(t))

        hooks = [
            self.door.register_forward_pre_hook(before, with_kwargs=True),
            self.site.register_forward_hook(after),
        ]
        try:
            loss = self.run(frame, train)
        finally:
            for h in hooks:
                h.remove()
        if not run.caught:
            raise RuntimeError("the logits were not seen in this run")
        return run, loss

    def _enter(self, run: _Run, args: Any, kwargs: Any) -> bool:
        """Note which slots of the batch the call that begins here holds."""
        frame, found = run.frame, []
        for t in integers((args, kwargs)):
            slots = locate(t, frame.ids, frame.real, run.used)
            if slots is not None:
                found.append(slots)
        if found:  # positions may look like a row of ids: the largest match is meant
            run.slots = max(found, key=lambda s: s.rows.numel())
        return bool(found)


def _placed(run: _Run, pieces: list[Tensor]) -> list[Slots]:
    """The slots of every piece of logits caught; pieces of one call lie side by side in time."""
    out: list[Slots] = []
    while len(out) < len(pieces):
        slots = run.caught[len(out)][0]
        group = [p.shape for (s, _), p in zip(run.caught, pieces, strict=True) if s is slots]
        placed = place(slots, group, run.frame)
        if placed is None:
            raise RuntimeError("the logits hold slots that cannot be told")
        out += placed
    return out


def _own_loss(model: Any, batch: dict[str, Any]) -> Tensor:
    out = model(**batch)
    loss = out.get("loss") if isinstance(out, dict) else getattr(out, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError("the model returns no `.loss`: pass loss_fn(model, batch)")
    return loss


def _grads(loss: Tensor, leaves: list[Tensor]) -> list[Tensor | None]:
    if loss.requires_grad:
        return list(torch.autograd.grad(loss, leaves, allow_unused=True))
    return [z.grad for z in leaves]  # the loss called backward itself
