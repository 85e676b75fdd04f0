"""Non-finite losses and gradients: name the batch and layer, then skip the step or stop."""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from causal_lm.accumulation import MicroBatch
from causal_lm.data.sampler import DocumentSampler

log = logging.getLogger(__name__)


class NonFiniteGuard:
    """Counts non-finite optimizer steps, and raises when too many follow each other.

    The limit is ``max_skipped`` with ``on_nonfinite="skip"``, and always for steps that float16's
    loss scaler skips as a matter of course. With ``stop`` it is 0 for all others.
    """

    def __init__(self, on_nonfinite: str = "stop", max_skipped: int = 10) -> None:
        self.skip, self.max_skipped = on_nonfinite == "skip", max_skipped
        self.skipped = self.in_a_row = 0

    def record_skipped_step(self, step: int, cause: str, by_scaler: bool = False) -> None:
        """Count and log a skipped step; ``cause`` is that of :func:`describe_nonfinite`. Raises
        FloatingPointError for more than the limit in a row."""
        limit = self.max_skipped if self.skip or by_scaler else 0
        if self.in_a_row >= limit:
            after = f", after gradients.max_skipped={limit} skipped steps in a row" if limit else ""
            todo = f"check the batch{'' if limit else ', or set gradients.on_nonfinite=skip'}"
            kept = "weights and checkpoints are those from before this step"
            problem = f"{cause} is not finite at step {step}{after}"
            raise FloatingPointError(f"{problem}: lower optimizer.lr, {todo}; {kept}")
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        log.warning(f"step {step} is skipped ({self.in_a_row} in a row): {cause} is not finite")


def describe_nonfinite(module: Any, micro_batches: Sequence[MicroBatch]) -> str:
    """Name what is not finite and where it began (batch, layer); the same text on every rank. To be
    called after the backward pass, with this rank's micro-batches of the step."""
    world_size = module.trainer.world_size
    nonfinite_batch = next((m for m in micro_batches if not m.sums.isfinite().all()), None)
    loss = _describe_loss(module, nonfinite_batch) if nonfinite_batch else None
    results: list[Any] = [(loss, nonfinite_layers(module))] * world_size
    if world_size > 1:  # each rank has batches of its own, and may have parameters of its own
        torch.distributed.all_gather_object(results, results[0])
    for rank, (loss, _) in enumerate(results):
        if loss:
            return loss + (f" of rank {rank}" if world_size > 1 else "")
    # The loss is finite, so a gradient is not; backward runs from the last layer to the first.
    layers = max((layers for _, layers in results), key=len)
    batches = ", ".join(_name_batch(module.trainer, m) for m in micro_batches)
    where = f"first in {layers[-1]}; layers affected: {len(layers)}" if layers else "only its norm"
    return f"the gradient of batch {batches} ({where})"


def _describe_loss(module: Any, micro_batch: MicroBatch) -> str:
    trainer, where = module.trainer, ""
    # Sharded forward passes are collective, and the other ranks would not take part.
    if trainer.world_size == 1 or type(trainer.strategy) is DDPStrategy:
        with torch.no_grad(), trainer.precision_plugin.train_step_context():
            layer = first_nonfinite_layer(module, lambda: module.loss_terms(micro_batch.batch))
        where = f" (first in {layer})" if layer else " (every layer's output is finite)"
    return f"the loss{where} of batch {_name_batch(trainer, micro_batch)}"


def _name_batch(trainer: Any, micro_batch: MicroBatch) -> str:
    indices = ", ".join(map(str, dataset_indices(trainer, micro_batch.batch_idx)))
    return f"{micro_batch.batch_idx}" + (f" with data-set indices {indices}" if indices else "")


def first_nonfinite_layer(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Name of the first submodule that returns a non-finite output while ``forward`` runs."""
    found: list[str] = []

    def check(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        parts = [output]
        for part in parts:  # the list grows while it is read: nested outputs are reached too
            if isinstance(part, Mapping | list | tuple):
                parts += part.values() if isinstance(part, Mapping) else part
        if not all(part.isfinite().all() for part in parts if isinstance(part, Tensor)):
            found.append(name)

    modules = [(name, module) for name, module in model.named_modules() if name]
    handles = [module.register_forward_hook(partial(check, name)) for name, module in modules]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def layer_of(name: str) -> str:
    """The outermost numbered block that a parameter belongs to, or else its module.

    >>> layer_of("model.blocks.layers.3.linear1.weight"), layer_of("model.lm_head.weight")
    ('model.blocks.layers.3', 'model.lm_head')
    """
    block = re.match(r".*?\.\d+(?=\.)", name)
    return block[0] if block else name.rpartition(".")[0]


def nonfinite_layers(model: nn.Module) -> list[str]:
    """Layers with a non-finite gradient, in the model's own order."""
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return list(dict.fromkeys(layer_of(name) for name, g in gradients if not g.isfinite().all()))


def dataset_indices(trainer: Any, batch_idx: int) -> list[int]:
    """Indices in the training set of the windows in this rank's batch ``batch_idx`` of the epoch;
    empty if the sampler is not a ``DocumentSampler``."""
    loader, loop = trainer.train_dataloader, trainer.fit_loop
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DocumentSampler):
        return []
    done = loop.total_batch_idx - loop.batch_idx + batch_idx
    return [i for i in islice(sampler.remaining_indices(done), loader.batch_size) if i >= 0]
