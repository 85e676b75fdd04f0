"""Callback that audits the loss of `transformers.Trainer`, TRL's `SFTTrainer` included."""

import copy
import sys
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from transformers import TrainerCallback

from causal_preflight import Report, preflight
from causal_preflight.batch import IGNORE
from causal_preflight.parse_batch import named_tensors

_SHARDED = ("FSDP", "DEEPSPEED", "MEGATRON_LM")


class PreflightError(ValueError):
    """The preflight found a fault, and `on_fault` is "error"."""


class PreflightCallback(TrainerCallback):
    """Audit the loss of a Trainer on a batch of its first optimizer step.

    Use: `PreflightCallback().attach(trainer)`, then `trainer.train()`. The loss is the one that
    `training_step` passes to backward, on a batch of the Trainer's collator, with its own
    `num_items_in_batch`. With accumulation, the rows of the batch make two micro-batches.

    Args:
        on_fault: "error" stops the run, "warn" reports the faults and goes on.
        options: those of `preflight`; `pad_id` and `eos_id` are the tokenizer's unless given.

    Raises:
        PreflightError: on every rank, with the evidence and the remedy.
    """

    def __init__(self, on_fault: str = "error", **options: Any) -> None:
        if on_fault not in ("error", "warn"):
            raise ValueError(f"on_fault must be error or warn, not {on_fault!r}")
        self.on_fault, self.options = on_fault, options
        self.trainer: Any = None
        self.report: Report | None = None

    def attach(self, trainer: Any) -> "PreflightCallback":
        """Add this callback to the trainer, whose loss it audits."""
        self.trainer = trainer
        trainer.add_callback(self)
        return self

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Have batches audited when the Trainer takes them from its data loader, until one is."""
        if self.trainer is None:
            raise ValueError("PreflightCallback does not know its trainer: use .attach(trainer)")
        take, attributes = self.trainer.get_batch_samples, vars(self.trainer)
        own = {k: v for k, v in attributes.items() if k == "get_batch_samples"}

        def take_and_audit(*args: Any, **kwargs: Any) -> Any:
            samples, count = take(*args, **kwargs)
            del attributes["get_batch_samples"]
            attributes.update(own)
            if not self._audit_step(samples):
                attributes["get_batch_samples"] = take_and_audit
            return samples, count

        if self.report is None:
            attributes["get_batch_samples"] = take_and_audit

    def _audit_step(self, samples: list[Any]) -> bool:
        """Audit on rank zero and tell every rank; False where no label of the step counts."""
        key, result = self.options.get("labels_key", "labels"), [self.report, True]
        if self.trainer.is_world_process_zero():
            usable = [s for s in samples if key not in s or bool((s[key] != IGNORE).any())]
            none = Report(skipped={"preflight": "no label of this step counts; the next is taken"})
            result = [self.audit(usable) if usable else none, bool(usable)]
            if usable or self.report is None:
                print(result[0].summary(), file=sys.stderr, flush=True)
        self.report, done = broadcast_object_list(result)
        if self.report.faults and self.on_fault == "error":
            what = ". ".join(f"{f.label}: {f.seen}; {f.remedy}" for f in self.report.findings)
            how = 'To train in spite of it: PreflightCallback("warn")'
            raise PreflightError(f"preflight found {what}. {how}")
        return done

    def audit(self, batches: list[Any]) -> Report:
        """Audit the first of these batches, as one process, with a copy of the trainer."""
        trainer, args = self.trainer, self.trainer.args
        kind = trainer.accelerator.distributed_type.value
        if kind in _SHARDED or args.n_gpu > 1:
            why = f"parameters or batches are divided by {kind} or nn.DataParallel"
            return Report(skipped={"preflight": why})
        tokenizer = getattr(trainer, "processing_class", None)
        ids = {f"{x}_id": getattr(tokenizer, f"{x}_token_id", None) for x in ("pad", "eos")}
        options, batch = {**ids, **self.options}, batches[0]
        loss = _TrainerLoss(trainer, {k: v for k, v in options.items() if k.endswith("_key")})
        try:
            report = preflight(trainer.model, batch, loss, **options)
        except ValueError as error:  # the first training step raises the trainer's own error
            return Report(skipped={"preflight": str(error)})
        if loss.unfused:
            report.sampled.append("loss: the fused head is replaced by logits and a log-softmax")
        if args.gradient_accumulation_steps > 1 and loss.most_parts < 2:
            report.skipped["micro-batches"] = "the batch has one row, so it cannot be split in two"
        if args.world_size > 1:
            report.skipped["ranks"] = "the loss was audited as that of one process"
        return report


class _TrainerLoss:
    """`loss(model, batch)` by `training_step` of a copy of the trainer, without effects on it."""

    def __init__(self, trainer: Any, keys: dict[str, str]) -> None:
        self.keys, self.unfused, self.most_parts = keys, False, 1
        self.parts = 2 if trainer.args.gradient_accumulation_steps > 1 else 1
        self.trainer = copy.copy(trainer)
        data = {k: v for k, v in vars(trainer).items() if not k.endswith("dataset")}
        vars(self.trainer).update({k: _copied(v) for k, v in data.items()})
        self.trainer.accelerator = self.accelerator = _OneProcess(trainer.accelerator)
        self.trainer.args = copy.copy(trainer.args)
        self.trainer.args.gradient_accumulation_steps = self.parts
        self.trainer.optimizer = SimpleNamespace(param_groups=trainer.optimizer.param_groups)
        self.trainer.log = lambda *args, **kwargs: None

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        raw, rebuild = named_tensors(batch, **self.keys)
        rows = len(raw["input_ids"])
        size = -(-rows // self.parts)
        wide = {k: v for k, v in raw.items() if isinstance(v, Tensor) and len(v) == rows}
        starts = range(0, rows, size)
        cuts = [rebuild(raw | {k: v[at : at + size] for k, v in wide.items()}) for at in starts]
        cuts, count = self.trainer.get_batch_samples(iter(cuts), len(cuts), self.trainer.args.device)
        self.trainer.current_gradient_accumulation_steps = len(cuts)
        self.most_parts = max(self.most_parts, len(cuts))
        self.accelerator.losses.clear()
        head = model.get_base_model() if hasattr(model, "get_base_model") else model
        forward, patched = head.forward, "forward" in vars(head)
        vars(model)["train"] = lambda mode=True: model  # the audit runs eval mode as well
        vars(head)["forward"] = lambda *args, **kwargs: self._whole_logits(forward, *args, **kwargs)
        try:
            for cut in cuts:
                self.trainer.training_step(model, cut, count)
        finally:
            del vars(model)["train"], vars(head)["forward"]
            if patched:
                vars(head)["forward"] = forward
        return torch.stack(self.accelerator.losses).sum()

    def _whole_logits(self, forward: Any, *args: Any, **kwargs: Any) -> Any:
        """The forward pass; for that of TRL, which returns no logits, the same by whole logits."""
        if not kwargs.pop("fused_lm_head", False):
            return forward(*args, **kwargs)
        self.unfused, target = True, kwargs.pop("labels")[:, 1:]
        kwargs.pop("num_items_in_batch", None)
        out = forward(*args, **kwargs)
        nll = F.cross_entropy(
            out.logits[:, :-1].transpose(1, 2).float(), target, reduction="none", ignore_index=IGNORE
        )
        zero, mask = torch.zeros_like(nll), target != IGNORE
        fields = {"log_probs": -nll, "label_mask": mask, "entropy": zero, "is_top1": zero}
        return SimpleNamespace(**fields, aux_loss=getattr(out, "aux_loss", None))


class _OneProcess:
    """The accelerator as that of one process, whose backward pass only keeps the loss."""

    num_processes = 1

    def __init__(self, inner: Any) -> None:
        self.inner, self.losses = inner, list[Tensor]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        self.losses.append(loss.sum())

    def gather(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        return value

    gather_for_metrics = reduce = gather




def _copied(value: Any) -> Any:
    """A copy of nested dicts and lists, with the same objects in them."""
    if isinstance(value, dict):
        new = copy.copy(value)
        new.update({k: _copied(v) for k, v in value.items()})
        return new
    return [_copied(v) for v in value] if type(value) is list else value
