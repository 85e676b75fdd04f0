"""Training loops with one silent fault each, and right twins, for `LoopProbe`."""

from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

V, C, T = 12, 8, 6


class Net(nn.Module):
    """Embedding, two blocks with dropout, norm, head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, C)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(C, C), nn.GELU(), nn.Dropout(0.1)) for _ in range(2)
        )
        self.norm, self.head = nn.LayerNorm(C), nn.Linear(C, V, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x))


class Right(L.LightningModule):
    """A right loop, under automatic or manual optimization; subclasses break one method of it."""

    n = 1  # micro-batches of a step

    def __init__(self, manual: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = not manual
        self.net = self.make()

    def make(self) -> nn.Module:
        return Net()

    def loss(self, ids: Tensor) -> Tensor:
        return F.cross_entropy(self.net(ids)[:, :-1].transpose(1, 2), ids[:, 1:])

    def training_step(self, ids: Tensor, i: int) -> Any:
        loss = self.loss(ids)
        self.log("train/loss", loss)
        if self.automatic_optimization:
            return self.scaled(loss)
        self.manual_backward(self.scaled(loss) / self.n)
        if (i + 1) % self.n == 0:
            self.finish(i)
        return None

    def scaled(self, loss: Tensor) -> Tensor:
        return loss

    def finish(self, i: int) -> None:
        """A manual step, after the backward pass."""
        optimizer = self.optimizers()
        optimizer.step()
        self.zero()
        self.schedule(i)

    def zero(self) -> None:
        self.optimizers().zero_grad()

    def schedule(self, i: int) -> None:
        if scheduler := self.lr_schedulers():
            scheduler.step()

    def validation_step(self, ids: Tensor, i: int) -> None:
        self.log("val/loss", self.loss(ids), batch_size=len(ids))

    def on_validation_epoch_end(self) -> None: ...

    def parts(self) -> Any:
        return self.parameters()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parts(), lr=1e-3, weight_decay=0.0)


def fit(module: L.LightningModule, *callbacks: Any, **options: Any) -> L.Trainer:
    ids = torch.randint(0, V, (16, T), generator=torch.Generator().manual_seed(1))
    options = {"max_steps": 4, "max_epochs": 1, "logger": False, "val_check_interval": 4} | options
    trainer = L.Trainer(
        accelerator="cpu", enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=list(callbacks), **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(ids, batch_size=2), DataLoader(ids, batch_size=4))
    return trainer


class SomeParameters(Right):
    def parts(self):
        return [p for name, p in self.named_parameters() if "blocks.1" not in name]


class UpdatedByHand(SomeParameters):
    """Right: what the optimizer lacks is trained by another hand."""

    def on_train_batch_end(self, *_):
        with torch.no_grad():
            for p in self.net.blocks[1].parameters():
                p.sub_(0.1)


class Frozen(SomeParameters):
    """Right: a frozen part in eval mode, and a batch norm that stays in it."""

    def make(self):
        net = Net()
        net.blocks[1].requires_grad_(False).eval()
        net.extra = StaysInEval(C)
        net.norm = nn.Sequential(net.norm, Rows(net.extra))
        return net


class StaysInEval(nn.BatchNorm1d):
    def train(self, mode: bool = True):
        return super().train(False)


class Rows(nn.Module):
    """A norm over channels of (B, T, C)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x):
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


class DetachedNet(Net):
    def forward(self, ids):
        x = self.blocks[0](self.embed(ids)).detach()
        return self.head(self.norm(x + self.blocks[1](x)))


class Detached(Right):
    def make(self):
        return DetachedNet()


class UnusedHead(Right):
    def make(self):
        net = Net()
        net.spare = nn.Linear(C, C)
        return net


class Experts(Right):
    """Right: of four blocks two are called, in one batch the one and in the next the other."""

    def make(self):
        net = Net()
        net.experts = nn.ModuleList(nn.Linear(C, C) for _ in range(4))
        net.norm = Routed(net.norm, net.experts)
        return net


class Routed(nn.Module):
    def __init__(self, norm: nn.Module, experts: nn.ModuleList) -> None:
        super().__init__()
        self.norm, self.experts, self.calls = norm, experts, 0

    def forward(self, x):
        self.calls += 1
        return self.norm(x + self.experts[self.calls % 2](x))


def resize(net: Net) -> None:
    old = net.embed.weight.detach()
    net.embed, net.head = nn.Embedding(V + 4, C), nn.Linear(C, V + 4, bias=False)
    net.embed.weight.data[:V] = old
    net.head.weight = net.embed.weight


class ResizedLate(Right):
    def on_train_start(self):
        resize(self.net)


class ResizedEarly(Right):
    def configure_optimizers(self):
        resize(self.net)
        return super().configure_optimizers()


class NotZeroed(Right):
    def optimizer_zero_grad(self, *_): ...
    def zero(self): ...


class ClippedScaled(Right):
    def on_after_backward(self):
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class ClippedScaledByValue(Right):
    def on_after_backward(self):
        nn.utils.clip_grad_value_(self.parameters(), 0.1)


class ClippedUnscaled(Right):
    def on_before_optimizer_step(self, optimizer):
        nn.utils.clip_grad_norm_(self.parameters(), 0.1)


class DividedByCount(Right):
    """Right: gradients divided by a count that changes, before they are unscaled."""

    def on_after_backward(self):
        for p in self.parameters():
            p.grad /= 7 + self.global_step


class Accumulated(Right):
    n = 2


class DividedTwice(Accumulated):
    def scaled(self, loss):
        return loss / 2


class WeighedLoss(Accumulated):
    """Right: the loss is one of two terms, each of weight 1/2."""

    def scaled(self, loss):
        return 0.5 * loss + 0.5 * self.net.head.weight.pow(2).mean()


class PadInMean(Accumulated):
    """Divided by all slots, of which half count: another fault, not this one."""

    def loss(self, ids):
        logits, labels = self.net(ids)[:, :-1].transpose(1, 2), ids[:, 1:].clone()
        labels[:, (T - 1) // 2 :] = -100
        return F.cross_entropy(logits, labels, reduction="sum") / ids.numel()


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


class SmoothedLoss(MeanAtTheEnd):
    """Right: the loss has a term that the perplexity leaves out."""

    def perplexity(self, losses):
        return (losses.mean() - 0.1).exp()


class DecayOnAll(Right):
    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class NeverSteps(Right):
    def finish(self, i): ...


class Adversaries(Right):
    """Right: the gradients that the first loss leaves in the second network are zeroed in time."""

    def make(self):
        self.other = nn.Sequential(nn.Linear(V, 4), nn.Linear(4, 1))
        return Net()

    def training_step(self, ids, i):
        first, second = self.optimizers()
        first.zero_grad()
        self.manual_backward(-self.other(self.net(ids)).mean())
        first.step()
        if i % 2 == 0:
            self.zero_second(second)
            self.manual_backward(self.other(self.net(ids).detach()).mean())
            second.step()

    def zero_second(self, optimizer):
        optimizer.zero_grad()

    def configure_optimizers(self):
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net, self.other)]


class NotZeroedAdversaries(Adversaries):
    def zero_second(self, optimizer): ...


class Checkpointed(Net):
    """Right."""

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(self.norm(x))


class DetachedByCheckpoint(Net):
    """A reentrant checkpoint whose input takes no gradient gives none to its weights."""

    def forward(self, ids):
        x = checkpoint(lambda i: self.blocks[0](self.embed(i)), ids, use_reentrant=True)
        return self.head(self.norm(x + self.blocks[1](x)))


class RightlyCheckpointed(Right):
    def make(self):
        return Checkpointed()


class WronglyCheckpointed(Right):
    def make(self):
        return DetachedByCheckpoint()
