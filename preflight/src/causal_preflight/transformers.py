"""Callback that audits the loss of `transformers.Trainer`, TRL's `SFTTrainer` included."""

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from torch import Tensor
from transformers import TrainerCallback

from causal_preflight.audit import audit_batch
from causal_preflight.batch import IGNORE
from causal_preflight.collectives import LocalCollectives
from causal_preflight.report import PreflightError, Report


class PreflightCallback(TrainerCallback):
    """Audit the loss that a Trainer passes to backward, on a batch of its first optimizer step.

    Use: `trainer.add_callback(PreflightCallback(trainer))` before `trainer.train()`. `on_fault`:
    "error" raises `PreflightError` on every rank, "warn" reports and goes on. `options`: those of
    `preflight`; `pad_id` and `eos_id` are the tokenizer's unless given.
    """

    def __init__(self, trainer: Any, on_fault: str = "error", **options: Any) -> None:
        if on_fault not in ("error", "warn"):
            raise ValueError(f"on_fault must be error or warn, not {on_fault!r}")
        self.trainer, self.on_fault, self.report, self.waits = trainer, on_fault, None, False
        tokenizer = getattr(trainer, "processing_class", None)
        ids = {f"{x}_id": getattr(tokenizer, f"{x}_token_id", None) for x in ("pad", "eos")}
        self.options: dict[str, Any] = ids | options

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Look at the batches that the trainer takes, until one of them has been audited."""
        if self.report is not None or self.waits:  # since an earlier call of train()
            return
        own, take, self.waits = vars(self.trainer), self.trainer.get_batch_samples, True
        before = {k: v for k, v in own.items() if k == "get_batch_samples"}

        def take_and_audit(*args: Any, **kwargs: Any) -> Any:
            samples, count = take(*args, **kwargs)
            try:
                self._audit_step(samples)
            finally:
                if self.report is not None:
                    self.waits = False
                    own.pop("get_batch_samples")
                    own.update(before)
            return samples, count

        self.trainer.get_batch_samples = take_and_audit

    def _audit_step(self, samples: list[Any]) -> None:
        """Audit and print on rank zero, tell every rank, and stop if faults are errors."""
        report, key = None, self.options.get("labels_key", "labels")
        if self.trainer.is_world_process_zero():
            usable = [b for b in samples if key not in b or bool((b[key] != IGNORE).any())]
            report = self.audit(usable) if usable else None
            text = report.summary() if report else "preflight: no label counts; waits for another"
            print(text, file=sys.stderr, flush=True)
        self.report = report = broadcast_object_list([report])[0]
        if report and report.faults and self.on_fault == "error":
            what = ". ".join(f"{f.label}: {f.seen}; {f.remedy}" for f in report.findings)
            raise PreflightError(f'preflight found {what}. To go on all the same: on_fault="warn"')

    def audit(self, batches: list[Any]) -> Report:
        """Audit the first batch; if each has one row, all of them, cut to the shortest."""
        args, kind = self.trainer.args, self.trainer.accelerator.distributed_type.value
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM") or args.n_gpu > 1:
            kind = "nn.DataParallel" if args.n_gpu > 1 else kind
            return Report(skipped={"preflight": f"{kind} divides the model"})
        batch, fused, widths = batches[0], set[str](), []
        for b in batches:  # those whose entries all have one row of one width
            shapes = {tuple(getattr(v, "shape", ())) for v in b.values()}
            if b.keys() == batch.keys() and [len(s) for s in shapes] == [2] and min(shapes)[0] == 1:
                widths.append(min(shapes)[1])
        if len(widths) == len(batches):
            batch = {k: torch.cat([b[k][:, : min(widths)] for b in batches]) for k in batch}
        options = {"parted": args.gradient_accumulation_steps > 1, **self.options}
        loss_of = _loss_of(self.trainer, fused)
        try:  # the other ranks wait: a collective of a `compute_loss` would wait for them
            with LocalCollectives() if args.world_size > 1 else nullcontext():
                report = audit_batch(self.trainer.model, batch, loss_of, **options)
        except ValueError as error:  # the first training step raises the trainer's own error
            return Report(skipped={"preflight": str(error)})
        report.remarks += fused
        return report


def _loss_of(trainer: Any, fused: set[str]) -> Callable[..., Tensor]:
    """The loss of micro-batches by `training_step` of a copy of the trainer, which stays as it is.

    TRL asks a model for log-probabilities alone: logits give them, and `fused` gets a note.
    """
    twin, accelerator, losses = copy.copy(trainer), copy.copy(trainer.accelerator), list[Tensor]()
    model, args = trainer.model, copy.copy(trainer.args)
    take = type(trainer).get_batch_samples
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    accelerator.backward = lambda loss, **kwargs: losses.append(loss.sum())
    vars(twin).update({k: _copied(v) for k, v in vars(trainer).items() if "dataset" not in k})
    twin.accelerator, twin.args, twin.log = accelerator, args, lambda *args, **kwargs: None
    twin.optimizer = SimpleNamespace(param_groups=trainer.optimizer.param_groups)

    def forward(plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop("fused_lm_head", False):
            return plain(*args, **kwargs)
        fused.add("loss: the fused head of TRL is replaced by one with logits")
        target, out = kwargs.pop("labels")[:, 1:], plain(*args, **kwargs)
        nll = F.cross_entropy(out.logits[:, :-1].mT.float(), target, reduction="none")
        out.log_probs, out.label_mask = -nll[..., None], target != IGNORE  # not (B, T): no logits
        out.entropy = out.is_top1 = torch.zeros_like(nll)
        return out

    def loss_of(*parts: Any) -> Tensor:
        args.gradient_accumulation_steps = twin.current_gradient_accumulation_steps = len(parts)
        losses.clear()
        samples, count = take(twin, iter(parts), len(parts), args.device)
        mode = patch.object(model, "train", lambda *_: model)  # the audit has set it
        with mode, patch.object(core, "forward", partial(forward, core.forward)):
            for sample in samples:
                twin.training_step(model, sample, count)
        return torch.stack(losses).sum()

    return loss_of


def _copied(value: Any) -> Any:
    """A copy of nested dicts and lists with the same objects in them."""
    if isinstance(value, dict):
        return value | {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if type(value) is list else value
