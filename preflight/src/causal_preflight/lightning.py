"""Proves the alignments on the real model and the first real batch, before the first step."""

import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from causal_lm.report.files import write_json, write_text
from causal_preflight import Report, preflight, to_html

log = logging.getLogger(__name__)


class PreflightError(ValueError):
    """The preflight found a fault, and ``on_fault`` is ``error``."""


class Preflight(L.Callback):
    """Audits any LightningModule by its own ``training_step``, at the start of the fit.

    Add it to a project of your own: ``Trainer(callbacks=[Preflight(pad_id=0, eos_id=2)])``. The
    batch is a dict or a named tuple with ``input_ids`` and what else
    :func:`causal_preflight.preflight` can use.

    Args:
        on_fault: ``error`` stops the run, ``warn`` says so and goes on, ``off`` does not look.
        pad_id, eos_id: where they are known.
        directory: takes ``preflight.json`` and ``preflight.html``; None writes nothing.
        keys: label of a fault -> what to change in the configuration, for the message.
        name: token id -> how a person reads it.

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
        keys: Mapping[str, str] | None = None,
        name: Callable[[int], str] = str,
    ) -> None:
        if on_fault not in ("error", "warn", "off"):
            raise ValueError(f"on_fault must be error, warn or off, not {on_fault!r}")
        self.on_fault, self.pad_id, self.eos_id = on_fault, pad_id, eos_id
        self.directory, self.keys, self.name = directory, keys or {}, name
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
                write_json(self.directory / "preflight.json", report.to_dict())
                write_text(self.directory / "preflight.html", to_html(report, self.name))
        if report.faults and self.on_fault == "error":
            raise PreflightError(self.message(report))

    def audit(self, trainer: L.Trainer, module: L.LightningModule, batch: Any) -> Report:
        """The report on ``training_step``, under the trainer's precision, logging held back.

        Where an optimizer step takes several micro-batches or ranks, the batch is parted in two and
        their losses averaged, as Lightning and DDP do: a mean of means shows. A module that divides
        its gradients itself says what a step minimises by ``accumulated_loss(*micro_batches)``.
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
        except ValueError as error:  # not the audit's to stop the run: the first step will say more
            return Report(skipped={"preflight": str(error)})
        finally:
            for method in silent:
                del module.__dict__[method]

    def message(self, report: Report) -> str:
        """One line: each fault with its evidence and the key to change."""
        faults = [
            f"{f.label}: {f.seen}; change {self.keys.get(f.label, f.remedy)}"
            for f in report.findings
        ]
        return f"preflight found {'. '.join(faults)}. preflight.on_fault=warn trains all the same"

    def figures(self) -> dict[str, Any]:
        """What ``summary.json`` says of it."""
        return {
            "preflight/faults": sorted(self.report.faults) if self.report else [],
            "seconds/preflight": self.report.seconds if self.report else None,
        }


def audit_batch(
    model: nn.Module,
    batch: Any,
    loss_of: Callable[..., Tensor],
    *,
    parted: bool = False,
    **options: Any,
) -> Report:
    """:func:`preflight` of a batch that is a dict or a named tuple.

    ``loss_of`` gets its like or, with ``parted``, two micro-batches of half of its rows each. A
    model that has ``whole_logits()``, a context in which its loss uses whole logits, is asked to.
    """
    kind = dict if isinstance(batch, Mapping) else type(batch)
    names = getattr(batch, "__dataclass_fields__", None) or getattr(batch, "_fields", batch)
    given = {k: batch[k] if kind is dict else getattr(batch, k) for k in names}

    def loss(_: nn.Module, edited: dict[str, Any]) -> Tensor:
        rows = len(edited["input_ids"])
        cut = (rows + 1) // 2 if parted else rows
        parts = [
            {
                name: v[start : start + cut] if isinstance(v, Tensor) and len(v) == rows else v
                for name, v in edited.items()
            }
            for start in range(0, rows, cut)
        ]
        return loss_of(*(kind(**part) for part in parts))

    with getattr(model, "whole_logits", nullcontext)():
        report = preflight(model, given, loss, **options)
    if parted and len(given["input_ids"]) == 1:
        report.skipped["micro-batches"] = "the batch has one row, so it cannot be parted in two"
    return report


def trained_pairs(report: Report, name: Callable[[int], str], most: int = 8) -> str:
    """The first pairs that the loss trained in row 0, as read off its gradient: input → target."""
    cells = (report.pictures.get("alignment") or [[]])[0]
    pairs = [f"{name(c['input'])} → {name(c['target'])}" for c in cells if c["target"] is not None]
    return ",  ".join(pairs[:most]) or "none could be read"
