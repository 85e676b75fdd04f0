"""``CausalLM``, the LightningModule: training step, evaluation, optimizer, checkpoint hooks."""

import logging
import math
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.data import sized_len
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from causal_lm import objective
from causal_lm.accumulation import StepAccumulator, divide_gradients, set_random_state
from causal_lm.data.collate import Batch
from causal_lm.masks import AttentionMask
from causal_lm.metrics import TokenPerplexity
from causal_lm.models.base import CausalModel
from causal_lm.nonfinite import NonFiniteGuard, describe_nonfinite
from causal_lm.objective import LossConfig
from causal_lm.optim.parameter_groups import ParameterGroups, describe_groups, parameter_groups
from causal_lm.optim.schedules import Factor
from causal_lm.schema import is_float16
from causal_lm.sharding import shard, whole

log = logging.getLogger(__name__)
TRAINING_STATE = "causal_lm_training"  # key of a checkpoint, see CausalLM.on_save_checkpoint
FP16_GRAD_SCALE = 2.0**-10  # of the summed loss under float16, whose largest value is 65,504


class CausalLM(L.LightningModule):
    """Trains a causal language model to predict the next token of each document.

    Training uses :meth:`training_labels` and :meth:`training_mask`, which can be overridden (see
    ``pitfalls.py``); evaluation always uses the labels and the mask of the batch itself.

    ``optimizer`` makes one from parameter groups, and ``scheduler`` a factor of the learning rate
    from the number of steps (see ``optim/``). Both are None if the module is only evaluated.

    Raises TypeError where ``model`` lacks a member of ``CausalModel``, and ValueError where its
    ``lm_head`` has a bias, or is None although ``loss.chunk_tokens`` is set.
    """

    def __init__(
        self,
        model: CausalModel,
        optimizer: Callable[[ParameterGroups], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[int], Factor] | None = None,  # None: constant
        token_bytes: Tensor | None = None,  # (V,) UTF-8 bytes of each token; None: not text
        loss: LossConfig | None = None,
        nonfinite: NonFiniteGuard | None = None,  # None: stop the run
    ) -> None:
        super().__init__()
        self.loss_config, name = loss or LossConfig(), type(model).__name__
        if not isinstance(model, CausalModel):
            base = "causal_lm.models.base.BaseCausalModel"
            raise TypeError(f"{name} is not a CausalModel: derive it from {base}")
        if model.lm_head is not None and model.lm_head.bias is not None:
            raise ValueError(f"{name}: lm_head has a bias; set it to None and override forward")
        if self.loss_config.chunk_tokens and model.lm_head is None:
            reason = "has no lm_head, so its loss cannot be computed in chunks"
            raise ValueError(f"{name} {reason}: set loss.chunk_tokens=null")
        self.model, self.make_optimizer, self.make_scheduler = model, optimizer, scheduler
        self.val_metric, self.train_objective_metric = TokenPerplexity(token_bytes), MeanMetric()
        self.guard, self.accumulator = nonfinite or NonFiniteGuard(), StepAccumulator()
        self.step_loss: float | None = None
        """Loss of the last optimizer step, in nats; None where the step was skipped."""

    # ---- training: one optimizer step, from its micro-batches to its clipped gradients ----

    def training_labels(self, batch: Batch) -> Tensor:
        """(B, T): the token that each position is trained to predict, IGNORE where it has none."""
        return batch.labels

    def training_mask(self, batch: Batch) -> AttentionMask:
        """The attention mask used in training."""
        return batch.attention_mask

    def loss_terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of the weighted token losses, in nats, and its denominator; both scalars."""
        labels, config = self.training_labels(batch), self.loss_config
        weights, denominator = objective.token_weights(labels, batch.document_ids, config)
        inputs = batch.input_ids, batch.position_ids, self.training_mask(batch)
        if config.chunk_tokens and self.model.lm_head is not None:
            hidden, head = self.model.hidden_states(*inputs), self.model.lm_head.weight
            nats = objective.chunked_nll(hidden, head, labels, weights, config.chunk_tokens)
        else:
            nats = objective.weighted_nll(self.model(*inputs), labels, weights)
        return nats, denominator

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The *sum* of the weighted losses; :meth:`on_before_optimizer_step` divides it."""
        self.accumulator.start(self.device)
        nats, denominator = self.loss_terms(batch)
        self.accumulator.add(batch_idx, batch, nats, denominator)
        # Lightning divides the loss of each micro-batch by their number.
        return nats * self.fp16_grad_scale * self.trainer.accumulate_grad_batches

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the denominator of all micro-batches and ranks."""
        nats, denominator = self.accumulator.reduce(self.trainer.strategy)
        self.loss_is_finite = math.isfinite(nats)
        if denominator:
            self.step_loss = nats / denominator
            ranks, scale = self.trainer.world_size, self.fp16_grad_scale
            divide_gradients(self.parameters(), denominator, ranks, scale)
            return
        self.step_loss, self.guard.skipped = None, self.guard.skipped + 1
        if self.trainer.is_global_zero:
            log.warning(f"step {self.trainer.global_step} is skipped: no position has a target")
        optimizer.zero_grad(set_to_none=True)  # without gradients there is no weight decay either

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        """Clip by the global norm and log it; skip the step where loss or norm is not finite."""
        micro_batches = self.accumulator.clear()
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        norm = whole(nn.utils.get_total_norm(gradients))
        finite = self.loss_is_finite and bool(torch.isfinite(norm))
        if not self.trainer.strategy.reduce_boolean_decision(finite):  # sharded norms may differ
            by_scaler = self.loss_is_finite and is_float16(self.trainer.precision)
            cause = describe_nonfinite(self, micro_batches)
            self.guard.record_skipped_step(self.trainer.global_step, cause, by_scaler)
            optimizer.zero_grad(set_to_none=True)
            self.step_loss = None
            self.log("train/skipped", float(self.guard.skipped))
            return
        self.guard.in_a_row = 0
        if self.step_loss is not None:
            self.log("train/loss", self.step_loss)
        if gradient_clip_val is not None:
            nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)
        self.log("train/grad_norm", norm)
        self.log("train/lr", optimizer.param_groups[0]["lr"])

    @property
    def fp16_grad_scale(self) -> float:
        """Factor of the summed loss under float16, 1 otherwise."""
        return FP16_GRAD_SCALE if is_float16(self.trainer.precision) else 1.0

    def accumulated_loss(self, *micro_batches: Batch) -> Tensor:
        """The loss of one optimizer step over these micro-batches, a scalar, in nats."""
        nats, denominators = zip(*map(self.loss_terms, micro_batches), strict=True)
        return torch.stack(nats).sum() / torch.stack(denominators).sum().clamp(min=1)

    # ---- evaluation: always the canonical labels and mask ----

    def forward(self, batch: Batch, cache: Any = None) -> Tensor:
        """Logits (B, T, V). With a cache, the batch holds the new tokens of rows without PAD."""
        mask = batch.attention_mask if cache is None else None
        return self.model(batch.input_ids, batch.position_ids, mask, cache)

    def hidden_states(self, batch: Batch) -> Tensor:
        """The input of the model's head: (B, T, C)."""
        return self.model.hidden_states(batch.input_ids, batch.position_ids, batch.attention_mask)

    def make_cache(self) -> Any:
        """An empty cache for :meth:`forward`; None if the model has no cache."""
        return self.model.make_cache()

    def token_nll(self, batch: Batch) -> Tensor:
        """(B, T): negative log-likelihood of each label in nats, 0 where there is none."""
        chunk = self.loss_config.chunk_tokens
        if not chunk or self.model.lm_head is None:
            return objective.token_nll(self(batch), batch.labels)
        hidden, head = self.hidden_states(batch), self.model.lm_head.weight
        return objective.chunked_token_nll(hidden, head, batch.labels, chunk)

    @property
    def train_objective_differs(self) -> bool:
        """Whether the training objective differs from the mean over tokens that is measured."""
        return self.loss_config.reduction != "token"

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_metric.update(self.token_nll(batch), batch.labels)
        if self.train_objective_differs:
            nats, denominator = self.loss_terms(batch)
            self.train_objective_metric.update(nats / denominator.clamp(min=1), denominator)

    def on_validation_epoch_end(self) -> None:
        self.val_metric.count_text(getattr(self.trainer.val_dataloaders, "dataset", None))
        values = self.val_metric.compute()
        differs, own = self.train_objective_differs, self.train_objective_metric
        values |= {"loss_as_trained": own.compute() if differs else values["loss"]}
        for name, value in values.items():
            self.log(f"val/{name}", value.float(), prog_bar=name == "loss")
        self.val_metric.reset()
        self.train_objective_metric.reset()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.val_metric.update(self.token_nll(batch), batch.labels)

    def on_test_epoch_end(self) -> None:
        self.val_metric.count_text(getattr(self.trainer.test_dataloaders, "dataset", None))
        self.log_dict({f"test/{k}": v.float() for k, v in self.val_metric.compute().items()})
        self.val_metric.reset()

    # ---- sharding, optimizer, schedule, checkpoint ----

    def configure_model(self) -> None:
        """Under trainer=fsdp, shard the weights over all ranks."""
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh.device_type)

    def configure_optimizers(self) -> Any:
        assert self.make_optimizer is not None, "a module without an optimizer cannot be trained"
        self.total_steps = self._count_steps()
        optimizer = self.make_optimizer(parameter_groups(self.model))
        if self.trainer.is_global_zero:
            log.info(describe_groups(optimizer))
        if self.make_scheduler is None:
            return optimizer
        schedule = LambdaLR(optimizer, self.make_scheduler(self.total_steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def _count_steps(self) -> int:
        """Optimizer steps of the run, by max_steps or max_epochs. (Lightning's own count would draw
        batches before a resumed run knows where it goes on.)"""
        trainer: Any = self.trainer
        if trainer.datamodule is None:
            return trainer.estimated_stepping_batches
        if (batches := sized_len(trainer.datamodule.train_dataloader())) is None:
            return trainer.max_steps  # a stream, whose length is not known
        limit = trainer.limit_train_batches
        batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
        steps, rest = divmod(batches, most := trainer.accumulate_grad_batches)
        if rest and trainer.is_global_zero:
            sums = f"the last step of each sums {rest}, not trainer.accumulate_grad_batches={most}"
            log.info(f"an epoch has {batches} micro-batches: {sums}")
        limits = trainer.max_steps, trainer.max_epochs * (steps + bool(rest))
        return min((limit for limit in limits if limit >= 0), default=-1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the counters and the random state of the last optimizer step."""
        loops = checkpoint["loops"]["fit_loop"]
        epochs, within = loops["epoch_progress"], loops["epoch_loop.batch_progress"]
        done = epochs["current"]["started"] - (not within["is_last_batch"])
        checkpoint["epoch"] = done = max(done, 0)
        if done < epochs["current"]["processed"]:  # Lightning counts an epoch that was stopped
            for counts in epochs["total"], epochs["current"]:
                counts["processed"] = counts["completed"] = done
        data: Any = getattr(self.trainer, "datamodule", None)
        unfinished = len(self.accumulator.micro_batches)
        checkpoint[TRAINING_STATE] = {
            "guard": [self.guard.skipped, self.guard.in_a_row],
            "random": self.accumulator.random_state_to_resume(self.device),
            "unfinished": unfinished,
            "position": data.save_position(unfinished) if hasattr(data, "save_position") else None,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Repeat the micro-batches after the last optimizer step, and go on in the documents."""
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        state: dict[str, Any] = checkpoint.get(TRAINING_STATE, {})
        if not {"guard", "random", "unfinished", "position"} <= state.keys():
            problem = "the checkpoint does not say where it stopped in the documents"
            raise ValueError(f"{problem}: set ckpt_path to one of this version, or to null")
        for name in ("total", "current"):
            batches[name] = {k: n - state["unfinished"] for k, n in batches[name].items()}
        data: Any = getattr(self.trainer, "datamodule", None)
        if state["position"] and hasattr(data, "resume"):
            data.resume(state["position"], batches)
        self.guard.skipped, self.guard.in_a_row = state["guard"]
        self.accumulator.random_state = state["random"]

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # Lightning's step of logged values is off by one after some changes of its intervals.
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step

    def on_train_start(self) -> None:
        """Restore the random state after the data loader has drawn its own seed."""
        set_random_state(self.accumulator.random_state, self.device)

    on_fit_start = on_train_start  # where no step is left, on_train_start is not called
