"""Lightning callback that watches the first optimizer steps for silent faults of the loop."""

import math
import re
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from causal_preflight import loop_checks
from causal_preflight.lightning import PreflightError, _announce
from causal_preflight.report import Finding, Report

STEPS = 3  # optimizer steps that are watched; ten times as many where one optimizer steps rarely
LOG_GAP = 2e-4  # nats by which the log of a perplexity may exceed its loss
REMEDIES = {  # name of a check -> what to change
    "parameters": "give them to the optimizer, or freeze them with requires_grad_(False)",
    "gradients": "look for detach(), no_grad() or an unused layer between them and the loss",
    "tensors": "make the optimizer in configure_optimizers, after embeddings are resized",
    "zeroing": "call optimizer.zero_grad() before the first backward pass of each step",
    "clipping": "clip in configure_gradient_clipping, or after scaler.unscale_(optimizer)",
    "division": "divide the loss by the micro-batches once; Lightning does (not manual loops)",
    "train mode": "call self.train() before training (from_pretrained leaves eval mode on)",
    "validation mode": "keep eval mode; F.dropout(training=self.training); attention dropout_p too",
    "tie": "assign head.weight = embedding.weight again after a resize, a copy or a load",
    "rate": "let the warm-up begin above 0; look for integer division in the schedule",
    "schedule": 'return {"scheduler": ..., "interval": "step"}, or step it after each optimizer',
    "ranks": "seed all ranks alike; call self.manual_backward; no_sync only within a step",
    "autocast": "remove autocast(enabled=False) and casts to float32; name the device in use",
    "perplexity": "average the loss over all batches first, then log its exponential",
    "weight decay": "put norms and biases into a group with weight_decay=0",
}
OPEN = {  # name of a check -> why it may be undecided, if not for too few steps
    "clipping": "no gradient scaler, or nothing changed the gradients before it",
    "division": "no step of several micro-batches whose loss is made by a log-softmax alone",
    "validation mode": "no validation has called the model so far",
    "schedule": "no scheduler, or a run of unknown length",
    "ranks": "one rank",
    "autocast": "the precision is not mixed, or the model is compiled",
    "perplexity": "no validation of several batches has logged a perplexity and its loss so far",
}


@dataclass
class LoopReport(Report):
    """The outcome of `LoopProbe`: its findings have the label `loop`, and a check as `probe`."""

    steps: int = 0
    noted: list[str] = field(default_factory=list)

    @property
    def audited(self) -> bool:
        return bool(self.passed or self.findings)

    @property
    def verdict(self) -> str:
        faults = ", ".join(f.probe for f in self.findings)
        result = f"FAULTS loop ({faults})" if faults else "no fault found in the training loop"
        skipped = self.skipped.get("loop", "no optimizer step was seen")
        return f"{result if self.audited else f'NOT AUDITED: {skipped}'} ({self.steps} steps)"

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"faults": sorted(self.faults)}

    def notes(self) -> list[tuple[str, str]]:
        return super().notes() + [("note", note) for note in self.noted]


class _Watched:
    """What was seen of one optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer, self.params = (
            optimizer,
            [p for group in optimizer.param_groups for p in group["params"]],
        )
        self.steps = self.carried = 0  # steps; those with gradients from before the last one
        self.has_grad = self.stepped = self.left_over = False
        self.rates: list[float] = []
        self.norms = torch.zeros(0)  # of some gradients, after the last backward pass
        self.unscaled: list[tuple[float, float, float]] = []  # ratio, norm, maximum just before
        self.divided: list[bool] = []

    def grads(self) -> list[Tensor]:
        return [p.grad.detach().float() for p in self.params if p.grad is not None]

    def ratio(self) -> float:
        """Norm of some gradients by that after the backward pass."""
        now = torch.stack([g.norm() for g in self.grads()[:4]] or [torch.zeros(0)])
        same = now.shape == self.norms.shape
        return (now / self.norms).nanmedian().item() if same else math.nan


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
        self.on_fault, self.report, self.watched = on_fault, LoopReport(), list[_Watched]()
        self.handles, self.calls, self.told = list[Any](), list[Any](), -1
        self.active = self.watching = self.modes_due = False

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.__init__(self.on_fault)  # type: ignore[misc]
        if re.search("FSDP|DeepSpeed|ModelParallel|XLA", type(trainer.strategy).__name__):
            self.report.skipped["loop"] = "the strategy shards the parameters"
            self._tell(trainer)
        elif self.on_fault != "off":
            self.active = self.watching = self.modes_due = True

    def _settle(self, name: str, seen: str = "") -> None:
        """Record that a check found something, or nothing."""
        found = any(f.probe == name for f in self.report.findings)
        if seen and not found:
            self.report.findings.append(Finding("loop", seen, REMEDIES[name], probe=name))
            self.report.passed = [x for x in self.report.passed if x != name]
        elif not seen and not found and name not in self.report.passed:
            self.report.passed.append(name)

    def _is_open(self, name: str) -> bool:
        return name not in self.report.passed and all(f.probe != name for f in self.report.findings)

    def _tell(self, trainer: L.Trainer) -> None:
        """Announce the report once, and each later fault. All ranks call it together."""
        settled = {*self.report.passed, *(f.probe for f in self.report.findings)}
        if "loop" not in self.report.skipped:
            why = OPEN | self.report.skipped
            open_ = (name for name in REMEDIES if name not in settled)
            self.report.skipped = {name: why.get(name, "too few steps") for name in open_}
        self.report = report = trainer.strategy.broadcast(self.report)
        new, first, self.told = (
            report.findings[max(self.told, 0) :],
            self.told < 0,
            len(report.findings),
        )
        if trainer.is_global_zero and (new or first):
            _announce(str(report), clean=not new)
        if new and self.on_fault == "error":
            seen = ". ".join(f"{f.probe}: {f.seen}; {f.remedy}" for f in new)
            raise PreflightError(f'loop: {seen}. To train in spite of it: LoopProbe("warn")')

    # ---- the first steps ----

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if not self.watching or self.watched:
            return
        self.watched = [_Watched(x) for x in trainer.optimizers]
        self.names = {id(p): name for name, p in module.named_parameters()}
        held = {id(p): p for w in self.watched for p in w.params}
        trained = {id(p): p for p in module.parameters() if p.requires_grad}
        self.without = {i: p for i, p in held.items() if i in trained or i not in self.names}
        self.outside = {i: (p, loop_checks.sample(p)) for i, p in trained.items() if i not in held}
        self.outside_with_grad: set[int] = set()
        self.ran, self.dtypes = set[nn.Module](), set[torch.dtype]()
        self.mixed = "mixed" in str(trainer.precision)
        self.micro_batches: list[list[Tensor]] = []  # loss, sum of token weights, loss read back
        self.log_probs: list[Tensor] = []
        self.ties = loop_checks.shared_names(module)
        self.positions = [c.scheduler.last_epoch for c in trainer.lr_scheduler_configs]
        self._settle("tie", ", ".join(loop_checks.untied_copies(module)))
        self._compare_ranks(module, "before the first step")
        self.owners = {id(p): m for m in module.modules() for p in m.parameters(recurse=False)}
        if not any(type(m).__name__ == "OptimizedModule" for m in module.modules()):
            hooks = (m.register_forward_hook(self._called) for m in set(self.owners.values()))
            self.handles += hooks
        for w in self.watched:
            hook = partial(self._stepped, trainer, module, w)
            self.handles.append(w.optimizer.register_step_post_hook(hook))
        found = [getattr(trainer.precision_plugin, "scaler", None), *vars(module).values()]
        self.scalers = [x for x in found if isinstance(x, torch.amp.GradScaler)]
        for scaler in self.scalers:
            scaler.unscale_ = partial(self._unscale, scaler.unscale_)  # type: ignore[method-assign]

    def _called(self, module: nn.Module, args: Any, output: Any) -> None:
        self.ran.add(module)
        self.mixed |= any(map(torch.is_autocast_enabled, ("cpu", "cuda", "mps", "xpu")))
        first = output[0] if isinstance(output, tuple) else output
        is_leaf = not any(module.children()) and not isinstance(module, nn.Embedding)
        if is_leaf and isinstance(first, Tensor) and any(p.ndim > 1 for p in module.parameters()):
            self.dtypes.add(first.dtype)

    def on_before_backward(self, trainer: Any, module: L.LightningModule, loss: Tensor) -> None:
        if self.modes_due:
            names = loop_checks.in_eval_mode(module)
            self._settle("train mode", f"{_some(names)} trained in eval mode" if names else "")
        if not self.watching:
            return
        for w in self.watched:
            if w.stepped or w.left_over:
                w.stepped, w.left_over = False, any(bool(g.any()) for g in w.grads()[:4])
        record = [loss.detach(), torch.zeros_like(loss), torch.zeros_like(loss)]
        self.micro_batches.append(record)
        nodes, seen = [loss.grad_fn], set[Any]()
        while nodes and len(seen) < 500:
            node: Any = nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node.name() == "LogSoftmaxBackward0":  # whose gradient is minus the token weights
                node.register_prehook(partial(self._read, record, len(self.log_probs)))
                self.log_probs.append(node._saved_result.detach())
            else:
                nodes += [following for following, _ in node.next_functions]

    def _read(self, record: list[Tensor], index: int, grads: tuple[Tensor, ...]) -> None:
        grad = grads[0].flatten().float()
        record[1] = record[1] - grad.sum()
        record[2] = record[2] + torch.dot(grad, self.log_probs[index].flatten().float())

    def on_after_backward(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not self.watching:
            return
        self.log_probs.clear()
        self._see_gradients()
        for w in self.watched:
            if grads := w.grads()[:4]:
                w.has_grad, w.norms = True, torch.stack([g.norm() for g in grads])

    def _see_gradients(self) -> None:
        self.without = {i: p for i, p in self.without.items() if p.grad is None}
        for i, (p, _) in self.outside.items():
            if p.grad is not None and i not in self.outside_with_grad and p.grad.any():
                self.outside_with_grad.add(i)

    def _unscale(self, unscale: Any, optimizer: Any) -> None:
        for w in self.watched:
            if optimizer is w.optimizer or getattr(optimizer, "optimizer", None) is w.optimizer:
                norms = torch.stack([torch.stack([g.norm(), g.abs().max()]) for g in w.grads()])
                seen = w.ratio(), norms[:, 0].norm().item(), norms[:, 1].max().item()
                w.unscaled += [seen] if all(map(math.isfinite, seen)) else []
        unscale(optimizer)

    def _stepped(self, trainer: L.Trainer, module: Any, w: _Watched, *_: Any) -> None:
        """After a step of one optimizer: its gradients are those that it used."""
        if not w.has_grad:
            return
        w.has_grad, w.steps, w.stepped = False, w.steps + 1, True
        w.carried += w.left_over
        w.rates.append(max(float(g.get("lr", 1.0)) for g in w.optimizer.param_groups))
        self._see_gradients()
        parts, automatic = self.micro_batches, module.automatic_optimization
        n = trainer.accumulate_grad_batches if automatic else len(parts)
        if n > 1:
            ratio = w.ratio()
            for loss, weight, read in (map(float, part) for part in parts):
                alone = math.isclose(loss, read, rel_tol=1e-3)
                w.divided.append(alone and math.isclose(weight * ratio * n * n, 1, rel_tol=1e-3))
        self.micro_batches = []

    def _compare_ranks(self, module: L.LightningModule, when: str) -> bool:
        """Compare the weights of all ranks; whether each has seen enough steps."""
        steps = [w.steps for w in self.watched] or [0]
        enough = min(steps) >= STEPS or max(steps) >= 10 * STEPS
        if module.trainer.world_size == 1:
            return enough
        samples = {n: loop_checks.sample(p).to(module.device) for n, p in module.named_parameters()}
        row = torch.cat([*samples.values(), torch.tensor([enough], device=module.device)])
        rows: Any = module.all_gather(row)  # (ranks, elements + 1)
        differ = ((rows - rows[0]).abs() > 1e-6 * rows[0].abs() + 1e-10).any(0)[:-1].tolist()
        names = [name for name, values in samples.items() for _ in values]
        if any(differ):
            first = names[differ.index(True)]
            self._settle("ranks", f"{sum(differ)} of {len(differ)} weights differ {when}: {first}")
        return bool(rows[:, -1].all())

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.watching and self._compare_ranks(module, "after a step"):
            self._conclude(trainer, module)
        elif self.modes_due and not self.watching:
            self.modes_due = False
            self._tell(trainer)

    def _conclude(self, trainer: Any, module: L.LightningModule) -> None:
        """Settle what the watched steps show."""
        self.watching = False
        self._close()
        watched, settle = self.watched, self._settle
        self.report.steps = max((w.steps for w in watched), default=0)
        lost = self.ties - loop_checks.shared_names(module)
        settle("tie", "; ".join(f"{' and '.join(sorted(names))} parted" for names in lost))
        if trainer.world_size > 1:
            settle("ranks")
        if self.mixed and self.dtypes:
            low = self.dtypes & {torch.bfloat16, torch.float16}
            settle("autocast", "" if low else "no layer computed in 16 bits")
        if watched and min(w.steps for w in watched) > 1:
            self._settle_gradients()
            again = [w for w in watched if w.carried >= w.steps - 1]
            settle("zeroing", "each step used gradients of the one before" if again else "")
            self._settle_schedules(trainer, module)
        for w in watched:
            ratios, *sizes = zip(*w.unscaled) if len(w.unscaled) > 1 else ([math.nan],)
            if max(ratios) < 0.999 and any(max(x) < 1.01 * min(x) for x in sizes):
                settle("clipping", f"gradients had norm {sizes[0][0]:.3g} when they were unscaled")
            elif min(ratios) >= 0.999:
                settle("clipping")
            if w.divided and None not in w.divided:
                settle(
                    "division",
                    "the micro-batches of a step weigh 1/n together" if all(w.divided) else "",
                )
        self._tell(trainer)

    def _settle_gradients(self) -> None:
        """Of what the optimizers hold, and of what they do not."""
        without = {self.names.get(i, ""): self.owners.get(i) for i in self.without}
        foreign = [p for i, p in self.without.items() if i not in self.names]
        outside = [
            self.names[i]
            for i in self.outside_with_grad
            if torch.equal(self.outside[i][1], loop_checks.sample(self.outside[i][0]))
        ]
        beside = f"; {_some(outside)} are in no optimizer" if outside else ""
        self._settle(
            "tensors",
            f"{len(foreign)} tensors of the optimizer are not the module's{beside}"
            if foreign
            else "",
        )
        more = outside if len(outside) > len(foreign) else []
        self._settle(
            "parameters", f"{_some(more)} get gradients but are in no optimizer" if more else ""
        )
        kinds = {
            _kind(self.names[i])
            for w in self.watched
            for i in map(id, w.params)
            if i in self.names and i not in self.without
        }
        without.pop("", None)
        idle = [n for n, m in without.items() if m not in self.ran and _kind(n) in kinds]
        dead = [n for n in without if n not in idle]
        if dead or not idle:
            self._settle("gradients", f"{_some(dead)} got no gradient" if dead else "")
        else:
            self.report.skipped["gradients"] = f"{_some(idle)} were not called: unused experts?"

    def _settle_schedules(self, trainer: Any, module: L.LightningModule) -> None:
        batches = trainer.num_training_batches / trainer.accumulate_grad_batches
        bounds = (
            trainer.max_steps,
            (trainer.max_epochs or -1) * math.ceil(batches) if batches < math.inf else -1,
        )
        steps = min((n for n in bounds if n > 0), default=0)
        epochs = max(1, math.ceil(steps / batches))
        for config, position in zip(trainer.lr_scheduler_configs, self.positions, strict=True):
            scheduler, by_epoch = config.scheduler, config.interval == "epoch"
            if not module.automatic_optimization:
                by_epoch = scheduler.last_epoch == position
            if not by_epoch or isinstance(scheduler, ReduceLROnPlateau):
                self._settle("schedule")
            elif steps:
                why = loop_checks.meant_for_steps(scheduler, epochs, steps, [trainer, module])
                seen = f"the rate {why}, but moves once an epoch, {epochs} times in the run"
                self._settle("schedule", seen if why else "")
        if not any(f.probe == "schedule" for f in self.report.findings):
            zero = [w for w in self.watched if not any(w.rates)]
            self._settle("rate", f"it was 0 in {self.report.steps} steps" if zero else "")
        decayed = [
            self.names.get(id(p), "?")
            for w in self.watched
            for g in w.optimizer.param_groups
            if g.get("weight_decay")
            for p in g["params"]
            if p.ndim < 2
        ]
        if decayed:
            self.report.noted.append(f"weight decay acts on norms and biases: {_some(decayed)}")
        self._settle("weight decay")

    # ---- what is decided later ----

    def on_validation_start(self, trainer: Any, module: L.LightningModule) -> None:
        """Note which calls of the module or its children draw random numbers."""
        self.draws: dict[str, bool] = {}
        if not self.active or not self._is_open("validation mode"):
            return
        backend: Any = torch if module.device.type == "cpu" else getattr(torch, module.device.type)
        states: dict[str, Tensor] = {}

        def before(name: str, *_: Any) -> None:
            states[name] = backend.get_rng_state()

        def after(name: str, *_: Any) -> None:
            drawn = not torch.equal(states[name], backend.get_rng_state())
            self.draws[name] = self.draws.get(name, False) or drawn
            if drawn and not self.dropout:
                self.dropout = [n for n, m in module.named_modules() if m.training]

        self.dropout: list[str] = []
        for name, part in [(type(module).__name__, module), *module.named_children()]:
            self.calls.append(part.register_forward_pre_hook(partial(before, name)))
            self.calls.append(part.register_forward_hook(partial(after, name)))

    def on_validation_end(self, trainer: Any, module: L.LightningModule) -> None:
        _remove(self.calls)
        if self.active and self.draws:
            names = [name for name, drawn in self.draws.items() if drawn]
            train = f", in train mode: {_some(self.dropout)}" if self.dropout else ""
            self._settle(
                "validation mode", f"{_some(names)} drew random numbers{train}" if names else ""
            )
        if self.active and not trainer.sanity_checking:
            self._check_perplexities(trainer, sum(trainer.num_val_batches) > 1)
        self.modes_due = self.active
        if self.active and not self.watching:
            self._tell(trainer)

    def on_train_end(self, trainer: Any, module: L.LightningModule) -> None:
        if self.active:
            self._check_perplexities(trainer, trainer.num_training_batches > 1)
            if self.watching:
                self._conclude(trainer, module)
            self._tell(trainer)

    def _check_perplexities(self, trainer: Any, several: bool) -> None:
        own = {
            f"{r.meta.name}_epoch" if r.meta.on_step else r.meta.name: r.is_tensor
            for r in (trainer._results or {}).values()
            if r.meta.on_epoch
        }
        metrics = {name: v for name, v in trainer.callback_metrics.items() if name in own}
        for name, loss, gap in loop_checks.perplexities(metrics):
            seen = f"{name} is {math.exp(gap):.4g} times exp({loss})"
            if gap > LOG_GAP and not own[name]:
                self.report.noted.append(f"{seen}: is the loss a mean of batch means?")
            elif gap > LOG_GAP:
                self._settle("perplexity", seen)
            elif several:
                self._settle("perplexity")

    def teardown(self, *_: Any, **__: Any) -> None:
        self._close()
        self.active = False

    def _close(self) -> None:
        _remove(self.handles)
        _remove(self.calls)
        for scaler in getattr(self, "scalers", []):
            vars(scaler).pop("unscale_", None)


def _remove(handles: list[Any]) -> None:
    while handles:
        handles.pop().remove()


def _kind(name: str) -> str:
    """The name without numbers: layers and experts that are alike have the same."""
    return re.sub(r"\d+", "#", name)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
