"""Lightning callback that audits a LightningModule on its first training batch.

Needs the extra: `pip install 'causal-preflight[lightning]'`.
"""

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from causal_preflight import Report, preflight, to_html

try:
    import lightning as L
except ImportError as missing:
    raise ImportError(
        "causal_preflight.lightning needs Lightning: pip install 'causal-preflight[lightning]'"
    ) from missing

log = logging.getLogger(__name__)


class PreflightError(ValueError):
    """The preflight found a fault, and `on_fault` is "error"."""


class Preflight(L.Callback):
    """Audit a LightningModule by its own `training_step`, on the first batch of the fit.

    `Trainer(callbacks=[Preflight(pad_id=0, eos_id=2)])` is all. The batch is a dict, a named tuple
    or a dataclass with the fields that `causal_preflight.preflight` knows.

    Args:
        on_fault: "error" stops the run, "warn" logs the faults and goes on, "off" does nothing.
        pad_id, eos_id: token ids, where they are known.
        directory: gets `preflight.json` and `preflight.html`; None writes nothing.
        remedies: label of a fault -> what to change in this project, for the error message.
        override: what to set to train in spite of a fault, for the error message.
        name: token id -> text that a person can read.

    Raises:
        PreflightError: on every rank, with the evidence and the remedy.
    """

    def __init__(
        self,
        on_fault: str = "error",
        *,
        pad_id: int | None = None,
        eos_id: int | None = None,
        directory: Path | None = None,
        remedies: Mapping[str, str] | None = None,
        override: str = 'Preflight("warn")',
        name: Callable[[int], str] = str,
    ) -> None:
        if on_fault not in ("error", "warn", "off"):
            raise ValueError(f"on_fault must be error, warn or off, not {on_fault!r}")
        self.on_fault, self.pad_id, self.eos_id = on_fault, pad_id, eos_id
        self.directory, self.remedies = directory, remedies or {}
        self.override, self.name = override, name
        self.report: Report | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self.on_fault == "off" or self.report is not None:
            return
        report = self.audit(trainer, pl_module, batch) if trainer.is_global_zero else Report()
        self.report = report = trainer.strategy.broadcast(report)
        if trainer.is_global_zero:
            log.info(f"trained pairs: {trained_pairs(report, self.name)}\n{report}")
            if self.directory is not None:
                text = json.dumps(report.to_dict(), indent=2) + "\n"
                _write(Path(self.directory) / "preflight.json", text)
                _write(Path(self.directory) / "preflight.html", to_html(report, self.name))
        if report.faults and self.on_fault == "error":
            raise PreflightError(self.message(report))

    def audit(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> Report:
        """Audit `training_step` under the trainer's precision; nothing that it logs is kept.

        Where an optimizer step takes several micro-batches or ranks, the batch is split in two and
        the losses are averaged, as Lightning and DDP do, so that a mean of means is found. A module
        that divides its gradients itself defines `accumulated_loss(*micro_batches)`, the loss that
        a step minimizes.
        """

        def mean_of_steps(*micro_batches: Any) -> Tensor:
            outs = [module.training_step(part, 0) for part in micro_batches]
            losses: list[Any] = [out["loss"] if isinstance(out, Mapping) else out for out in outs]
            return torch.stack(losses).mean()

        def loss_of(*micro_batches: Any) -> Tensor:
            with trainer.precision_plugin.train_step_context():
                return getattr(module, "accumulated_loss", mean_of_steps)(*micro_batches)

        silent = dict.fromkeys(("log", "log_dict"), lambda *args, **kwargs: None)
        module.__dict__.update(silent)
        try:
            return audit_batch(
                module, batch, loss_of, pad_id=self.pad_id, eos_id=self.eos_id,
                parted=trainer.accumulate_grad_batches * trainer.world_size > 1,
            )  # fmt: skip
        except ValueError as error:  # the first training step raises what the model has to say
            return Report(skipped={"preflight": str(error)})
        finally:
            for method in silent:
                del module.__dict__[method]

    def message(self, report: Report) -> str:
        """One line: each fault with its evidence and what to change."""
        own = {label: f"change {where}" for label, where in self.remedies.items()}
        faults = (f"{f.label}: {f.seen}; {own.get(f.label, f.remedy)}" for f in report.findings)
        return f"preflight found {'. '.join(faults)}. To train in spite of it: {self.override}"


def audit_batch(
    model: nn.Module,
    batch: Any,
    loss_of: Callable[..., Tensor],
    *,
    parted: bool = False,
    **options: Any,
) -> Report:
    """`preflight` of a batch that is a dict, a named tuple or a dataclass.

    Args:
        loss_of: gets a batch of the same type, with edited tensors, and returns the scalar loss.
        parted: pass two micro-batches of half the rows each to `loss_of` instead.
        options: those of `preflight`.

    A model with a method `whole_logits()`, a context in which its loss uses whole logits, is run in
    that context.
    """
    given, rebuild = _fields(batch)

    def loss(_: nn.Module, edited: dict[str, Any]) -> Tensor:
        rows = len(edited["input_ids"])
        size = (rows + 1) // 2 if parted else rows
        parts = [
            {
                name: v[start : start + size] if isinstance(v, Tensor) and len(v) == rows else v
                for name, v in edited.items()
            }
            for start in range(0, rows, size)
        ]
        return loss_of(*(rebuild(**part) for part in parts))

    with getattr(model, "whole_logits", nullcontext)():
        report = preflight(model, given, loss, **options)
    if parted and len(given["input_ids"]) == 1:
        report.skipped["micro-batches"] = "the batch has one row, so it cannot be split in two"
    return report


def _fields(batch: Any) -> tuple[dict[str, Any], Callable[..., Any]]:
    """The tensors of a batch by name, and the constructor that makes another of its type.

    A dataclass is rebuilt by its constructor, so that a property cached on the original is computed
    anew from the edited tensors.
    """
    if isinstance(batch, Mapping):
        return dict(batch), dict
    if dataclasses.is_dataclass(batch):
        names = [f.name for f in dataclasses.fields(batch) if f.init]
        return {name: getattr(batch, name) for name in names}, type(batch)
    if hasattr(batch, "_asdict"):
        return batch._asdict(), type(batch)
    raise ValueError(
        f"a batch of type {type(batch).__name__} cannot be audited: pass a dict, a named tuple or "
        "a dataclass with `input_ids`"
    )


def trained_pairs(report: Report, name: Callable[[int], str], most: int = 8) -> str:
    """The first pairs input → target that the loss trained in row 0, read off its gradient."""
    cells = (report.pictures.get("alignment") or [[]])[0]
    pairs = [f"{name(c['input'])} → {name(c['target'])}" for c in cells if c["target"] is not None]
    return ",  ".join(pairs[:most]) or "none could be read"


def _write(path: Path, text: str) -> None:
    """Write the whole file or none of it: beside its place, then renamed."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
