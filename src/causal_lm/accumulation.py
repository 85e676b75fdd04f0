"""What one optimizer step sums over micro-batches and ranks, and divides once.

Lightning averages over micro-batches and DDP over ranks, whatever number of targets each holds. A
mean loss per micro-batch would therefore weigh a token by the batch that it came in. Here each
micro-batch contributes its *sum* of weighted token losses, and the gradients are divided once,
before clipping, by the denominator of the whole step.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from causal_lm.data.collate import Batch


class MicroBatch(NamedTuple):
    """A micro-batch of the optimizer step in progress."""

    batch_idx: int  # within the epoch
    batch: Batch  # kept so that a report can name what was not finite
    sums: Tensor  # (2,) float32: the sum of weighted losses in nats, and the denominator


class StepAccumulator:
    """Collects the micro-batches of one optimizer step on this rank."""

    def __init__(self) -> None:
        self.micro_batches: list[MicroBatch] = []
        self.random_state: dict[str, Tensor] = {}
        """Of the generators that dropout draws from, before the first micro-batch."""

    def start(self, device: torch.device) -> None:
        """Call before the forward pass of each micro-batch."""
        if not self.micro_batches:
            self.random_state = get_random_state(device)

    def add(self, batch_idx: int, batch: Batch, nats: Tensor, denominator: Tensor) -> None:
        """Record a micro-batch. Its sums stay on the device until the step is complete."""
        sums = torch.stack([nats.detach().float(), denominator.float()])
        self.micro_batches.append(MicroBatch(batch_idx, batch, sums))

    def sums(self, strategy: Any) -> tuple[float, float]:
        """Nats (may be NaN) and denominator of the step, over all ranks; waits for the device."""
        own: Any = sum(part.sums for part in self.micro_batches)
        return tuple(strategy.reduce(own, reduce_op="sum").tolist())

    def clear(self) -> list[MicroBatch]:
        """Forget the micro-batches of a completed step, and return them."""
        done, self.micro_batches = self.micro_batches, []
        return done

    def resume_state(self, device: torch.device) -> dict[str, Tensor]:
        """The random state to resume from: that of the last optimizer step."""
        return self.random_state if self.micro_batches else get_random_state(device)


def divide_gradients(
    parameters: Iterable[torch.nn.Parameter], denominator: float, world_size: int, scale: float
) -> None:
    """Turn gradients of ``scale * sum`` into gradients of ``sum / denominator``, in place.

    DDP has averaged them over the ranks; times ``world_size`` they are the sum.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    torch._foreach_mul_(gradients, world_size / (denominator * scale))


def get_random_state(device: torch.device) -> dict[str, Tensor]:
    """State of the generators that dropout on ``device`` draws from."""
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore what :func:`get_random_state` returned; empty: leave the generators as they are."""
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
