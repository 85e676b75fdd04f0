"""What one optimizer step sums over micro-batches and ranks, and divides once.

Lightning averages over micro-batches and DDP over ranks, however few targets each holds. Here each
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
    """Collects the micro-batches of one optimizer step on this rank, and sums over all ranks."""

    def __init__(self) -> None:
        self.micro_batches: list[MicroBatch] = []
        self.random_state: dict[str, Tensor] = {}  # before the first micro-batch

    def start(self, device: torch.device) -> None:
        """Call before the forward pass of each micro-batch."""
        if not self.micro_batches:
            self.random_state = get_random_state(device)

    def add(self, batch_idx: int, batch: Batch, nats: Tensor, denominator: Tensor) -> None:
        """Record a micro-batch. Its sums stay on the device until the step is complete."""
        sums = torch.stack([nats.detach().float(), denominator.float()])
        self.micro_batches.append(MicroBatch(batch_idx, batch, sums))

    def reduce(self, strategy: Any) -> tuple[float, float]:
        """Sums of the step over all ranks: nats (may be NaN), denominator. Synchronizes."""
        local_sums: Any = sum(micro_batch.sums for micro_batch in self.micro_batches)
        return tuple(strategy.reduce(local_sums, reduce_op="sum").tolist())

    def clear(self) -> list[MicroBatch]:
        """Forget the micro-batches of a completed step, and return them."""
        finished, self.micro_batches = self.micro_batches, []
        return finished

    def random_state_to_resume(self, device: torch.device) -> dict[str, Tensor]:
        """The current random state, or that before the unfinished step."""
        return self.random_state if self.micro_batches else get_random_state(device)


def divide_gradients(
    parameters: Iterable[torch.nn.Parameter], denominator: float, world_size: int, scale: float
) -> None:
    """Turn gradients of ``scale * sum`` into gradients of ``sum / denominator``, in place. (DDP has
    divided them by ``world_size``.)"""
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
