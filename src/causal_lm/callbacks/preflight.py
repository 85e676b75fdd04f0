"""The preflight of a configured run, as a Lightning callback."""

from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from causal_lm.data.tokenizers import Tokenizer, show_token
from causal_lm.sharding import FullyShardedStrategy
from causal_preflight import lightning

WHERE_TO_LOOK = {  # label of a fault -> key or file to change, unless a pitfall explains it
    "shift": "loss, or objective.py",
    "pad": "model, or objective.py and masks.py",
    "causal": "model, or masks.py",
    "reduction": "loss.reduction, or objective.py",
    "eos": "data, or objective.py",
    "position": "model, or data/collate.py",
}


class Preflight(lightning.Preflight):
    """:class:`causal_preflight.lightning.Preflight` with metrics for ``summary.json``."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Audit weights that will be sharded before they are, as rank zero does it alone. They are
        those of step 0, and its device must hold them all."""
        strategy = trainer.strategy
        is_sharded = isinstance(strategy, FullyShardedStrategy)
        if is_sharded and stage == "fit" and self.on_fault != "off":
            pl_module.to(strategy.root_device)
            batches = map(strategy.batch_to_device, trainer.datamodule.train_dataloader())
            for number, batch in enumerate(batches):
                self.on_train_batch_start(trainer, pl_module, batch, number)
                if self.report is not None:
                    break

    def figures(self) -> dict[str, Any]:
        """``preflight/*`` and ``seconds/preflight``; empty if the preflight did not run."""
        if (report := self.report) is None:
            return {}
        return {"preflight/faults": sorted(report.faults), "preflight/audited": report.audited,
                "seconds/preflight": report.seconds}  # fmt: skip


def make_preflight(cfg: DictConfig, tokenizer: Tokenizer, directory: Path | None) -> Preflight:
    """The callback of a configured run; a fault that a pitfall makes names the pitfall's key."""
    remedies = dict(WHERE_TO_LOOK)
    if switched_on := [name for name, on in (cfg.get("pitfalls") or {}).items() if on]:
        from causal_lm.pitfalls import PITFALLS

        remedies |= {PITFALLS[name].label: f"pitfalls.{name}" for name in switched_on}
    return Preflight(
        cfg.preflight.on_fault, pad_id=tokenizer.pad_id, eos_id=tokenizer.eos_id,
        directory=directory, remedies=remedies, override="preflight.on_fault=warn",
        name=partial(show_token, tokenizer),
    )  # fmt: skip
