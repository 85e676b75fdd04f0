"""Looks at the real model and the first real batch, before the first step."""

import logging
import time
from pathlib import Path
from typing import Any

import lightning as L

from causal_lm import guards
from causal_lm.data.collate import Batch
from causal_lm.data.tokenizers import Tokenizer
from causal_lm.module import CausalLM
from causal_lm.report.files import write_json

log = logging.getLogger(__name__)


class PreflightError(ValueError):
    """A fault that the run did not ask for."""


class Preflight(L.Callback):
    """Runs the guards once; a fault stops the run (``error``), is said (``warn``), or the guards
    do not run (``off``). Writes ``preflight.json``."""

    def __init__(self, on_fault: str, tokenizer: Tokenizer, directory: Path) -> None:
        self.on_fault, self.tokenizer, self.directory = on_fault, tokenizer, directory
        self.faults: list[guards.Fault] = []
        self.seconds: float | None = None

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        if self.on_fault == "off" or self.seconds is not None:
            return
        assert isinstance(pl_module, CausalLM)
        started = time.perf_counter()
        found = (guard(pl_module, batch) for guard in guards.GUARDS)
        self.faults = [fault for fault in found if fault is not None]
        self.seconds = time.perf_counter() - started
        if trainer.is_global_zero:
            write_json(
                self.directory / "preflight.json",
                {"faults": [fault._asdict() for fault in self.faults]},
            )
            log.info(f"trained pairs: {guards.pairs(pl_module, batch, self.tokenizer)}")
        lines = [f"preflight [{f.label}] {f.seen}. Change {f.key}." for f in self.faults]
        if lines and self.on_fault == "error":
            raise PreflightError(" ".join(lines) + " (preflight.on_fault=warn trains all the same)")
        for line in lines:
            log.warning(line)

    def figures(self) -> dict[str, Any]:
        return {
            "preflight/faults": [fault.label for fault in self.faults],
            "seconds/preflight": self.seconds,
        }
