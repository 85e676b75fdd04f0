"""Loops with one fault in modes, ties, rates, precision or metrics each, and right twins."""

import threading

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.text import Perplexity

from loop_cases.base import C, Net, Right, V
from loop_cases.gradients import resize


class EvalLeftOn(Right):
    def on_train_start(self):
        self.net.eval()


class EvalAfterValidation(Right):
    def on_train_batch_start(self, batch, i):
        if i == 4:
            self.net.eval()


class FunctionalDropout(Right):
    def loss(self, ids):
        return F.cross_entropy(self(ids)[:, :-1].transpose(1, 2), ids[:, 1:])

    def forward(self, ids):
        return F.dropout(self.net(ids), 0.1)


class TrainModeInValidation(Right):
    def validation_step(self, ids, i):
        self.net.train()
        super().validation_step(ids, i)


class SampledInValidation(Right):
    """Right: random numbers drawn in validation, but not by the model."""

    def validation_step(self, ids, i):
        super().validation_step(ids, i)
        torch.multinomial(self.net(ids)[:, -1].softmax(-1), 1)


class Copied(Right):
    def make(self):
        net = Net()
        net.head.weight = nn.Parameter(net.embed.weight.detach().clone())
        return net


class ResizedWithoutHead(Copied):
    def make(self):
        net = Net()
        resize(net)
        net.head.weight = nn.Parameter(net.embed.weight.detach()[:V].clone())
        net.head.weight.data = torch.cat([net.head.weight.data, torch.randn(4, C)])
        return net


class PartedLater(Right):
    def on_train_batch_start(self, batch, i):
        if i == 1:
            self.net.head.weight = nn.Parameter(self.net.embed.weight.detach() + 0.1)


class Untied(Right):
    def make(self):
        net = Net()
        net.head = nn.Linear(C, V, bias=False)
        return net


class Scheduled(Right):
    """Right: a warm-up from 0 over steps."""

    interval = "step"

    def schedule_of(self, optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1.0, s / 4))

    def schedule(self, i):
        if self.interval == "step" or self.trainer.is_last_batch:
            super().schedule(i)

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        scheduler = self.schedule_of(optimizer)
        return [optimizer], [{"scheduler": scheduler, "interval": self.interval}]


class HardlyMoves(Scheduled):
    """Right: a long warm-up from 0, and no dropout: one batch has equal gradients in all steps."""

    def make(self):
        net = Net()
        for block in net.blocks:
            block[2].p = 0.0
        return net

    def schedule_of(self, optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: s / 1e6)


class IntegerDivision(Scheduled):
    def schedule_of(self, optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, s // 100))


class WarmupByEpoch(Scheduled):
    interval = "epoch"


class CosineByEpoch(WarmupByEpoch):
    def schedule_of(self, optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8)


class OneCycleByEpoch(WarmupByEpoch):
    def schedule_of(self, optimizer):
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=8)


class SequenceByEpoch(WarmupByEpoch):
    def schedule_of(self, optimizer):
        first = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4)
        second = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)
        return torch.optim.lr_scheduler.SequentialLR(optimizer, [first, second], [4])


class ExponentialByEpoch(WarmupByEpoch):
    """Right, as are the next two."""

    def schedule_of(self, optimizer):
        return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.95)


class StepByEpoch(WarmupByEpoch):
    def schedule_of(self, optimizer):
        return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


class CosineOfEpochs(WarmupByEpoch):
    def schedule_of(self, optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=2)


class NoAutocast(Right):
    def loss(self, ids):
        with torch.autocast("cpu", enabled=False):
            return super().loss(ids)


class MeanOfExponentials(Right):
    def validation_step(self, ids, i):
        loss = self.loss(ids)
        self.log_dict({"val_loss": loss, "val_ppl": loss.exp()}, batch_size=len(ids))


class MeanAtTheEnd(Right):
    """The same fault, averaged by hand."""

    def on_validation_epoch_start(self):
        self.losses = []

    def validation_step(self, ids, i):
        self.losses.append(self.loss(ids))

    def on_validation_epoch_end(self):
        losses = torch.stack(self.losses)
        self.log_dict({"val/loss": losses.mean(), "val/perplexity": self.perplexity(losses)})

    def perplexity(self, losses):
        return losses.exp().mean()


class ExponentialOfMean(MeanAtTheEnd):
    def perplexity(self, losses):
        return losses.mean().exp()


class TokenMeanAtTheEnd(MeanAtTheEnd):
    """Right: of batches of 1 and 3 tokens; the loss beside it is a mean of their means."""

    def validation_step(self, ids, i):
        self.losses.append(self.loss(ids))
        self.log("val/loss", self.losses[-1], batch_size=len(ids))

    def on_validation_epoch_end(self):
        few, many = sorted(self.losses)
        self.log("val/ppl", (0.25 * few + 0.75 * many).exp())


class SlightlyAbove(MeanAtTheEnd):
    def perplexity(self, losses):
        return (losses.mean() + 3e-4).exp()


class SmoothedLoss(MeanAtTheEnd):
    """Right: the loss has a term that the perplexity leaves out."""

    def perplexity(self, losses):
        return (losses.mean() - 0.1).exp()


class Metered(Right):
    """Right: a metric keeps sums over all tokens; the loss beside it is a mean of batch means."""

    def __init__(self, manual: bool = False) -> None:
        super().__init__(manual)
        self.metric = Perplexity()

    def validation_step(self, ids, i):
        loss = self.loss(ids)
        self.metric(self.net(ids)[:, :-1], ids[:, 1:])
        self.log_dict({"val/loss": loss * 0.99, "val/ppl": self.metric})


class NotCopied(WarmupByEpoch):
    """A schedule by epochs that cannot be simulated."""

    def schedule_of(self, optimizer):
        scheduler = super().schedule_of(optimizer)
        scheduler.lock = threading.Lock()
        return scheduler
