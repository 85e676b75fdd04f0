"""Lightning callback that finds silent faults of the training loop in its first optimizer steps."""

import copy
import itertools
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from causal_preflight.lightning import PreflightError, _announce
from causal_preflight.report import Finding, Report

STEPS = 3  # optimizer steps that are watched; ten times as many where one optimizer steps rarely
SAMPLES = 64  # elements of a parameter, or rows of a matrix, that are compared
SIMULATED = 20_000  # steps of a schedule that are simulated at most
LOG_GAP = 2e-4  # nats by which the log of a perplexity may exceed its loss
REMEDIES = {  # name of a check -> what to change
    "parameters": "give them to the optimizer, or freeze them with requires_grad_(False)",
    "gradients": "look for detach(), no_grad() or an unused layer between them and the loss",
    "tensors": "make the optimizer in configure_optimizers, after embeddings are resized",
    "zeroing": "call optimizer.zero_grad() before the first backward pass of each step",
    "clipping": "clip in configure_gradient_clipping, or after scaler.unscale_(optimizer)",
    "division": "divide the loss by the micro-batches once; Lightning does, except in manual loops",
    "train mode": "call self.train() before training: from_pretrained leaves eval mode on",
    "validation mode": "keep eval mode, and pass training=self.training to functional dropout",
    "tie": "assign head.weight = embedding.weight again after a resize, a copy or a load",
    "rate": "let the warm-up begin above 0; look for integer division in the schedule",
    "schedule": 'return {"scheduler": ..., "interval": "step"}, or call its step() each step',
    "ranks": "seed all ranks alike, and call self.manual_backward without no_sync()",
    "autocast": "remove autocast(enabled=False) and casts to float32; name the device in use",
    "perplexity": "average the loss over all batches first, then log its exponential",
}


@dataclass
class LoopReport(Report):
    """The outcome: findings have the label `loop`, and the name of a check as `probe`."""

    steps: int = 0
    noted: list[str] = field(default_factory=list)

    @property
    def audited(self) -> bool:
        return bool(self.findings or self.passed)

    @property
    def verdict(self) -> str:
        faults = ", ".join(f.probe for f in self.findings)
        result = f"FAULTS loop ({faults})" if faults else "no fault found in the training loop"
        reason = self.skipped.get("loop", "no optimizer step was seen")
        return f"{result if self.audited else f'NOT AUDITED: {reason}'} ({self.steps} steps)"

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"faults": sorted(self.faults)}

    def notes(self) -> list[tuple[str, str]]:
        return super().notes() + [("note", note) for note in self.noted]


class LoopProbe(L.Callback):
    """Find silent faults of a training loop by what its first three optimizer steps do.

    Use: `Trainer(callbacks=[LoopProbe()])`. What they cannot show is decided later, or skipped.
    `on_fault`: "error" stops the run, "warn" reports the faults and goes on, "off" does nothing.

    Raises:
        PreflightError: on every rank, with the evidence and the remedy.
    """

    def __init__(self, on_fault: str = "error") -> None:
        if on_fault not in ("error", "warn", "off"):
            raise ValueError(f"on_fault must be error, warn or off, not {on_fault!r}")
        self.on_fault, self.report, self.active = on_fault, LoopReport(), False
        self.handles, self.calls, self.scalers = list[Any](), list[Any](), list[Any]()

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.report, self.results, self.told = LoopReport(), dict[str, str](), -1
        self.watched: list[Any] = []
        self.active = self.watching = self.modes_due = self.on_fault != "off"
        if re.search("FSDP|DeepSpeed|ModelParallel|XLA", type(trainer.strategy).__name__):
            self.active = self.watching = False
            self.report.skipped["loop"] = "the strategy shards the parameters"

    def _settle(self, name: str, seen: str = "") -> None:
        """Record what a check saw; nothing means that it passed."""
        self.results[name] = self.results.get(name) or seen

    def _tell(self, trainer: L.Trainer) -> None:
        """Announce the report, and later each new fault. All ranks call it together."""
        report, results = self.report, self.results
        known = [f.probe for f in report.findings]
        report.findings += [Finding("loop", seen, REMEDIES[name], probe=name)
                            for name, seen in results.items() if seen and name not in known]  # fmt: skip
        report.passed = [name for name, seen in results.items() if not seen]
        reasons = {name: "not seen so far" for name in REMEDIES if name not in results}
        report.skipped = reasons | {k: v for k, v in report.skipped.items() if k not in results}
        self.report = report = trainer.strategy.broadcast(report)
        new, first, self.told = report.findings[max(self.told, 0) :], self.told < 0, len(known)
        self.told = len(report.findings)
        if trainer.is_global_zero and (new or first):
            _announce(str(report), clean=not new)
        if new and self.on_fault == "error":
            seen = ". ".join(f"{f.probe}: {f.seen}; {f.remedy}" for f in new)
            raise PreflightError(f'loop: {seen}. To train in spite of it: LoopProbe("warn")')

    # ---- the first steps ----

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if not self.watching or self.watched:
            return
        modules, named = list(module.modules()), dict(module.named_parameters())
        for optimizer in trainer.optimizers:
            params = [p for group in optimizer.param_groups for p in group["params"]]
            w = SimpleNamespace(
                optimizer=optimizer, params=params, norms=torch.zeros(0), steps=0, carried=0,
                stepped=False, left_over=False, rates=[], before_unscaling=[], divided=[],
            )  # fmt: skip
            self.watched.append(w)
            self.handles.append(
                optimizer.register_step_post_hook(partial(self._stepped, module, w))
            )
        held = {id(p): p for w in self.watched for p in w.params}
        self.names = {id(p): name for name, p in named.items()}
        trained = {id(p): p for p in named.values() if p.requires_grad}
        self.without = {i: p for i, p in held.items() if i in trained or i not in self.names}
        self.outside = {i: (p, _sample(p)) for i, p in trained.items() if i not in held}
        self.ran, self.dtypes, self.missed = set[Any](), set[Any](), set[int]()
        self.weights: list[Tensor] = []  # sum of the token weights of each micro-batch
        self.mixed, self.ties = "mixed" in str(trainer.precision), _shared_names(module)
        self.positions = [c.scheduler.last_epoch for c in trainer.lr_scheduler_configs]
        self.owners = {id(p): m for m in modules for p in m.parameters(recurse=False)}
        if not any(type(m).__name__ == "OptimizedModule" for m in modules):  # compiled
            owners = set(self.owners.values())
            self.handles += [m.register_forward_hook(self._called) for m in owners]
        found = [getattr(trainer.precision_plugin, "scaler", None), *vars(module).values()]
        self.scalers = [x for x in found if isinstance(x, torch.amp.GradScaler)]
        for scaler in self.scalers:
            vars(scaler)["unscale_"] = partial(self._unscale, scaler.unscale_)
        self._settle("tie", "; ".join(_untied_copies(module)))
        self._compare_ranks(module, "before the first step")

    def _called(self, module: nn.Module, args: Any, output: Any) -> None:
        self.ran.add(module)
        self.mixed |= any(map(torch.is_autocast_enabled, ("cpu", "cuda", "mps", "xpu")))
        if isinstance(module, nn.Linear | nn.MultiheadAttention):
            self.dtypes.add((output[0] if isinstance(output, tuple) else output).dtype)

    def on_before_backward(self, trainer: Any, module: L.LightningModule, loss: Tensor) -> None:
        if not self.watching:
            return
        for w in self.watched:
            if w.stepped or w.left_over:  # else these are gradients of the same step
                w.stepped, w.left_over = False, any(bool(g.any()) for g in _grads(w)[:4])
        node: Any = loss.grad_fn
        for _ in range(12):  # a loss made by one log-softmax: its gradient is minus the weights
            following = [n for n, _ in getattr(node, "next_functions", ()) if n is not None]
            if len(following) != 1 or node.name() == "LogSoftmaxBackward0":
                break
            node = following[0]
        if node is not None and node.name() == "LogSoftmaxBackward0":
            node.register_prehook(lambda grads: self.weights.append(-grads[0].float().sum()))
        else:
            self.weights.append(loss.new_tensor(math.nan))

    def on_after_backward(self, *_: Any) -> None:
        if self.watching:
            for w in self.watched:
                w.norms = _norms(w)

    def _unscale(self, unscale: Any, optimizer: Any) -> None:
        for w in self.watched:
            if w.optimizer in (optimizer, getattr(optimizer, "optimizer", None)) and _grads(w):
                sizes = [(g.norm(), g.abs().max()) for g in _grads(w)]
                norm, largest = torch.tensor(sizes)[:, 0].norm(), max(m for _, m in sizes)
                w.before_unscaling.append((_ratio(w), norm.item(), largest.item()))
        unscale(optimizer)

    def _stepped(self, module: Any, w: Any, *_: Any) -> None:
        """After a step of one optimizer: its gradients are those that it used."""
        if not len(w.norms):
            return
        self.without = {i: p for i, p in self.without.items() if p.grad is None}
        self.missed |= {i for i, (p, _) in self.outside.items() if p.grad is not None}
        w.carried, w.steps, w.stepped = w.carried + w.left_over, w.steps + 1, True
        w.rates.append(max(float(g.get("lr", 1)) for g in w.optimizer.param_groups))
        n = len(self.weights)
        if module.automatic_optimization:
            n = module.trainer.accumulate_grad_batches
        if n > 1:
            w.divided += [float(x) * _ratio(w) * n * n for x in self.weights]
        self.weights, w.norms = [], torch.zeros(0)

    def _compare_ranks(self, module: L.LightningModule, when: str) -> bool:
        """Compare the weights of all ranks. Whether all have seen enough steps."""
        steps = [w.steps for w in self.watched] or [0]
        enough = min(steps) >= STEPS or max(steps) >= 10 * STEPS
        if module.trainer.world_size == 1:
            return enough
        parts = [_sample(p).to(module.device) for p in module.parameters()]
        row = torch.cat([*parts, torch.tensor([enough], device=module.device)])
        rows: Any = module.all_gather(row)  # (ranks, elements + 1)
        differ = ((rows - rows[0]).abs() > 1e-6 * rows[0].abs() + 1e-10).any(0)[:-1]
        if differ.any():
            self._settle("ranks", f"{differ.float().mean():.0%} of the weights differ {when}")
        return bool(rows[:, -1].all())

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.modes_due:
            names = _in_eval_mode(module)
            self._settle("train mode", f"{_some(names)} trained in eval mode" if names else "")
        if self.watching and self._compare_ranks(module, "after a step"):
            self._conclude(trainer, module)
        elif self.modes_due and not self.watching:
            self.modes_due = False
            self._tell(trainer)

    def _conclude(self, trainer: Any, module: L.LightningModule) -> None:
        """Settle what the watched steps show."""
        self.watching = self.modes_due = False
        self._unhook()
        self.report.steps = max((w.steps for w in self.watched), default=0)
        parted = [" and ".join(sorted(x)) for x in self.ties - _shared_names(module)]
        self._settle("tie", "; ".join(f"{names} parted" for names in parted))
        if trainer.world_size > 1:
            self._settle("ranks")
        if self.mixed and self.dtypes:
            low = self.dtypes & {torch.bfloat16, torch.float16}
            self._settle("autocast", "" if low else "all linear layers computed in float32")
        if self.watched and min(w.steps for w in self.watched) > 1:
            again = any(w.carried >= w.steps - 1 for w in self.watched)
            self._settle("zeroing", "each step used those of the one before too" if again else "")
            self._conclude_gradients()
            self._conclude_schedules(trainer, module)
        for w in self.watched:
            ratios, *sizes = (
                zip(*w.before_unscaling) if len(w.before_unscaling) > 1 else [(0.9995,)]
            )
            if max(ratios) < 0.999 and any(max(x) < 1.01 * min(x) for x in sizes):
                self._settle("clipping", f"their norm was {sizes[0][0]:.3g} before unscaling")
            elif min(ratios) >= 0.9999:
                self._settle("clipping")
            if w.divided and not any(map(math.isnan, w.divided)):
                if all(abs(x - 1) < 1e-3 for x in w.divided):
                    self._settle("division", "n micro-batches weigh 1/n together")
                elif all(x > 1.5 for x in w.divided):
                    self._settle("division")
        self._tell(trainer)

    def _conclude_gradients(self) -> None:
        """Which tensors the optimizers hold, and which of them got gradients."""
        stale = [i for i in self.without if i not in self.names]
        lost = [self.names[i] for i, (p, before) in self.outside.items()
                if i in self.missed and torch.equal(before, _sample(p))]  # fmt: skip
        beside = f"; {_some(lost)} are in no optimizer" if lost else ""
        seen = f"{len(stale)} tensors of the optimizer are not the module's{beside}"
        self._settle("tensors", seen if stale else "")
        lost = lost if len(lost) > len(stale) else []  # else the stale ones are their old versions
        self._settle("parameters", f"{_some(lost)} train, but are in no optimizer" if lost else "")
        dead = {self.names[i]: self.owners[i] in self.ran for i in self.without if i in self.names}
        live = {_kind(name) for name in self.names.values() if name not in dead}
        idle = [name for name, ran in dead.items() if not ran and _kind(name) in live]
        dead_names = [name for name in dead if name not in idle]
        if dead_names or not idle:
            self._settle("gradients", f"{_some(dead_names)} got none" if dead_names else "")
        else:  # an expert, or a layer dropped at random
            self.report.skipped["gradients"] = f"{_some(idle)} were not called"

    def _conclude_schedules(self, trainer: Any, module: L.LightningModule) -> None:
        per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
        whole = (trainer.max_epochs or -1) * per_epoch
        steps = min((n for n in (trainer.max_steps, whole) if 0 < n < math.inf), default=0)
        for config, position in zip(trainer.lr_scheduler_configs, self.positions, strict=True):
            by_epoch, rates = config.interval == "epoch", list[float]()
            if not module.automatic_optimization:
                by_epoch = config.scheduler.last_epoch == position
            epochs = max(1, math.ceil(steps / per_epoch))
            if by_epoch and not hasattr(config.scheduler, "num_bad_epochs"):  # of ReduceLROnPlateau
                rates = _simulate(config.scheduler, 2 * math.ceil(steps), [trainer, module])
            why = _meant_for_steps(rates, epochs, math.ceil(steps)) if steps and rates else ""
            self._settle(
                "schedule",
                f"the rate {why}, in a run of {epochs} epochs, by which it moves" if why else "",
            )
        if not self.results.get("schedule"):
            zero = [w for w in self.watched if not any(w.rates)]
            self._settle("rate", f"it was 0 in {self.report.steps} steps" if zero else "")
        decayed = [self.names.get(id(p), "?") for w in self.watched
                   for group in w.optimizer.param_groups if group.get("weight_decay")
                   for p in group["params"] if p.ndim < 2]  # fmt: skip
        if decayed:
            self.report.noted.append(f"weight decay acts on norms or biases: {_some(decayed)}")

    # ---- validation, and the end ----

    def on_validation_batch_start(self, trainer: Any, module: L.LightningModule, *_: Any) -> None:
        """Watch whether the first batch makes the module, or a part of it, draw random numbers."""
        if not self.active or "validation mode" in self.results or self.calls:
            return
        kind, states, self.drawn = module.device.type, dict[Any, Tensor](), list[bool]()
        random_state = torch.get_rng_state if kind == "cpu" else getattr(torch, kind).get_rng_state

        def enter(part: nn.Module, *_: Any) -> None:
            states[part] = random_state()

        def leave(part: nn.Module, *_: Any) -> None:
            self.drawn.append(not torch.equal(states[part], random_state()))

        for part in (module, *module.children()):
            self.calls.append(part.register_forward_pre_hook(enter))
            self.calls.append(part.register_forward_hook(leave))

    def on_validation_batch_end(self, trainer: Any, module: L.LightningModule, *_: Any) -> None:
        if self.calls and self.drawn:
            names = [n for n, m in module.named_modules() if m.training and getattr(m, "p", 0)]
            seen = f"the model draws random numbers; in train mode are: {_some(names) or 'none'}"
            self._settle("validation mode", seen if any(self.drawn) else "")
        _remove(self.calls)

    def on_validation_end(self, trainer: Any, module: L.LightningModule) -> None:
        if self.active and not trainer.sanity_checking:
            self._settle_perplexity(trainer, sum(trainer.num_val_batches))
            self.modes_due = True  # of the next training batch
            if not self.watching:
                self._tell(trainer)

    def on_train_end(self, trainer: Any, module: L.LightningModule) -> None:
        if self.active:
            self._settle_perplexity(trainer, trainer.num_training_batches)
            (self._conclude(trainer, module) if self.watching else self._tell(trainer))

    def _settle_perplexity(self, trainer: Any, batches: float) -> None:
        """Compare what was logged as a mean over batches, or at the end of an epoch."""
        own = {f"{r.meta.name}_epoch" if r.meta.on_step else r.meta.name
               for r in trainer._results.values() if r.meta.on_epoch and r.is_tensor}  # fmt: skip
        logged = {name: float(v) for name, v in trainer.callback_metrics.items() if name in own}
        for name, loss, gap in _perplexities(logged):
            if gap > LOG_GAP or batches > 1:
                seen = f"{name} is {math.exp(gap):.4g} times the exponential of {loss}"
                self._settle("perplexity", seen if gap > LOG_GAP else "")

    def teardown(self, *_: Any, **__: Any) -> None:
        self.active = False
        self._unhook()

    def _unhook(self) -> None:
        _remove(self.handles + self.calls)
        self.handles, self.calls = [], []
        for scaler in self.scalers:
            vars(scaler).pop("unscale_", None)


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _kind(name: str) -> str:
    """A name without numbers: equal for layers or experts that are alike."""
    return re.sub(r"\d+", "#", name)


def _grads(watched: Any) -> list[Tensor]:
    return [p.grad.detach().float() for p in watched.params if p.grad is not None]


def _norms(watched: Any) -> Tensor:
    """Norms of the first gradients."""
    return torch.tensor([g.norm() for g in _grads(watched)[:4]])


def _ratio(watched: Any) -> float:
    """Norm of a gradient by that after the last backward pass."""
    now, before = _norms(watched), watched.norms
    return (now / before).nanmedian().item() if now.shape == before.shape else math.nan


def _sample(p: Tensor) -> Tensor:
    """Up to SAMPLES elements, as a copy in float32."""
    return p.detach().flatten()[:: max(1, p.numel() // SAMPLES)][:SAMPLES].float().clone()


def _shared_names(module: nn.Module) -> set[frozenset[str]]:
    """The names of each parameter that has several."""
    names = defaultdict(set)
    for name, p in module.named_parameters(remove_duplicate=False):
        names[id(p)].add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def _untied_copies(module: nn.Module) -> Iterator[str]:
    """Pairs of an embedding, tied to nothing, and a matrix of which most rows are equal."""
    tied = frozenset[str]().union(*_shared_names(module))
    tables = {f"{n}.weight": m for n, m in module.named_modules() if isinstance(m, nn.Embedding)}
    for (name, table), (other, p) in itertools.product(tables.items(), module.named_parameters()):
        a, b = table.weight.detach(), p.detach()
        if {name, other} & {*tied} or other in tables or b.ndim != 2 or a.shape[1] != b.shape[1]:
            continue
        rows = torch.linspace(0, min(len(a), len(b)) - 1, SAMPLES, device=a.device).long()
        equal = torch.isclose(a[rows].float(), b[rows].float(), rtol=1e-2).all(1) & a[rows].any(1)
        if a.data_ptr() != b.data_ptr() and equal.float().mean() > 0.5:
            yield f"{name} and {other} are two tensors"


def _in_eval_mode(root: nn.Module) -> list[str]:
    """Modules that train in eval mode; not batch norms, nor what `train()` leaves in eval mode."""

    def found() -> list[str]:
        trained = [(n, m) for n, m in root.named_modules() if not m.training]
        trained = [x for x in trained if any(p.requires_grad for p in x[1].parameters(False))]
        return [n for n, m in trained if not isinstance(m, nn.modules.batchnorm._BatchNorm)]

    modes, names = [(m, m.training) for m in root.modules()], found()
    if names:
        root.train()
        intended = set(found())
        names = [name for name in names if name not in intended]
        for module, mode in modes:
            module.training = mode
    return names


def _simulate(scheduler: Any, steps: int, shared: Iterable[Any]) -> list[float]:
    """The rates of a copy of the schedule; `shared` is not copied with it."""
    groups = [dict(g, params=[torch.zeros(1)]) for g in scheduler.optimizer.param_groups]
    memo: dict[int, Any] = {id(x): x for x in shared}
    memo[id(scheduler.optimizer)] = stand_in = torch.optim.SGD(groups, lr=0.0)
    twin, rates = copy.deepcopy(scheduler, memo), list[float]()
    with warnings.catch_warnings(action="ignore"):
        while len(rates) <= min(steps, SIMULATED):
            rates.append(sum(float(g["lr"]) for g in stand_in.param_groups))
            try:
                twin.step()
            except ValueError:  # OneCycleLR has an end
                break
    return rates


def _meant_for_steps(rates: list[float], epochs: int, steps: int) -> str:
    """Why a schedule that moves by epochs is meant for steps; empty if nothing says so.

    It is if it rises for longer than the run has epochs, or falls until the last step of the run.
    """
    peak, end = rates.index(max(rates[: steps + 1])), rates.index(min(rates))
    if peak > 2 * epochs and max(rates[:epochs]) < 0.99 * rates[peak]:
        return f"rises for {peak} of its steps"
    falls = end > 2 * epochs and rates[end] < 0.9 * rates[peak] and len(rates) <= SIMULATED
    return f"falls for {end} of its steps" if falls and 0.5 <= end / steps <= 1.05 else ""


def _perplexities(logged: dict[str, float]) -> Iterator[tuple[str, str, float]]:
    """Name of a perplexity, name of the loss beside it, and log(perplexity) - loss in nats."""
    word = re.compile("perplexity|ppl", re.IGNORECASE)
    for name in filter(word.search, logged):
        beside = [word.sub(loss, name) for loss in ("loss", "nll", "ce", "cross_entropy")]
        beside = [x for x in beside if x in logged]
        if beside and 0 < logged[name] < math.inf:
            yield name, beside[0], math.log(logged[name]) - logged[beside[0]]
