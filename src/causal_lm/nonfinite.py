"""Non-finite losses and gradients: which batch and layer they began in, and whether to go on."""

import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from causal_lm.accumulation import MicroBatch
from causal_lm.data.sampler import DocumentSampler

log = logging.getLogger(__name__)


class NonFiniteGuard:
    """Skips a limited number of non-finite optimizer steps in a row, then stops the run.

    The limit is ``max_skipped`` with ``on_nonfinite="skip"``, and always for steps that float16's
    loss scaler skips as a matter of course. With ``stop`` it is 0 for all others.
    """

    def __init__(self, on_nonfinite: str = "stop", max_skipped: int = 10) -> None:
        self.skip, self.max_skipped = on_nonfinite == "skip", max_skipped
        self.skipped = self.in_a_row = 0

    def skip_step(self, step: int, finding: str, by_scaler: bool = False) -> None:
        """Count and log a skipped step; ``finding`` is what :func:`describe_nonfinite` returned.

        Raises:
            FloatingPointError: more than the limit in a row.
        """
        limit = self.max_skipped if self.skip or by_scaler else 0
        if self.in_a_row >= limit:
            after = f", after gradients.max_skipped={limit} skipped steps in a row" if limit else ""
            raise FloatingPointError(
                f"{finding} is not finite at step {step}{after}: lower optimizer.lr, check the "
                f"batch{'' if limit else ', or set gradients.on_nonfinite=skip'}; the weights are "
                f"those before this step, and the checkpoints are kept"
            )
        self.skipped, self.in_a_row = self.skipped + 1, self.in_a_row + 1
        log.warning(f"step {step} is skipped ({self.in_a_row} in a row): {finding} is not finite")

    def accept_step(self) -> None:
        """Reset the count of skipped steps in a row."""
        self.in_a_row = 0


def describe_nonfinite(module: Any, micro_batches: Sequence[MicroBatch]) -> str:
    """Name what is not finite and where it began (batch, rows, layer); the same on every rank.

    To be called after the backward pass, with this rank's micro-batches of the step.
    """
    ranks = module.trainer.world_size
    lost = next((part for part in micro_batches if not part.sums.isfinite().all()), None)
    own: Any = (_describe_loss(module, lost) if lost else None), nonfinite_layers(module)
    by_rank: list[Any] = [own] * ranks
    if ranks > 1:  # each rank has batches of its own, and may have parameters of its own
        torch.distributed.all_gather_object(by_rank, own)
    for rank, (finding, _) in enumerate(by_rank):
        if finding:
            return finding + (f" of rank {rank}" if ranks > 1 else "")
    # The loss was finite, so the backward pass broke it; that starts at the last layer.
    layers = max((layers for _, layers in by_rank), key=len)
    batches = ", ".join(_name_batch(module.trainer, part) for part in micro_batches)
    where = f"first in {layers[-1]}, {len(layers)} layers in all" if layers else "in its norm"
    return f"the gradient of batch {batches} ({where})"


def _describe_loss(module: Any, part: MicroBatch) -> str:
    trainer, where = module.trainer, ""
    # Under sharded strategies a forward pass is collective, and ranks without a fault do not join.
    if trainer.world_size == 1 or type(trainer.strategy) is DDPStrategy:
        with torch.no_grad(), trainer.precision_plugin.train_step_context():
            layer = first_nonfinite_layer(module, lambda: module.loss_terms(part.batch))
        where = f" (first in {layer})" if layer else " (in no layer's output)"
    return f"the loss{where} of batch {_name_batch(trainer, part)}"


def _name_batch(trainer: Any, part: MicroBatch) -> str:
    indices = ", ".join(map(str, dataset_indices(trainer, part.batch_idx)))
    return f"{part.batch_idx}" + (f" with rows {indices}" if indices else "")


def first_nonfinite_layer(model: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Name of the first submodule that returns a non-finite output while ``forward`` runs."""
    found: list[str] = []

    def check(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        tensors = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if not found and not all(x.isfinite().all() for x in tensors):
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
    """The numbered block that a parameter belongs to, or else its module.

    >>> layer_of("model.blocks.layers.3.linear1.weight"), layer_of("model.lm_head.weight")
    ('model.blocks.layers.3', 'model.lm_head')
    """
    block = re.match(r".*?\.\d+(?=\.)", name)
    return block[0] if block else name.rpartition(".")[0]


def nonfinite_layers(model: nn.Module) -> list[str]:
    """Layers with a non-finite gradient, in the model's own order."""
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    return list(dict.fromkeys(layer_of(name) for name, g in gradients if not g.isfinite().all()))


def dataset_indices(trainer: Any, batch_index: int) -> list[int]:
    """Indices in the training set of this rank's batch with that index in the epoch.

    They are of whole documents, or of windows of long ones; empty where the sampler is not ours.
    """
    loader, loop = trainer.train_dataloader, trainer.fit_loop
    sampler = getattr(loader, "sampler", None)
    if not isinstance(sampler, DocumentSampler):
        return []
    done = loop.total_batch_idx - loop.batch_idx + batch_index
    return [i for i in islice(sampler.remaining_indices(done), loader.batch_size) if i >= 0]
