"""Lightning callback that finds silent faults of the training loop in its first optimizer steps."""

import math
import re
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from causal_preflight import loop_checks
from causal_preflight.lightning import PreflightError, _announce
from causal_preflight.loop_checks import BY_EPOCH, LOG_GAP, PATIENCE, REMEDIES, STEPS, sample, some
from causal_preflight.report import Finding, Report


@dataclass
class LoopReport(Report):
    """The outcome: findings have the label `loop`, and the name of a check as `probe`."""

    steps: int = 0
    noted: list[str] = field(default_factory=list)

    @property
    def audited(self) -> bool:
        return bool(self.findings or self.steps)

    @property
    def verdict(self) -> str:
        if not self.audited:
            return f"NOT AUDITED: {self.skipped.get('loop', 'no optimizer step was seen')}"
        faults = ", ".join(f.probe for f in self.findings)
        return f"training loop, {self.steps} steps: {f'FAULTS {faults}' if faults else 'no fault'}"

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
        self.hooks, self.calls = ExitStack(), ExitStack()  # of training, and of a validation

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.report, self.results, self.watched = LoopReport(), dict[str, str](), list[Any]()
        self.drawn, self.names, self.batches = list[bool](), dict[int, str](), 0
        sharded = re.search("FSDP|DeepSpeed|ModelParallel|XLA", type(trainer.strategy).__name__)
        self.active = self.on_fault != "off" and not sharded
        self.watching = self.modes_due = self.active  # the first steps; the next batch
        if sharded and self.on_fault != "off":
            self.report.skipped["loop"] = "the strategy shards the parameters"
            self._tell(trainer)

    def _settle(self, name: str, wrong: object = None, seen: str = "") -> None:
        """Record that a check passed or, if anything is wrong, what it saw."""
        self.results[name] = self.results.get(name) or (seen if wrong else "")

    def _tell(self, trainer: L.Trainer) -> None:
        """Announce the report at first, and then new faults. All ranks call it together."""
        report, known, first = self.report, len(self.report.findings), not self.report.passed
        for name, seen in self.results.items():
            if seen and all(f.probe != name for f in report.findings):
                report.findings.append(Finding("loop", seen, REMEDIES[name], probe=name))
        report.passed = [name for name, seen in self.results.items() if not seen]
        if self.active:
            skipped = dict.fromkeys(REMEDIES, "nothing to examine so far") | report.skipped
            report.skipped = {k: v for k, v in skipped.items() if k not in self.results}
        self.report = report = trainer.strategy.broadcast(report)
        new = report.findings[known:]
        if trainer.is_global_zero and (new or first):
            _announce(str(report), clean=not new)
        if new and self.on_fault == "error":
            seen = ". ".join(f"{f.probe}: {f.seen}; {f.remedy}" for f in new)
            raise PreflightError(f'training loop: {seen}. To train all the same: LoopProbe("warn")')

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if not self.watching or self.names:
            return
        hooked = (o for o in trainer.optimizers if hasattr(o, "register_step_post_hook"))
        for optimizer in hooked:  # Lightning takes others, too
            params = [p for group in optimizer.param_groups for p in group["params"]]
            w = SimpleNamespace(optimizer=optimizer, params=params, steps=0, backwards=0)
            w.stepped, w.left_over, w.carried, w.rates, w.scaled = False, False, 0, [], []
            self.watched.append(w)
            hook = optimizer.register_step_post_hook(partial(self._stepped, module, w))
            self.hooks.callback(hook.remove)
        self.names = {id(p): name for name, p in module.named_parameters()}
        held = {id(p): p for w in self.watched for p in w.params}
        trained = {id(p): p for p in module.parameters() if p.requires_grad}
        self.without = {i: p for i, p in held.items() if i in trained or i not in self.names}
        self.outside = {i: (p, sample(p)) for i, p in trained.items() if i not in held}
        self.ran, self.dtypes, self.missed = set[int](), set[Any](), dict[int, Tensor]()
        self.weights: list[Tensor] = []  # sum of the token weights of each micro-batch
        self.divided: list[tuple[int, float]] = []  # micro-batches, and weight of all
        self.backwards, self.owners = 0, dict[int, nn.Module]()
        self.mixed, self.ties = "mixed" in str(trainer.precision), loop_checks.ties(module)
        self.positions = [c.scheduler.last_epoch for c in trainer.lr_scheduler_configs]
        scalers = [getattr(trainer.precision_plugin, "scaler", None), *vars(module).values()]
        self.scalers = [x for x in scalers if isinstance(x, torch.amp.GradScaler)]
        for scaler in self.scalers:
            vars(scaler)["unscale_"] = partial(self._unscale, scaler.unscale_)
            self.hooks.callback(vars(scaler).pop, "unscale_")
        copies = list(loop_checks.untied_copies(module))
        self._settle("tie", copies, f"{some(copies)} are two tensors")
        self._compare_ranks(module, "before the first step")

    def _called(self, module: nn.Module, args: Any, output: Any) -> None:
        self.ran.add(id(module))
        self.mixed |= any(map(torch.is_autocast_enabled, ("cpu", "cuda", "mps", "xpu")))
        if isinstance(module, nn.Linear | nn.MultiheadAttention):
            self.dtypes.add((output[0] if isinstance(output, tuple) else output).dtype)

    def on_before_backward(self, trainer: Any, module: L.LightningModule, loss: Tensor) -> None:
        if not self.watching:
            return
        for w in self.watched:
            if w.stepped or w.left_over:  # else there may be gradients of the same step
                grads = [p.grad for p in w.params if p.grad is not None][:4]
                w.stepped, w.left_over = False, any(bool(g.any()) for g in grads)
        self.backwards += 1  # in all
        if node := loop_checks.log_softmax(loss):  # its gradient is minus the token weights
            scale = math.prod(x.get_scale() for x in self.scalers if x.is_enabled())
            read = lambda grads: self.weights.append(-grads[0].float().sum() / scale)  # noqa: E731
            node.register_prehook(read)
        else:
            self.weights.append(torch.tensor(math.nan))

    def _unscale(self, unscale: Any, optimizer: Any) -> None:
        for w in self.watched:
            if w.optimizer in (optimizer, getattr(optimizer, "optimizer", None)):
                grads = [p.grad for p in w.params if p.grad is not None]
                norms = [get_total_norm(grads, kind).item() for kind in (2.0, math.inf)]
                w.scaled += [norms] if math.isfinite(norms[0]) else []
        unscale(optimizer)

    def _stepped(self, module: Any, w: Any, *_: Any) -> None:
        """After a step of one optimizer: its gradients are those that it used."""
        if w.backwards == self.backwards and all(p.grad is None for p in w.params):
            return  # there was no backward pass
        self.without = {i: p for i, p in self.without.items() if p.grad is None}
        self.missed |= {i: p for i, (p, _) in self.outside.items() if p.grad is not None}
        w.carried, w.steps, w.stepped = w.carried + w.left_over, w.steps + 1, True
        w.rates.append(max(float(g.get("lr", 1)) for g in w.optimizer.param_groups))
        automatic = module.automatic_optimization
        n = module.trainer.accumulate_grad_batches if automatic else len(self.weights)
        self.divided += [(n, n * float(weight)) for weight in self.weights if n > 1]
        w.backwards, self.weights = self.backwards, []

    def _compare_ranks(self, module: L.LightningModule, when: str) -> bool:
        """Compare the weights of all ranks. Whether all of them have seen enough steps."""
        steps = [w.steps for w in self.watched] or [0]
        most = PATIENCE * module.trainer.accumulate_grad_batches
        enough = min(steps) >= STEPS or max(steps) >= 10 * STEPS or self.batches >= most
        if module.trainer.world_size == 1:
            return enough
        parts = [sample(p).to(module.device) for p in module.parameters()]
        row = torch.cat([*parts, torch.tensor([enough], device=module.device)])
        rows: Any = module.all_gather(row)  # (ranks, elements + 1)
        differ = ((rows - rows[0]).abs() > 1e-6 * rows[0].abs() + 1e-10)[:, :-1].any(0)
        self._settle("ranks", differ.any(), f"{differ.float().mean():.0%} of weights differ {when}")
        return bool(rows[:, -1].all())

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.batches += 1
        if self.watching and not self.owners:  # now: earlier, other callbacks may call the model
            self.owners = {id(p): m for m in module.modules() for p in m.parameters(recurse=False)}
            for owner in {id(m): m for m in self.owners.values()}.values():
                if not loop_checks.is_compiled(module):  # else a hook would compile it again
                    self.hooks.callback(owner.register_forward_hook(self._called).remove)
        if self.modes_due:
            names = loop_checks.in_eval_mode(module)
            self._settle("train mode", names, f"{some(names)} trained in eval mode")
        if self.watching and self._compare_ranks(module, "after a step"):
            self._conclude(trainer, module)
        elif self.modes_due and not self.watching:
            self.modes_due = False
            self._tell(trainer)

    def _conclude(self, trainer: Any, module: L.LightningModule) -> None:
        """Settle what the watched steps show."""
        self.watching = self.modes_due = False
        self.hooks.close()
        self.report.steps = max((w.steps for w in self.watched), default=0)
        parted = [" and ".join(names) for names in self.ties - loop_checks.ties(module)]
        self._settle("tie", parted, f"{some(parted)} parted")
        if self.mixed and self.dtypes:
            in_float32 = not self.dtypes & {torch.bfloat16, torch.float16}
            self._settle("autocast", in_float32, "all linear layers computed in float32")
        if self.watched and min(w.steps for w in self.watched) > 1:
            if (carried := sum(w.carried for w in self.watched)) or self.backwards:
                self._settle("zeroing", carried, f"{carried} steps used earlier gradients, too")
            self._conclude_gradients(module)
            self._conclude_rates(trainer, module)
        for w in self.watched:
            if len(w.scaled) >= STEPS:  # a norm that stays the same is that of a clipping
                same = any(max(x) < 1.001 * min(x) for x in zip(*w.scaled, strict=True))
                self._settle(
                    "clipping", same, "gradients have one norm at each unscale_: clipped before"
                )
        for twice in (False, True):
            totals = [total * n**twice for n, total in self.divided]
            if totals and all(math.isclose(total, 1, rel_tol=1e-3) for total in totals):
                n = self.divided[0][0]
                self._settle("division", twice, f"{n} micro-batches weigh 1/{n} together, not 1")
        self._tell(trainer)

    def _conclude_gradients(self, module: L.LightningModule) -> None:
        """Settle which parameters the optimizers hold, and which of them got gradients."""
        present = set(map(id, module.parameters()))
        dead = [i for i in self.without if i in present]
        stale = len(self.without) - len(dead)
        lost = [self.names[i] for i in self.missed if torch.equal(*map(sample, self.outside[i]))]
        self._settle("tensors", stale, f"the optimizer holds {stale} tensors that left the module")
        more = len(lost) > stale  # else what it lacks are the new versions
        self._settle("parameters", more, f"{some(lost)} train, but are in no optimizer")
        kinds = {i: re.sub(r"\d+", "#", name) for i, name in self.names.items()}  # of equal layers
        live = {kind for i, kind in kinds.items() if i not in self.without}
        idle = [i for i in dead if id(self.owners.get(i)) not in self.ran and kinds[i] in live]
        names = [self.names[i] for i in dead if i not in idle]
        if names or not idle:
            self._settle("gradients", names, f"{some(names)} got no gradient")
        else:  # as experts do
            self.report.skipped["gradients"] = f"{self.names[idle[0]]} was not called"

    def _conclude_rates(self, trainer: Any, module: L.LightningModule) -> None:
        steps, epochs = loop_checks.run_length(trainer)
        for config, position in zip(trainer.lr_scheduler_configs, self.positions, strict=False):
            scheduler, by_epoch = config.scheduler, config.interval == "epoch"
            if not module.automatic_optimization:
                by_epoch = scheduler.last_epoch == position
            why = None if by_epoch and type(scheduler).__name__ not in BY_EPOCH else ""
            with suppress(Exception):  # it may refuse to be copied
                if steps and why is None:
                    why = loop_checks.meant_for_steps(scheduler, epochs, steps, [trainer, module])
            if why is not None:
                self._settle("schedule", why, f"the rate {why} epochs, in a run of {epochs}")
        if not self.results.get("schedule"):
            zero = not all(any(w.rates) for w in self.watched)
            self._settle("rate", zero, f"the rate was 0 in {self.report.steps} steps")
        groups = [group for w in self.watched for group in w.optimizer.param_groups]
        decaying = (p for g in groups if g.get("weight_decay") for p in g["params"])
        if decayed := [id(p) for p in decaying if p.ndim < 2]:
            names = some([self.names.get(i, "?") for i in decayed])
            self.report.noted.append(f"weight decay acts on norms or biases: {names}")

    def on_validation_batch_start(self, trainer: Any, module: L.LightningModule, *_: Any) -> None:
        """Watch whether the module, or a part of it, draws random numbers."""
        if not self.active or "validation mode" in self.results:
            return
        device, states = module.device.type, dict[int, Tensor]()
        random_state = (torch if device == "cpu" else getattr(torch, device)).get_rng_state

        def enter(part: nn.Module, *_: Any) -> None:
            states[id(part)] = random_state()

        def leave(part: nn.Module, *_: Any) -> None:
            self.drawn.append(not torch.equal(states[id(part)], random_state()))

        for part in (x for x in (module, *module.children()) if not x._compiled_call_impl):
            self.calls.callback(part.register_forward_pre_hook(enter).remove)
            self.calls.callback(part.register_forward_hook(leave).remove)

    def on_validation_batch_end(self, trainer: Any, module: L.LightningModule, *_: Any) -> None:
        if self.drawn:
            names = [n for n, m in module.named_modules() if m.training and getattr(m, "p", 0)]
            seen = f"random numbers are drawn; in train mode: {some(names) or 'no module'}"
            self._settle("validation mode", any(self.drawn), seen)
        self.drawn = []
        self.calls.close()

    def on_validation_end(self, trainer: Any, module: L.LightningModule) -> None:
        if self.active and not trainer.sanity_checking:
            self._settle_perplexity(trainer, sum(trainer.num_val_batches))
            self.modes_due = True
            if not self.watching:
                self._tell(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.active:
            self._settle_perplexity(trainer, trainer.num_training_batches)
            conclude = partial(self._conclude, module=module)
            (conclude if self.watching and self.names else self._tell)(trainer)

    def _settle_perplexity(self, trainer: Any, batches: float) -> None:
        """Compare what is a mean over the batches of an epoch, or logged at its end."""
        results = [r for r in trainer._results.values() if r.meta.on_epoch and r.is_tensor]
        own = {r.meta.name + "_epoch" * r.meta.on_step for r in results}
        logged = {name: value for name, value in trainer.callback_metrics.items() if name in own}
        for name, loss, gap in loop_checks.perplexities(logged):
            if gap > LOG_GAP or batches > 1:
                seen = f"{name} is {math.exp(gap):.4g} times the exponential of {loss}"
                self._settle("perplexity", gap > LOG_GAP, seen)

    def teardown(self, *_: Any, **__: Any) -> None:
        self.active = False
        self.hooks.close()
        self.calls.close()

    on_exception = teardown
