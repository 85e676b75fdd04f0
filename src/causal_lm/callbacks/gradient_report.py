"""Logs the gradient and the relative update of each layer."""

import logging
from collections import defaultdict
from typing import Any

import lightning as L
import torch
from torch import Tensor

from causal_lm.nonfinite import layer_of
from causal_lm.sharding import whole

log = logging.getLogger(__name__)

VANISHING_BELOW = 0.1  # warn if the lowest block's gradient is below this fraction of the highest's


class GradientReport(L.Callback):
    """Logs ``gradient/LAYER`` and ``update/LAYER`` every few optimizer steps, from the first on.

    ``gradient`` is the mean absolute gradient as the optimizer sees it, divided and clipped.
    ``update`` is the norm of the step over the norm of the weights, about 1e-3 in healthy training.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self.weights_before: list[Tensor] | None = None
        self.warned = False

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.step = trainer.global_step
        if self.step % self.every == 0 and self.weights_before is None:
            self.weights_before = [p.detach().clone() for p in pl_module.parameters()]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if self.weights_before is None or trainer.global_step == self.step:
            return  # no report is due, or the optimizer step needs more micro-batches
        figures = layer_figures(pl_module, self.weights_before)  # empty: the step was skipped
        self.weights_before = None
        for layer, (gradient, update) in figures.items():
            pl_module.log_dict({f"gradient/{layer}": gradient, f"update/{layer}": update})
        blocks = [layer for layer in figures if layer.rpartition(".")[2].isdecimal()]
        if self.warned or not blocks:
            return
        low, high = figures[blocks[0]][0], figures[blocks[-1]][0]
        if low < VANISHING_BELOW * high:
            self.warned = True
            lowest = f"step {trainer.global_step}: the gradient of {blocks[0]} is {low:.1e}"
            highest = f"{VANISHING_BELOW:.0%} of {high:.1e} in {blocks[-1]}"
            log.warning(f"{lowest}, less than {highest}: gradients vanish downward")


def layer_figures(
    module: torch.nn.Module, weights_before: list[Tensor]
) -> dict[str, tuple[float, float]]:
    """Layer -> (mean absolute gradient, norm of update / norm of the weights before it)."""
    found = [
        (name, parameter.detach(), parameter.grad, before)
        for (name, parameter), before in zip(module.named_parameters(), weights_before, strict=True)
        if parameter.grad is not None
    ]
    if not found:
        return {}
    names, weights, gradients, befores = map(list, zip(*found, strict=True))
    norms = (*torch._foreach_norm(gradients, 1), *torch._foreach_norm(befores),
             *torch._foreach_norm(torch._foreach_sub(weights, befores)))  # fmt: skip
    table = torch.stack([whole(n).float() for n in norms]).view(3, -1).T.tolist()  # synchronizes
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0, 0.0])
    for name, parameter, (absolute, weight, update) in zip(names, weights, table, strict=True):
        for i, value in enumerate((absolute, parameter.numel(), update**2, weight**2)):
            sums[layer_of(name)][i] += value
    return {
        layer: (absolute / count, (update / weight) ** 0.5 if weight else 0.0)
        for layer, (absolute, count, update, weight) in sums.items()
    }
