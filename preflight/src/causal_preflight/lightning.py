"""Lightning callback that audits a LightningModule on its first training batch."""

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from causal_preflight.audit import audit_batch
from causal_preflight.report import PreflightError, Report, to_html
from causal_preflight.targets import NO_TARGET

try:
    import lightning as L
    from lightning.pytorch.loggers.logger import DummyLogger
    from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
except ImportError as missing:
    raise ImportError(
        "causal_preflight.lightning needs Lightning: pip install 'causal-preflight[lightning]'"
    ) from missing

log = logging.getLogger(__name__)
_TRIED = 10  # batches without a target that are passed over


class Preflight(L.Callback):
    """Audit a LightningModule by its own `training_step`, on the first batch that has a target.

    Use: `Trainer(callbacks=[Preflight(pad_id=0, eos_id=2)])`.

    Args:
        on_fault: "error" stops the run, "warn" reports the faults and goes on, "off" does nothing.
        pad_id, eos_id, input_key, labels_key: as in `preflight`.
        directory: gets `preflight.json` and `preflight.html`; None writes nothing.
        remedies: label of a fault -> what to change in this project, for the error message.
        override: what to set to train in spite of a fault, for the error message.
        name: token id -> readable text.

    Raises:
        PreflightError: on every rank, with the evidence and the remedy.
    """

    def __init__(
        self, on_fault: str = "error", *, pad_id: int | None = None, eos_id: int | None = None,
        directory: Path | None = None, remedies: Mapping[str, str] | None = None,
        override: str = 'Preflight("warn")', name: Callable[[int], str] = str,
        input_key: str = "input_ids", labels_key: str = "labels",
    ) -> None:  # fmt: skip
        if on_fault not in ("error", "warn", "off"):
            raise ValueError(f"on_fault must be error, warn or off, not {on_fault!r}")
        self.on_fault, self.directory, self.remedies = on_fault, directory, remedies or {}
        self.options: dict[str, Any] = {"pad_id": pad_id, "eos_id": eos_id}
        self.options |= {"input_key": input_key, "labels_key": labels_key}
        self.override, self.name = override, name
        self.report: Report | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.on_fault != "off" and self.report is None and (why := sharded(trainer)):
            self._conclude(trainer, Report(skipped={"preflight": why}))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.on_fault == "off" or self.report is not None:
            return
        report = self.audit(trainer, pl_module, batch) if trainer.is_global_zero else Report()
        report = trainer.strategy.broadcast(report)
        if NO_TARGET in report.skipped.values() and not report.findings and batch_idx < _TRIED:
            if trainer.is_global_zero:
                _announce(f"preflight: batch {batch_idx} has no target; trying the next", False)
            return
        self._conclude(trainer, report)
        if report.faults and self.on_fault == "error":
            raise PreflightError(self.message(report))

    def _conclude(self, trainer: L.Trainer, report: Report) -> None:
        """Keep the report on every rank, and let the first one announce and write it."""
        self.report = report
        if trainer.is_global_zero:
            pairs = f"trained pairs: {trained_pairs(report, self.name)}"
            _announce(f"{pairs}\n{report.summary()}", report.clean)
            if self.directory is not None:
                text = json.dumps(report.to_dict(), indent=2) + "\n"
                _write(Path(self.directory) / "preflight.json", text)
                _write(Path(self.directory) / "preflight.html", to_html(report, self.name))

    def audit(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> Report:
        """Audit `training_step` under the trainer's precision; nothing that it logs is kept.

        Where an optimizer step takes several micro-batches or ranks, the batch is split in two and
        the losses are averaged, as Lightning and DDP do, so that a mean of means is found. A module
        that divides its gradients itself defines `accumulated_loss(*micro_batches)`, the loss that
        a step minimizes. A loss that calls collectives, as to count the targets of all ranks, is
        computed as if every rank had this batch.
        """

        def mean_of_steps(*micro_batches: Any) -> Tensor:
            return torch.stack([_step_loss(module, part, losses) for part in micro_batches]).mean()

        def loss_of(*micro_batches: Any) -> Tensor:
            with trainer.precision_plugin.train_step_context():
                return getattr(module, "accumulated_loss", mean_of_steps)(*micro_batches)

        ranks, parted, alone = trainer.world_size, trainer.accumulate_grad_batches > 1, None
        audit = partial(audit_batch, module, batch, loss_of)
        if ranks > 1:
            from causal_preflight.collectives import LocalCollectives  # not in every torch

            alone = LocalCollectives()
        with _without_effects(trainer, module) as losses, alone or nullcontext():
            try:
                report = audit(parted=parted or ranks > 1, **self.options)
                if alone and alone.used:
                    report = report if parted else audit(**self.options)
                    report.remarks.append("collectives: every rank is taken to have this batch")
                return report
            except ValueError as error:  # the first training step raises the model's own error
                return Report(skipped={"preflight": str(error)})

    def message(self, report: Report) -> str:
        """One line: each fault with its evidence and what to change."""
        ours = {label: f"change {where}" for label, where in self.remedies.items()}
        faults = (f"{f.label}: {f.seen}; {ours.get(f.label, f.remedy)}" for f in report.findings)
        return f"preflight found {'. '.join(faults)}. To train in spite of it: {self.override}"


def sharded(trainer: L.Trainer) -> str:
    """Why the weights cannot be read as a whole: the strategy shards them; else empty."""
    names = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    found = re.search("FSDP|DeepSpeed|ModelParallel|XLA", " ".join(names))
    return f"{names[0]} shards the parameters" if found else ""


def _nothing(*args: Any, **kwargs: Any) -> None: ...


def _run_closure(*args: Any, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
    closure = closure or next(filter(callable, args), None)
    return closure() if closure else None


@contextmanager
def _without_effects(trainer: L.Trainer, module: L.LightningModule) -> Iterator[list[Tensor]]:
    """Run `training_step` without logging, backward passes, or steps of optimizers and schedulers.

    Manual optimization calls all of these itself. Yields the list that the losses given to
    `manual_backward` are put into. What `training_step` writes into the settings of an optimizer or
    a scheduler is undone.
    """

    def one_or_all(found: list[Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: found[0] if len(found) == 1 else found or None

    losses, loggers, optimizers = list[Tensor](), trainer.loggers, trainer.optimizers
    schedulers = [c.scheduler for c in trainer.lr_scheduler_configs]
    silent = ("log", "log_dict", "clip_gradients", "toggle_optimizer", "untoggle_optimizer")
    stubs: dict[str, Any] = dict.fromkeys(silent, _nothing)
    stubs |= {"optimizers": one_or_all(optimizers), "lr_schedulers": one_or_all(schedulers)}
    stubs["manual_backward"] = lambda loss, *args, **kwargs: losses.append(loss)
    settings = [group for optimizer in optimizers for group in optimizer.param_groups]
    settings += [vars(x) for x in [*optimizers, *schedulers]]
    kept = [dict(group) for group in settings]
    for x in [*optimizers, *schedulers]:  # also where training_step reaches it by the trainer
        stub = {"step": _run_closure, "zero_grad": _nothing}
        vars(x).update(stub, toggle_model=lambda *args, **kwargs: nullcontext())
    trainer.loggers = [DummyLogger() for _ in loggers]
    scaler: dict[str, Any] = dict.fromkeys(("unscale_", "step", "update"), _nothing)
    scaler["scale"] = lambda _, outputs: outputs
    try:
        with patch.multiple(module, **stubs), patch.multiple(torch.amp.GradScaler, **scaler):
            yield losses
    finally:
        trainer.loggers = loggers
        for group, was in zip(settings, kept, strict=True):
            group.clear()
            group.update(was)


def _step_loss(module: L.LightningModule, batch: Any, losses: list[Tensor]) -> Tensor:
    """The loss that `training_step` returns or, in manual optimization, passes to backward."""
    losses.clear()
    step: Any = module.training_step
    index = (0,) if is_param_in_hook_signature(step, "batch_idx", min_args=2) else ()
    out = step(batch, *index)
    loss = out.get("loss") if isinstance(out, Mapping) else out
    if losses and not (isinstance(loss, Tensor) and loss.requires_grad):
        return torch.stack([part.sum() for part in losses]).sum()
    if not isinstance(loss, Tensor):
        raise ValueError("training_step returns no loss, and passes none to self.manual_backward")
    return loss


def trained_pairs(report: Report, name: Callable[[int], str], most: int = 8) -> str:
    """The first pairs input → target that the loss trained in row 0, read off its gradient."""
    cells = (report.pictures.get("alignment") or [[]])[0]
    pairs = [f"{name(c['input'])} → {name(c['target'])}" for c in cells if c["target"] is not None]
    return ",  ".join(pairs[:most]) or "none could be read"


def _announce(text: str, clean: bool) -> None:
    """Log the text, or print it where no handler would show it."""
    level, logger, handlers = (logging.INFO if clean else logging.WARNING), log, list(log.handlers)
    while logger.propagate and logger.parent:
        logger = logger.parent
        handlers += logger.handlers
    kinds = (h for h in handlers if not isinstance(h, logging.NullHandler))
    if log.isEnabledFor(level) and any(h.level <= level for h in kinds):
        log.log(level, text)
    else:
        print(text, file=sys.stderr, flush=True)


def _write(path: Path, text: str) -> None:
    """Write atomically: into a file beside it, which is then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
