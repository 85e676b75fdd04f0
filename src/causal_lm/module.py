"""The correct path from a batch to a loss, with no switches in it."""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from causal_lm import masks, objective
from causal_lm.data.collate import Batch
from causal_lm.metrics import TokenPerplexity
from causal_lm.nonfinite import Guard, MicroBatch, explain
from causal_lm.objective import LossConfig
from causal_lm.optim.parameter_groups import ParameterGroups, describe_groups, parameter_groups
from causal_lm.optim.schedules import Factor
from causal_lm.schema import is_float16

log = logging.getLogger(__name__)
TRAINING = "causal_lm_training"
"""Key of a checkpoint for what :meth:`CausalLM.on_save_checkpoint` adds."""


def parts_into_body_and_head(model: nn.Module) -> bool:
    """Are its logits ``head(body(…))``, with a linear head that has no bias?"""
    head = getattr(model, "head", None)
    return hasattr(model, "body") and isinstance(head, nn.Linear) and head.bias is None


def random_state(device: torch.device) -> dict[str, Tensor]:
    """Of the generators that dropout draws from."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


class CausalLM(L.LightningModule):
    """Trains ``model`` to predict the next token of each document.

    The three alignments are three small methods: :meth:`targets`, :meth:`counted` and
    :meth:`may_attend`. Training asks these; evaluation (:meth:`forward`, :meth:`labels`) asks
    ``objective`` and ``masks`` themselves. So a subclass that gets one wrong changes what is
    trained, and cannot change what is measured.

    Args:
        model: (input_ids (B, T), position_ids (B, T), may_attend (B, T, T) or None) -> logits
            (B, T, V).
        optimizer: parameter groups -> optimizer; None where nothing is trained.
        scheduler: total_steps -> (optimizer step -> share of the peak rate, see ``schedules``);
            None for a constant rate.
        token_bytes: (V,) UTF-8 bytes of each token, for bits per byte; None where not text.
        loss: how the token losses become one number.
        guard: what to do about a loss or a gradient that is not finite; None stops there.

    Raises:
        ValueError: ``loss.chunk_tokens`` is set, for a model that has no plain head.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[ParameterGroups], torch.optim.Optimizer] | None = None,
        scheduler: Callable[[int], Factor] | None = None,
        token_bytes: Tensor | None = None,
        loss: LossConfig | None = None,
        guard: Guard | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss or LossConfig()
        if self.loss.chunk_tokens and not parts_into_body_and_head(model):
            raise ValueError(
                f"{type(model).__name__} does not part into a body and a head without bias, so its "
                f"loss cannot be computed in chunks: set loss.chunk_tokens=null"
            )
        self.model: Any = model
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.val = TokenPerplexity(token_bytes)
        self.own_view = MeanMetric()
        self.guard = guard or Guard()
        self.step_loss: float | None = None
        """Of the last optimizer step; None where it was skipped."""
        self.seen: list[MicroBatch] = []
        """The micro-batches since then, on this rank; and what dropout drew from at the first."""
        self.random: dict[str, Tensor] = {}

    # ---- what is trained ----

    def targets(self, batch: Batch) -> Tensor:
        """(B, T): the token that each position is to predict."""
        return objective.next_tokens(batch.input_ids)

    def counted(self, batch: Batch) -> Tensor:
        """bool (B, T): the positions whose target counts in the loss."""
        return objective.has_target(batch.document_ids, batch.loss_mask)

    def may_attend(self, batch: Batch) -> Tensor | None:
        """bool (B, T, T): True where a position (dim 1) may look at another (dim 2). None is plain
        causal within each row."""
        return masks.visible(batch.document_ids)

    def loss_terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The sum of the weighted token losses, in nats, and the denominator it is over."""
        labels = objective.make_labels(self.targets(batch), self.counted(batch))
        weights, denominator = objective.token_weights(labels, batch.document_ids, self.loss)
        inputs = batch.input_ids, batch.position_ids, self.may_attend(batch)
        if self.loss.chunk_tokens:
            hidden, head = self.model.body(*inputs), self.model.head.weight
            nats = objective.chunked_nll(hidden, head, labels, weights, self.loss.chunk_tokens)
        else:
            nats = objective.weighted_nll(self.model(*inputs), labels, weights)
        return nats, denominator

    @contextmanager
    def whole_logits(self) -> Iterator[None]:
        """Compute the loss from all logits at once meanwhile, so that an audit can see them."""
        before, self.loss = self.loss, replace(self.loss, chunk_tokens=None)
        try:
            yield
        finally:
            self.loss = before

    def accumulated_loss(self, *micro_batches: Batch) -> Tensor:
        """The loss of one optimizer step over these micro-batches, a scalar, in nats."""
        nats, denominators = zip(*map(self.loss_terms, micro_batches), strict=True)
        return torch.stack(nats).sum() / torch.stack(denominators).sum().clamp(min=1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The *sum*, not yet over anything; :meth:`on_before_optimizer_step` divides, once.

        A mean per micro-batch would weigh a token by the company it came in: Lightning averages
        over micro-batches, DDP over ranks, whatever they hold.
        """
        if not self.seen:
            self.random = random_state(self.device)
        nats, denominator = self.loss_terms(batch)
        sums = torch.stack([nats.detach().float(), denominator.float()])
        self.seen.append(MicroBatch(batch_idx, batch, sums))
        return nats * self.unit * self.trainer.accumulate_grad_batches  # which Lightning divides by

    @property
    def unit(self) -> float:
        """A sum has large gradients, and float16 ends at 65,504: there, a power of two smaller."""
        return 2.0**-10 if is_float16(self.trainer.precision) else 1.0

    def on_before_optimizer_step(self, optimizer) -> None:
        """Gradients of the sum -> of the loss over all micro-batches and ranks, before clipping."""
        sums: Any = sum(part.sums for part in self.seen)
        nats, denominator = self.trainer.strategy.reduce(sums, reduce_op="sum").tolist()
        self.loss_is_finite = math.isfinite(nats)
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        if denominator:  # DDP has averaged: times the ranks is their sum
            torch._foreach_mul_(gradients, self.trainer.world_size / (denominator * self.unit))
            self.step_loss = nats / denominator
            return
        self.step_loss = None
        if self.trainer.is_global_zero:
            log.warning(f"step {self.trainer.global_step} is skipped: no target counts in it")
        optimizer.zero_grad(set_to_none=True)  # no gradient, no change: not even weight decay

    # ---- what is measured ----

    def forward(self, batch: Batch, cache: object = None) -> Tensor:
        """Logits (B, T, V) under the right mask, whatever was trained.

        With a cache the batch holds what is new: rows without PAD, of one document each.
        """
        if cache is not None:
            return self.model(batch.input_ids, batch.position_ids, None, cache)
        return self.model(batch.input_ids, batch.position_ids, masks.visible(batch.document_ids))

    def make_cache(self) -> object:
        """What :func:`generation.sample` hands back to :meth:`forward`; None where not offered."""
        make = getattr(self.model, "make_cache", None)
        return make() if make else None

    @staticmethod
    def labels(batch: Batch) -> Tensor:
        """(B, T): the next token of the same document, IGNORE where there is none."""
        counted = objective.has_target(batch.document_ids, batch.loss_mask)
        return objective.make_labels(objective.next_tokens(batch.input_ids), counted)

    def token_nll(self, batch: Batch) -> Tensor:
        """(B, T): nats of each label of the batch, 0 where there is none."""
        labels, chunk = self.labels(batch), self.loss.chunk_tokens
        if not chunk:
            return objective.token_nll(self(batch), labels)
        visible = masks.visible(batch.document_ids)
        hidden = self.model.body(batch.input_ids, batch.position_ids, visible)
        return objective.chunked_token_nll(hidden, self.model.head.weight, labels, chunk)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.val.update(self.token_nll(batch), self.labels(batch))
        if self.has_own_view:
            nats, denominator = self.loss_terms(batch)
            self.own_view.update(nats / denominator.clamp(min=1), denominator)

    def on_validation_epoch_end(self) -> None:
        figures = self.val.compute()
        self.val.reset()
        for name, value in figures.items():
            self.log(f"val/{name}", value.float(), prog_bar=name == "loss")
        self.log("val/loss_as_trained", self.loss_as_trained(figures["loss"]).float())

    @property
    def has_own_view(self) -> bool:
        """Does training see another number than the mean over tokens that is measured?"""
        return self.loss.reduction != "token"

    def loss_as_trained(self, val_loss: Tensor) -> Tensor:
        """The validation loss as the training objective sees it."""
        if not self.has_own_view:
            return val_loss
        value = self.own_view.compute()
        self.own_view.reset()
        return value

    # ---- how it is optimized ----

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what a run that goes on from the last optimizer step counts and draws from."""
        checkpoint[TRAINING] = {
            "guard": [self.guard.skipped, self.guard.in_a_row],
            "random": self.random if self.seen else random_state(self.device),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go back to the last optimizer step: micro-batches after it left nothing but a count."""
        batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if not batches["is_last_batch"]:
            part = batches["current"]["ready"] % self.trainer.accumulate_grad_batches
            for name in ("total", "current"):
                batches[name] = {k: n - part for k, n in batches[name].items()}
        if state := checkpoint.get(TRAINING):
            (self.guard.skipped, self.guard.in_a_row), self.random = state["guard"], state["random"]

    def on_train_start(self) -> None:
        """Take up dropout's draws, now that the first pass over the data has made its own draw."""
        if "cpu" in self.random:
            torch.set_rng_state(self.random["cpu"])
        if "cuda" in self.random and self.device.type == "cuda":
            torch.cuda.set_rng_state(self.random["cuda"], self.device)

    def configure_optimizers(self):
        assert self.make_optimizer is not None, "a module without an optimizer cannot be trained"
        optimizer = self.make_optimizer(parameter_groups(self.model))
        if self.trainer.is_global_zero:
            log.info(describe_groups(optimizer))
        if self.make_scheduler is None:
            return optimizer
        schedule = LambdaLR(optimizer, self.make_scheduler(self.trainer.max_steps))
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        """Clip by global norm and log the norm; no step is taken with what is not finite."""
        seen, self.seen = self.seen, []
        norm = nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        finite = self.loss_is_finite and bool(torch.isfinite(norm))
        if not self.trainer.strategy.reduce_boolean_decision(finite):  # sharded norms may differ
            scaled = self.loss_is_finite and is_float16(self.trainer.precision)
            self.guard.refuse(self.trainer.global_step, explain(self, seen), scaled)
            optimizer.zero_grad(set_to_none=True)
            self.step_loss = None
            self.log("train/skipped", float(self.guard.skipped))
            return
        self.guard.accept()
        if self.step_loss is not None:
            self.log("train/loss", self.step_loss)
        if gradient_clip_val is not None:
            nn.utils.clip_grads_with_norm_(self.parameters(), gradient_clip_val, norm)
        self.log("train/grad_norm", norm)
        self.log("train/lr", optimizer.param_groups[0]["lr"])
