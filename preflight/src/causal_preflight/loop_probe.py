"""Lightning callback that finds silent faults of the training loop in its first optimizer steps."""

import math
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from causal_preflight import loop_checks
from causal_preflight.lightning import PreflightError, _announce, sharded
from causal_preflight.loop_checks import REMEDIES, STEPS, FirstSteps, sample, some
from causal_preflight.report import Finding, Report

_PATIENCE = 200  # batches, times accumulate_grad_batches, until steps and calls must be seen
_LOG_GAP = 2e-4  # nats by which the log of a perplexity may exceed its loss


@dataclass
class LoopReport(Report):
    """The outcome: findings have the label `loop`, and the name of a check as `probe`."""

    steps: int = 0

    @property
    def audited(self) -> bool:
        return bool(self.findings or self.steps)

    @property
    def verdict(self) -> str:
        if not self.audited:
            return f"NOT AUDITED: {self.skipped.get('loop', 'no optimizer step was seen')}"
        faults = ", ".join(f.probe for f in self.findings)
        return f"training loop, {self.steps} steps: {f'FAULTS {faults}' if faults else 'no fault'}"


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
        self.first: FirstSteps | None = None
        self.calls = ExitStack()  # hooks of a validation batch

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.first, self.told, self.batches = None, -1, 0
        why = sharded(trainer)
        self.active = self.on_fault != "off" and not why
        self.watching = self.modes_due = self.active  # the first steps; the next batch
        self.report = LoopReport(skipped=dict.fromkeys(REMEDIES, "nothing to examine so far"))
        if why and self.on_fault != "off":
            self.report.skipped = {"loop": why}
            self._tell(trainer)

    def _examine(self, name: str, check: Any) -> None:
        """Run a check, which returns what is wrong; a fault that was found stays."""
        report = self.report
        if any(f.probe == name for f in report.findings):
            return
        report.passed = [x for x in report.passed if x != name]
        report.skipped.pop(name, None)
        report.examine(name, lambda: [Finding("loop", x, REMEDIES[name])] if (x := check()) else [])

    def _settle(self, name: str, wrong: object, seen: str) -> None:
        """Record that a check passed or, if anything is wrong, what it saw."""
        self._examine(name, lambda: seen if wrong else "")

    def _tell(self, trainer: L.Trainer) -> None:
        """Announce the report at first, and then new faults. All ranks call it together."""
        self.report = report = trainer.strategy.broadcast(self.report)
        new = report.findings[max(0, self.told) :]
        if trainer.is_global_zero and (new or self.told < 0):
            _announce(report.summary(), clean=not new)
        self.told = len(report.findings)
        if new and self.on_fault == "error":
            seen = ". ".join(f"{f.probe}: {f.seen}; {f.remedy}" for f in new)
            raise PreflightError(f'training loop: {seen}. To train all the same: LoopProbe("warn")')

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self.watching and self.first is None:
            self.first = FirstSteps(trainer, module)
            self._all_ranks_ready(module, "before the first step")

    def on_before_backward(self, trainer: Any, module: L.LightningModule, loss: Tensor) -> None:
        if self.watching and self.first:
            self.first.before_backward(loss)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self.batches += 1
        if self.modes_due:
            names = loop_checks.in_eval_mode(module)
            self._settle("train mode", names, f"{some(names)} trained in eval mode")
        if self.watching and self.first and self._all_ranks_ready(module, "after a step"):
            self._conclude()
            self._tell(trainer)
        elif self.modes_due and not self.watching:
            self.modes_due = False
            self._tell(trainer)

    def _all_ranks_ready(self, module: L.LightningModule, when: str) -> bool:
        """Compare the weights of all ranks. Whether each of them has seen enough steps."""
        steps = self.first.steps if self.first else [0]
        patience = _PATIENCE * module.trainer.accumulate_grad_batches
        ready = min(steps) >= STEPS or max(steps) >= 10 * STEPS or self.batches >= patience
        if module.trainer.world_size == 1:
            return ready
        parts = [sample(p).to(module.device) for p in module.parameters()]
        row = torch.cat([*parts, torch.tensor([ready], device=module.device)])
        rows: Any = module.all_gather(row)  # (ranks, elements + 1)
        differ = ((rows - rows[0]).abs() > 1e-6 * rows[0].abs() + 1e-10)[:, :-1].any(0)
        self._settle("ranks", differ.any(), f"{differ.float().mean():.0%} of weights differ {when}")
        return bool(rows[:, -1].all())

    def _conclude(self) -> None:
        """Decide what the watched steps show."""
        self.watching = self.modes_due = False
        if first := self.first:
            first.hooks.close()
            self.report.steps = max(first.steps)
            for name, needed in loop_checks.STEP_CHECKS.items():
                if min(first.steps) >= needed:
                    self._examine(name, getattr(first, name))
            groups = [g for w in first.watched for g in w.optimizer.param_groups]
            decaying = (p for g in groups if g.get("weight_decay") for p in g["params"])
            if names := [first.names.get(id(p), "?") for p in decaying if p.ndim < 2]:
                self.report.remarks.append(f"weight decay acts on norms or biases: {some(names)}")

    def on_validation_batch_start(self, trainer: Any, module: L.LightningModule, *_: Any) -> None:
        """Watch whether the module, or a part of it, draws random numbers."""
        self.states: list[list[Tensor]] = []
        if not self.active or "validation mode" not in self.report.skipped:
            return
        device = module.device.type
        random_state = (torch if device == "cpu" else getattr(torch, device)).get_rng_state
        for part in (x for x in (module, *module.children()) if not x._compiled_call_impl):
            states: list[Tensor] = []  # before and after each call
            self.states.append(states)
            note = lambda *_, states=states: states.append(random_state())  # noqa: E731
            self.calls.callback(part.register_forward_pre_hook(note).remove)
            self.calls.callback(part.register_forward_hook(note).remove)

    def on_validation_batch_end(self, trainer: Any, module: L.LightningModule, *_: Any) -> None:
        self.calls.close()
        pairs = [pair for x in self.states for pair in zip(x[::2], x[1::2], strict=False)]
        if pairs:
            drop = nn.modules.dropout._DropoutNd
            names = [n for n, m in module.named_modules() if m.training and isinstance(m, drop)]
            seen = f"random numbers are drawn; in train mode: {some(names) or 'no module'}"
            self._settle("validation mode", any(not torch.equal(*pair) for pair in pairs), seen)

    def on_validation_end(self, trainer: Any, module: L.LightningModule) -> None:
        if self.active and not trainer.sanity_checking:
            final = self.batches >= _PATIENCE * trainer.accumulate_grad_batches
            self._settle_late(trainer, sum(trainer.num_val_batches), final)
            self.modes_due = True
            if not self.watching:
                self._tell(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.active:
            if self.watching:
                self._conclude()
            self._settle_late(trainer, trainer.num_training_batches, final=True)
            self._tell(trainer)

    def _settle_late(self, trainer: Any, batches: float, final: bool) -> None:
        """Compare what one hook logs over `batches`; if `final`, judge what nothing has called."""
        if final and self.first and self.first.idle:
            self._examine("gradients", partial(self.first.gradients, final=True))
        results = [r for r in trainer._results.values() if r.meta.on_epoch and r.is_tensor]
        own = {r.meta.name + "_epoch" * r.meta.on_step: r.meta.fx for r in results}
        logged = {name: value for name, value in trainer.callback_metrics.items() if name in own}
        for name, loss, gap in loop_checks.perplexities(logged):
            if own[name] == own[loss] and (gap > _LOG_GAP or batches > 1):
                seen = f"{name} is {math.exp(gap):.5g} times the exponential of {loss}"
                self._settle("perplexity", gap > _LOG_GAP, seen)

    def teardown(self, *_: Any, **__: Any) -> None:
        self.active = False
        self.calls.close()
        if self.first:
            self.first.hooks.close()
            self.first = None

    on_exception = teardown
