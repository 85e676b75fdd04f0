"""The correct path from a batch to a loss, with no switches in it."""

from collections.abc import Callable, Iterable

import lightning as L
import torch
from torch import Tensor, nn

from causal_lm import masks, objective
from causal_lm.data.collate import Batch
from causal_lm.metrics import TokenPerplexity


class CausalLM(L.LightningModule):
    """Trains ``model`` to predict the next token of each document.

    The three alignments are three small methods: :meth:`targets`, :meth:`counted` and
    :meth:`may_attend`. Training asks these; evaluation (:meth:`forward`, :meth:`labels`) asks
    ``objective`` and ``masks`` themselves. So a subclass that gets one wrong changes what is
    trained, and cannot change what is measured.

    Args:
        model: (input_ids (B, T), position_ids (B, T), may_attend (B, T, T)) -> logits (B, T, V).
        optimizer: parameters -> optimizer; None where nothing is trained.
        scheduler: (optimizer, total_steps) -> learning-rate schedule, stepped once per optimizer
            step; None for a constant rate.
        token_bytes: (V,) UTF-8 bytes of each token, for bits per byte; None where not text.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
        scheduler: Callable[..., torch.optim.lr_scheduler.LRScheduler] | None = None,
        token_bytes: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.make_optimizer = optimizer
        self.make_scheduler = scheduler
        self.val = TokenPerplexity(token_bytes)
        # Of the micro-batches since the last optimizer step, on this rank.
        self.window_nats: Tensor | float = 0.0
        self.window_tokens: Tensor | int = 0

    # ---- what is trained ----

    def targets(self, batch: Batch) -> Tensor:
        """(B, T): the token that each position is to predict."""
        return objective.next_tokens(batch.input_ids)

    def counted(self, batch: Batch) -> Tensor:
        """bool (B, T): the positions whose target counts in the loss."""
        return objective.has_next(batch.document_ids)

    def may_attend(self, batch: Batch) -> Tensor:
        """bool (B, T, T): True where a position (dim 1) may look at another (dim 2)."""
        return masks.causal(batch.document_ids)

    def as_trained(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) and labels (B, T) as training sees them."""
        logits = self.model(batch.input_ids, batch.position_ids, self.may_attend(batch))
        return logits, objective.make_labels(self.targets(batch), self.counted(batch))

    def training_loss(self, batch: Batch) -> Tensor:
        """The objective on one batch: nats per counted token, a scalar."""
        return objective.mean_nll(*self.as_trained(batch))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The *sum* over counted tokens; :meth:`on_before_optimizer_step` divides, once.

        A mean per micro-batch would weigh a token by the company it came in: Lightning averages
        over micro-batches, DDP over ranks, whatever they hold.
        """
        logits, labels = self.as_trained(batch)
        nats = objective.token_nll(logits, labels).sum()
        self.window_nats = self.window_nats + nats.detach()
        self.window_tokens = self.window_tokens + objective.count(labels)
        return nats * self.trainer.accumulate_grad_batches  # which Lightning divides by

    def on_before_optimizer_step(self, optimizer) -> None:
        """Gradients of the sum -> of the mean over all micro-batches and ranks, before clipping."""
        reduce = self.trainer.strategy.reduce
        nats = reduce(self.window_nats, reduce_op="sum")
        tokens = reduce(self.window_tokens, reduce_op="sum").clamp(min=1)
        self.window_nats, self.window_tokens = 0.0, 0
        for parameter in self.parameters():
            if parameter.grad is not None:  # DDP has averaged: times the ranks is their sum
                parameter.grad *= self.trainer.world_size / tokens
        self.log("train/loss", nats / tokens)

    # ---- what is measured ----

    def forward(self, batch: Batch) -> Tensor:
        """Logits (B, T, V) under the right mask, whatever was trained."""
        return self.model(batch.input_ids, batch.position_ids, masks.causal(batch.document_ids))

    @staticmethod
    def labels(batch: Batch) -> Tensor:
        """(B, T): the next token of the same document, IGNORE where there is none."""
        return objective.make_labels(
            objective.next_tokens(batch.input_ids), objective.has_next(batch.document_ids)
        )

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        labels = self.labels(batch)
        self.val.update(objective.token_nll(self(batch), labels), labels)

    def on_validation_epoch_end(self) -> None:
        figures = self.val.compute()
        self.val.reset()
        for name, value in figures.items():
            self.log(f"val/{name}", value.float(), prog_bar=name == "loss")
        self.log("val/loss_as_trained", self.loss_as_trained(figures["loss"]).float())

    def loss_as_trained(self, val_loss: Tensor) -> Tensor:
        """The validation loss as the training objective sees it: here, the same number."""
        return val_loss

    # ---- how it is optimised ----

    def configure_optimizers(self):
        assert self.make_optimizer is not None, "a module without an optimizer cannot be trained"
        optimizer = self.make_optimizer(self.parameters())
        if self.make_scheduler is None:
            return optimizer
        schedule = self.make_scheduler(optimizer, total_steps=self.trainer.max_steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        """Clip by global norm, log the norm, and stop at NaN or inf instead of training on."""
        limit = float("inf") if gradient_clip_val is None else gradient_clip_val
        norm = nn.utils.clip_grad_norm_(self.parameters(), limit)
        self.log("train/grad_norm", norm)
        self.log("train/lr", optimizer.param_groups[0]["lr"])
        # Under float16 the loss scaler meets infinities as a matter of course, and skips the step.
        if not torch.isfinite(norm) and self.trainer.precision != "16-mixed":
            raise FloatingPointError(
                f"the gradient at step {self.trainer.global_step} is not finite: lower "
                f"optimizer.lr, or look at the batch; the weights are those before this step"
            )
