"""A loss or a gradient that is not finite: where it began, and whether the run goes on."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from causal_lm.data.collate import Batch

log = logging.getLogger(__name__)


class Guard:
    """Stops a run at such a step, or leaves the step out.

    Args:
        on_nonfinite: ``stop`` or ``skip``.
        max_skipped: so many skipped steps in a row, and the next one stops the run.
    """

    def __init__(self, on_nonfinite: str = "stop", max_skipped: int = 10) -> None:
        self.skip, self.max_skipped = on_nonfinite == "skip", max_skipped
        self.skipped = self.in_a_row = 0

    def refuse(self, step: int, finding: str) -> None:
        """Count and log a step that is to be skipped.

        Raises:
            FloatingPointError: it is to stop the run.
        """
        kept = "the weights are those before this step, and the checkpoints are kept"
        if not self.skip:
            raise FloatingPointError(
                f"{finding} is not finite at step {step}: lower optimizer.lr, look at the batch, "
                f"or set gradients.on_nonfinite=skip; {kept}"
            )
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        if self.in_a_row > self.max_skipped:
            raise FloatingPointError(
                f"{finding} is not finite at step {step}, after gradients.max_skipped="
                f"{self.max_skipped} skipped steps in a row: lower optimizer.lr; {kept}"
            )
        log.warning(
            f"step {step} is skipped, the {self.in_a_row}. in a row: {finding} is not finite"
        )

    def accept(self) -> None:
        """A step is taken: what was skipped before is no longer in a row with what comes."""
        self.in_a_row = 0


class Seen(NamedTuple):
    """A micro-batch of the optimizer step in hand, its number in the epoch, its summed loss."""

    number: int
    batch: Batch
    nats: Tensor


def explain(module: Any, seen: Sequence[Seen]) -> str:
    """What is not finite, and where it began: batch, documents and layer. The same on every rank.

    Args:
        module: a LightningModule with ``loss_terms(batch)``, after its backward pass and before
            anything has been clipped.
        seen: the micro-batches of this step, on this rank.
    """
    trainer = module.trainer
    own = next((_of_loss(module, part) for part in seen if not torch.isfinite(part.nats)), None)
    every = [own]
    if trainer.world_size > 1:  # each has batches of its own
        every = [None] * trainer.world_size
        torch.distributed.all_gather_object(every, own)
    for rank, finding in enumerate(every):
        if finding:
            return finding + (f" of rank {rank}" if len(every) > 1 else "")
    # The loss was finite. A backward pass starts at the last layer.
    layers = affected(module)
    numbers = ", ".join(str(part.number) for part in seen)
    where = f"first in {layers[-1]}, {len(layers)} layers in all" if layers else "in its norm"
    return f"the gradient of batch {numbers} ({where})"


def _of_loss(module: Any, part: Seen) -> str:
    with torch.no_grad(), module.trainer.precision_plugin.train_step_context():
        layer = first_layer(module, lambda: module.loss_terms(part.batch))
    rows = ", ".join(map(str, documents(module.trainer, part.number)))
    where = f"first in {layer}" if layer else "in no layer's output"
    return f"the loss ({where}) of batch {part.number}" + (
        f" with documents {rows}" if rows else ""
    )


def first_layer(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The first module to finish with an output that is not finite, while ``forward`` runs."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(torch.isfinite(x).all() for x in _tensors(output)):
                found.append(name)

        return look

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def layer_of(name: str) -> str:
    """The numbered block that a parameter is in, or else the module.

    >>> layer_of("model.blocks.layers.3.linear1.weight"), layer_of("model.head.weight")
    ('model.blocks.layers.3', 'model.head')
    """
    block = re.match(r".*?\.\d+(?=\.)", name)
    return block[0] if block else name.rpartition(".")[0]


def affected(model: nn.Module) -> list[str]:
    """Layers with a gradient that is not finite, in the order in which the model lists them."""
    names = [
        layer_of(name)
        for name, p in model.named_parameters()
        if p.grad is not None and not torch.isfinite(p.grad).all()
    ]
    return list(dict.fromkeys(names))


def documents(trainer: Any, number: int) -> list[int]:
    """Which rows of the training set this rank's batch of that number holds, if that is known."""
    loader = trainer.train_dataloader
    sampler, size = getattr(loader, "sampler", None), getattr(loader, "batch_size", None)
    return list(islice(sampler, number * size, (number + 1) * size)) if sampler and size else []
