"""Run any loss on an edited batch, and catch the logits on their way from the model into the loss.

The *input module* is the first that is called with the token ids. Logits are the tensors whose
gradient looks like that of a cross-entropy; a *site* is where a module puts them out.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from causal_preflight import locate
from causal_preflight.batch import AuditBatch
from causal_preflight.gradient_fit import fit
from causal_preflight.heads import Head, Observation, Readout, arrange
from causal_preflight.report import require
from causal_preflight.sandbox import Sandbox

_NO_LOGITS = 0.5  # residual of the fit above which a tensor is not logits
_NO_GRADIENT = 0.4  # residual assumed for a tensor without a gradient
_MAX_FITTED = 2**21  # values fitted per tensor: enough to tell logits from hidden states
_NO_EXTRA = 0.2  # likewise, for a further head
LossFn = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Site:
    """Where logits come out: a module, the path in its output, and how the tensor is laid out."""

    module: nn.Module
    path: locate.KeyPath
    layout: locate.Layout


HeadKey = tuple[Site, int, int]
"""A site, which of the heads that it stacks, and which of its calls on the same positions."""


class Piece(NamedTuple):
    """One piece of the logits of a head, its slots (b, t), and the tensor that it is a part of."""

    head: HeadKey
    slots: Tensor
    whole: Tensor

    def of(self, whole: Tensor) -> Tensor:
        """(b, t, V), cut out of the whole tensor or of its gradient."""
        site, number, _ = self.head
        return locate.stacked(whole, site.layout)[number]


@dataclass(eq=False)
class InstrumentedModel:
    """A model with its loss, run again and again from the same state.

    `forwards` counts the runs; `dtype` is the lowest precision that a module puts out;
    `sites` is empty without logits; `replaceable` tells whether the loss is computed from what they
    return; `frozen`, whether the embedding gets no gradient; `heads` has the main one first.
    """

    module: nn.Module
    loss_fn: LossFn | None
    sandbox: Sandbox
    seed: int
    rebuild: Callable[[dict[str, Any]], Any]
    forwards: int = 0
    input_module: nn.Module | None = None
    sites: list[Site] = field(default_factory=list)
    heads: dict[HeadKey, Head] = field(default_factory=dict)
    frozen: bool = False
    replaceable: bool = True
    dtype: torch.dtype = torch.float32

    def run(self, batch: AuditBatch, train: bool = False, hooks: Iterable[Any] = ()) -> Tensor:
        """The loss with its graph, always from the same state and seed; `hooks` are removed."""
        raw = {k: v.clone() if isinstance(v, Tensor) else v for k, v in batch.raw.items()}
        self.forwards += 1
        try:
            self.sandbox.rewind(self.seed, train)
            with torch.enable_grad():
                loss = (self.loss_fn or _loss_of_model)(self.module, self.rebuild(raw))
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
        """Find the input module and the sites of logits, in train mode or else in eval mode."""
        for train in (True, False):
            self._discover(batch, train)
            if self.sites:
                return

    def _discover(self, batch: AuditBatch, train: bool) -> None:
        found: dict[tuple[int, locate.Layout], tuple[Site, Tensor]] = {}
        used, slots = set[int](), list[Tensor]()  # of the current call
        vocab = 1 + int(max(batch.ids.max(), 0 if batch.labels is None else batch.labels.max()))

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            if (hit := locate.slots_of_call((args, kwargs), batch, used)) is not None:
                slots[:] = [hit]
                self.input_module = module if self.input_module is None else self.input_module

        def after(module: nn.Module, args: Any, output: Any) -> None:
            for path, t in locate.iter_tensors(output, 2):
                if t.is_floating_point() and t.dtype.itemsize < self.dtype.itemsize:
                    self.dtype = t.dtype
                if slots and t.requires_grad and t.ndim in (2, 3, 4):
                    for layout in locate.layouts(t.shape, slots[0].shape, vocab):
                        # A parent may return the tensor of its child: the first counts.
                        found.setdefault((id(t), layout), (Site(module, path, layout), t))
                        t.retain_grad()

        modules = self.sandbox.modules
        hooks = [m.register_forward_pre_hook(before, with_kwargs=True) for m in modules]
        loss = self.run(batch, train, hooks + [m.register_forward_hook(after) for m in modules])
        tables = [m.weight for m in modules if isinstance(m, nn.Embedding)]
        grads = self.grads(loss, [t for _, t in found.values()] + tables)
        self.frozen = bool(tables) and all(g is None for g in grads[len(found) :])
        best: dict[int, tuple[float, Site, Tensor]] = {}
        for number, ((site, t), g) in enumerate(zip(found.values(), grads, strict=False)):
            if g is None:
                continue
            few = slice(None, None, 1 + t.numel() // _MAX_FITTED)
            z, g = (locate.to_btv(x, site.layout).flatten(0, -2)[few] for x in (t.detach(), g))
            # Without a gradient (NaN loss, no target), the last tensor of the right shape is taken.
            blank = not bool(torch.isfinite(g).all()) or not bool((g != 0).any())
            residual = _NO_GRADIENT if blank else max(1e-5, fit(z[None], g[None])[2])
            # Of tensors that are made of one another, one is taken; others are further heads.
            rivals = [n for n, (_, _, x) in best.items() if blank or locate.made_of(t, x)]
            least = min((best[n][0] for n in rivals), default=2 * _NO_LOGITS)
            if residual < 0.5 * least or (blank and least >= _NO_GRADIENT):
                best = {n: hit for n, hit in best.items() if n not in rivals}
                best[number] = residual, site, t
        limit = max(_NO_EXTRA, min((hit[0] for hit in best.values()), default=0.0))
        self.sites = list(dict.fromkeys(hit[1] for hit in best.values() if hit[0] <= limit))

    def observe(self, batch: AuditBatch, train: bool = False) -> Observation:
        """Run the loss and keep the logits; they are NaN where none were made."""
        loss, pieces = self._catch(batch, train, lambda t, _: t)
        shape, size, seen = batch.ids.shape, batch.ids.numel(), list[tuple[Tensor, Tensor]]()
        for key, head in self.heads.items():
            mine = [p for p in pieces if p.head == key]
            require(mine or seen, "the logits were not seen in this run")
            if not mine:
                continue  # a further head that is used in the other mode only
            vocab = mine[0].of(mine[0].whole).shape[-1]
            logits = torch.full((size, vocab), float("nan"), device=batch.ids.device)
            made = torch.zeros(size, dtype=torch.bool, device=logits.device)
            for p in mine:
                keep = p.slots >= 0
                made[p.slots[keep]] = True
                logits[p.slots[keep]] = p.of(p.whole.detach())[keep].float()
            logits, made = logits.view(*shape, -1), made.view(shape)
            if seen:  # else the main head
                logits, made = (x.roll(head.move, 1) for x in (logits, made))
                made[:, : head.move] = False
                made &= head.counts.flatten()[batch.slot] & (batch.slot >= 0)
                logits = logits.masked_fill(~made[..., None], 0.0)
            seen.append((logits, made))
        wide, widths = torch.cat([z for z, _ in seen], -1), [z.shape[-1] for z, _ in seen]
        return Observation(float(loss.detach()), wide, seen[0][1], widths)

    def readout(self, batch: AuditBatch, train: bool = False) -> Readout:
        """Run the loss and read targets and weights off d loss / d logits.

        The logits are replaced by the same moderate noise at every position, as large or NaN logits
        would make the fit inaccurate, unless the module that returns them also computes the loss.
        """

        def replace(t: Tensor, layout: locate.Layout) -> Tensor:
            if self.replaceable:
                gen = torch.Generator().manual_seed(0)  # fixed: independent of the audit's seed
                wide = locate.to_btv(t.detach().float(), layout)
                noise = torch.randn(wide.shape[-1], generator=gen).to(wide.device)
                z = torch.where(torch.isneginf(wide), wide, noise)
                t = locate.from_btv(z, layout).clone().requires_grad_()
            elif t.requires_grad:
                t.retain_grad()
            return t

        loss, pieces = self._catch(batch, train, replace)
        grads = self.grads(loss, [p.whole for p in pieces])
        if self.replaceable and all(g is None for g in grads):
            self.replaceable = False
            return self.readout(batch, train)
        found = dict[HeadKey, Readout]()
        ids = batch.ids
        exact = torch.float32 if ids.device.type == "mps" else torch.float64
        for key in dict.fromkeys([*list(self.heads)[:1], *(p.head for p in pieces)]):
            mine = [(p, g) for p, g in zip(pieces, grads, strict=True) if p.head == key]
            target, residual = torch.full((ids.numel(),), -1, device=ids.device), 0.0
            values = torch.zeros(4, ids.numel(), dtype=exact, device=ids.device)
            for p, g in mine:
                if g is None:
                    continue
                y, new, rest = fit(p.of(p.whole.detach()), p.of(g))
                keep = p.slots >= 0
                slots, y, new = p.slots[keep], y[keep], new[:, keep].to(exact)
                stronger = new[0].abs() >= values[0, slots].abs()
                target[slots] = torch.where(stronger, y, target[slots])
                values.index_add_(1, slots, new)
                residual = max(residual, rest)
            target, values = target.view(ids.shape), values.view(4, *ids.shape)
            found[key] = Readout(float(loss.detach()), residual, len(mine), target, *values)
        self.heads = self.heads or arrange(batch, found, self.frozen)
        main, *extra = (found[k].moved(h.ahead) for k, h in self.heads.items() if k in found)
        main.extra = extra
        return main

    def _catch(
        self, batch: AuditBatch, train: bool, edit: Callable[[Tensor, locate.Layout], Tensor]
    ) -> tuple[Tensor, list[Piece]]:
        """The loss, and the pieces of logits as `edit` passes them."""
        if not self.sites or self.input_module is None:
            raise RuntimeError("no logits to look at")
        used, calls = set[int](), list[tuple[Tensor, dict[Site, list[Tensor]]]]()

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            slots = locate.slots_of_call((args, kwargs), batch, used)
            # A further head may look up the coming tokens: the same pass of the model goes on.
            again = calls and isinstance(module, nn.Embedding) and slots is not None
            if slots is not None and not (again and torch.isin(slots, calls[-1][0]).any()):
                calls.append((slots, {site: [] for site in self.sites}))

        def after(site: Site, module: nn.Module, args: Any, output: Any) -> Any:
            t = locate.get_path(output, site.path)
            if not calls or not isinstance(t, Tensor) or t.ndim != (len(site.layout) or 2):
                return None
            new = edit(t, site.layout)
            calls[-1][1][site].append(new)
            return None if new is t else locate.set_path(output, site.path, new)

        hooks = [self.input_module.register_forward_pre_hook(before, with_kwargs=True)]
        hooks += [s.module.register_forward_hook(partial(after, s)) for s in self.sites]
        loss = self.run(batch, train, hooks)
        placed: list[Piece] = []
        for slots, caught in calls:
            for site, wholes in caught.items():
                shapes = [locate.stacked(t, site.layout).shape[1:] for t in wholes]
                try:
                    heads = locate.place_heads(slots, shapes, batch)
                except RuntimeError:  # not logits of this batch, as of a classifier
                    continue
                for whole, (call, where) in zip(wholes, heads, strict=True):
                    count = len(locate.stacked(whole, site.layout))
                    placed += [Piece((site, i, call), where, whole) for i in range(count)]
        if not placed:
            raise RuntimeError(
                "the logits were not seen in this run, or their positions are unknown"
            )
        return loss, placed


def _loss_of_model(model: Any, batch: Any) -> Tensor:
    loss = locate.get_path(model(**batch), ("loss",)) if isinstance(batch, dict) else None
    if not isinstance(loss, Tensor):
        raise ValueError("the model returns no `.loss`: pass loss_fn(model, batch)")
    return loss
