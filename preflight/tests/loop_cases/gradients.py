"""Loops with one fault in optimizer or gradients each, and right twins."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from loop_cases.base import C, Net, Right, T, V


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


class CalledLate(Right):
    """Right: a tower for images, of which the first batches have none."""

    def make(self):
        net = Net()
        net.tower = nn.Linear(C, C)
        net.norm = CallsLate(net.norm, net.tower)
        return net


class CallsLate(nn.Module):
    def __init__(self, norm: nn.Module, tower: nn.Module) -> None:
        super().__init__()
        self.norm, self.tower, self.calls = norm, tower, 0

    def forward(self, x):
        self.calls += 1
        return self.norm(x + self.tower(x) if self.calls > 4 else x)


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


class OwnBackward(Right):
    """Right, but `manual_backward` is not called, so that Lightning tells callbacks nothing."""

    def training_step(self, ids, i):
        self.loss(ids).backward()
        self.finish(i)


class ResizedInTheLoop(Right):
    def on_train_batch_start(self, ids, i):
        if i == 0:
            resize(self.net)
