"""A loss or a gradient that is not finite: where it began, and whether the run goes on."""

import logging
import re
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from causal_lm.data.collate import Batch
from causal_lm.data.sampler import DocumentSampler
from causal_preflight.nested_outputs import iter_float_tensors

log = logging.getLogger(__name__)


class Guard:
    """Leaves such a step out, so many times in a row; the next one stops the run.

    Args:
        on_nonfinite: ``stop`` at the first, or ``skip``.
        max_skipped: how many in a row, with ``skip`` or where float16's loss scaler skips.
    """

    def __init__(self, on_nonfinite: str = "stop", max_skipped: int = 10) -> None:
        self.skip, self.max_skipped = on_nonfinite == "skip", max_skipped
        self.skipped = self.in_a_row = 0

    def refuse(self, step: int, finding: str, scaled: bool = False) -> None:
        """Count and log a step that is skipped; ``scaled``: by a loss scaler, whose trade it is.

        Raises:
            FloatingPointError: there were too many.
        """
        limit = self.max_skipped if self.skip or scaled else 0
        if self.in_a_row >= limit:
            after = f", after gradients.max_skipped={limit} skipped steps in a row" if limit else ""
            raise FloatingPointError(
                f"{finding} is not finite at step {step}{after}: lower optimizer.lr, look at the "
                f"batch{'' if limit else ', or set gradients.on_nonfinite=skip'}; the weights are "
                f"those before this step, and the checkpoints are kept"
            )
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        log.warning(
            f"step {step} is skipped, the {self.in_a_row}. in a row: {finding} is not finite"
        )

    def accept(self) -> None:
        """A step is taken: what was skipped before is no longer in a row with what comes."""
        self.in_a_row = 0


class MicroBatch(NamedTuple):
    """A micro-batch of the optimizer step in hand, its number in the epoch, and what it adds to the
    step's loss: (2,) float32, the sum in nats and the denominator."""

    number: int
    batch: Batch
    sums: Tensor


def explain(module: Any, seen: Sequence[MicroBatch]) -> str:
    """What is not finite, and where it began: batch, rows and layer. The same on every rank.

    Args:
        module: a LightningModule with ``loss_terms(batch)``, after its backward pass and before
            anything has been clipped.
        seen: the micro-batches of this step, on this rank.
    """
    ranks = module.trainer.world_size
    lost = next((part for part in seen if not part.sums.isfinite().all()), None)
    own: Any = (_of_loss(module, lost) if lost else None), affected(module)
    every = [own]
    if ranks > 1:  # each has batches of its own, and may have parameters of its own
        every = [None] * ranks
        torch.distributed.all_gather_object(every, own)
    for rank, (finding, _) in enumerate(every):
        if finding:
            return finding + (f" of rank {rank}" if ranks > 1 else "")
    # The loss was finite. A backward pass starts at the last layer.
    layers = max((layers for _, layers in every), key=len)
    numbers = ", ".join(_named(module.trainer, part) for part in seen)
    where = f"first in {layers[-1]}, {len(layers)} layers in all" if layers else "in its norm"
    return f"the gradient of batch {numbers} ({where})"


def _of_loss(module: Any, part: MicroBatch) -> str:
    trainer, where = module.trainer, ""
    if trainer.world_size == 1 or type(trainer.strategy) is DDPStrategy:
        with torch.no_grad(), trainer.precision_plugin.train_step_context():
            layer = first_layer(module, lambda: module.loss_terms(part.batch))
        where = f" (first in {layer})" if layer else " (in no layer's output)"
    # else: parameters are spread over the ranks, and those without a fault would not join in
    return f"the loss{where} of batch {_named(trainer, part)}"


def _named(trainer: Any, part: MicroBatch) -> str:
    known = ", ".join(map(str, rows(trainer, part.number)))
    return f"{part.number}" + (f" with rows {known}" if known else "")


def first_layer(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """The first module to finish with an output that is not finite, while ``forward`` runs."""
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not all(
                torch.isfinite(x).all() for _, x in iter_float_tensors(output)
            ):
                found.append(name)

        return look

    handles = [m.register_forward_hook(watch(name)) for name, m in model.named_modules() if name]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


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


def rows(trainer: Any, number: int) -> list[int]:
    """Which rows of the training set this rank's batch of that number in the epoch holds, if that
    is known: whole documents, or windows of those that were cut."""
    loader, loop = trainer.train_dataloader, trainer.fit_loop
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DocumentSampler):
        return []
    done = loop.total_batch_idx - loop.batch_idx + number
    return [i for i in islice(sampler.rest(done), loader.batch_size) if i >= 0]
