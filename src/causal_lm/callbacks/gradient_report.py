"""Which layers learn: the size of each one's gradient, and of its step beside its weights."""

import logging
from collections import defaultdict
from typing import Any

import lightning as L
import torch
from torch import Tensor

from causal_lm.nonfinite import layer_of

log = logging.getLogger(__name__)

SHOWN = 3
"""Layers at the bottom and at the top that are shown when training ends."""

STARVED = 0.1
"""Share of the highest block's gradient below which the lowest block is warned about."""


class GradientReport(L.Callback):
    """Logs ``gradient/LAYER`` and ``update/LAYER`` every so many optimizer steps.

    The first is the mean absolute gradient, as the optimizer sees it: divided and clipped. The
    second is the norm of the step over the norm of the weights, about 1e-3 where training is
    healthy. The weights are copied before each step that is looked at, and no other.

    Args:
        every: optimizer steps between looks; the first step is one.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.before: list[Tensor] | None = None
        self.figures: dict[str, tuple[float, float]] = {}
        self.warned = False

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any
    ) -> None:
        self.step = trainer.global_step
        if self.step % self.every == 0 and self.before is None:
            self.before = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.before is None or trainer.global_step == self.step:
            return  # nothing to look at, or the step needs more micro-batches
        figures, self.before = layer_figures(pl_module, self.before), None
        if not figures:
            return  # a skipped step
        self.figures = figures
        for layer, (gradient, update) in figures.items():
            pl_module.log(f"gradient/{layer}", gradient)
            pl_module.log(f"update/{layer}", update)
        self.warn(trainer)

    def warn(self, trainer: L.Trainer) -> None:
        """Once, where the lowest block gets a small share of the highest one's gradient."""
        blocks = [layer for layer in self.figures if layer.rpartition(".")[2].isdecimal()]
        if self.warned or len(blocks) < 2:
            return
        low, high = (self.figures[block][0] for block in (blocks[0], blocks[-1]))
        if low < STARVED * high:
            self.warned = True
            log.warning(
                f"step {trainer.global_step}: the gradient of {blocks[0]} is {low:.1e}, less than "
                f"a tenth of {high:.1e} in {blocks[-1]}: the lowest blocks hardly learn"
            )

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.figures and trainer.is_global_zero:
            log.info(self.table())

    def table(self) -> str:
        """The last look, a line for each of the lowest and the highest layers."""
        rows = [f"{g:8.1e}  {u:8.1e}  {layer}" for layer, (g, u) in self.figures.items()]
        if len(rows) > 2 * SHOWN + 1:
            rows[SHOWN:-SHOWN] = [f"{'':20}… {len(rows) - 2 * SHOWN} more in metrics.csv"]
        return "\n".join(["gradient  update/weight, by layer", *rows])


def layer_figures(module: torch.nn.Module, before: list[Tensor]) -> dict[str, tuple[float, float]]:
    """Layer -> (mean absolute gradient, norm of update over norm of weights before it).

    Args:
        before: the parameters as they were before the step, in the module's order.
    """
    layers, kept = [], []
    for (name, parameter), old in zip(module.named_parameters(), before, strict=True):
        if parameter.grad is not None:
            layers.append((layer_of(name), parameter.numel()))
            kept.append((parameter.detach(), parameter.grad, old))
    if not kept:
        return {}
    weights, gradients, olds = (list(part) for part in zip(*kept, strict=True))
    moved = torch._foreach_sub(weights, olds)
    norms = (*torch._foreach_norm(gradients, 1), *torch._foreach_norm(moved),
             *torch._foreach_norm(olds))  # fmt: skip
    table = torch.stack([n.float() for n in norms]).view(3, -1).T.tolist()  # one wait for a device
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for (layer, count), (absolute, update, weight) in zip(layers, table, strict=True):
        for i, value in enumerate((absolute, count, update**2, weight**2)):
            sums[layer][i] += value
    return {
        layer: (absolute / count, (update / weight) ** 0.5 if weight else 0.0)
        for layer, (absolute, count, update, weight) in sums.items()
    }
