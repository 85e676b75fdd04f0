"""Optimizer factories: parameter groups and options in, an optimizer out. Any class of
``torch.optim`` is one too (``_partial_: true``); those here add ``lr=auto`` and ``muon``.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.optim import Optimizer, _muon

from causal_lm.optim.parameter_groups import ParameterGroups
from causal_lm.precision import has_instructions

log = logging.getLogger(__name__)


def peak_lr(lr: float | str, groups: ParameterGroups) -> float:
    """``lr`` as a number: ``auto`` is 6e-3 / sqrt(width of the embedding), 2.2e-4 at width 768.
    Raises ValueError for ``auto`` where neither an embedding nor a head is trained."""
    if lr != "auto":
        return float(lr)
    weights = {group["role"]: group["params"][0][1] for group in groups}
    weight = weights.get("embedding", weights.get("head"))
    if weight is None:
        problem = "this model trains neither an embedding nor a head, whose width it depends on"
        raise ValueError(f"optimizer.lr=auto: {problem}; set optimizer.lr to a number")
    width = weight.shape[-1]
    auto_lr = 6e-3 * width**-0.5
    log.info(f"optimizer.lr=auto: 6e-3 / sqrt({width}) = {auto_lr:.2g}")
    return auto_lr


def _with_auto_lr(
    optimizer_class: Any, groups: ParameterGroups, *, lr: float | str, **options: Any
) -> Optimizer:
    return optimizer_class(groups, lr=peak_lr(lr, groups), **options)


adamw = partial(_with_auto_lr, torch.optim.AdamW)
adam = partial(_with_auto_lr, torch.optim.Adam)
sgd = partial(_with_auto_lr, torch.optim.SGD)


def orthogonalize(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """(M, N) -> float32 (M, N) with the singular vectors of ``matrix`` and singular values near 1,
    by the Newton-Schulz iterations of Muon, which torch computes in bfloat16."""
    a, b, c = coefficients
    is_tall = matrix.shape[0] > matrix.shape[1]
    x = (matrix.mT if is_tall else matrix).float()
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if is_tall else x


class Muon(torch.optim.Muon):
    """torch's; in float32 on a CPU that emulates bfloat16, where that takes a tenth of the time."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        is_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        if not is_cpu or has_instructions(torch.bfloat16, "cpu"):
            return super().step(closure)
        with patch.object(_muon, "_zeropower_via_newtonschulz", orthogonalize):
            return super().step(closure)


class CombinedOptimizer(Optimizer):
    """Several optimizers over disjoint parameters, used as one: it shares its groups and state with
    them, so that a schedule, a gradient scaler and a checkpoint see one optimizer."""

    def __init__(self, *optimizers: Optimizer) -> None:
        self.optimizers = optimizers
        super().__init__([group for part in optimizers for group in part.param_groups], {})
        self._share_state()

    def _share_state(self) -> None:
        start = 0
        for part in self.optimizers:
            stop = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:stop], self.state
            start = stop

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Evaluate ``closure`` once, then take one step with each optimizer."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self.optimizers:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # replaces the groups and the state
        self._share_state()


def muon(
    groups: ParameterGroups, *, muon_lr: float, muon_momentum: float, lr: float | str,
    weight_decay: float, **adamw_options: Any,
) -> CombinedOptimizer:  # fmt: skip
    """Muon (https://kellerjordan.github.io/posts/muon/) for hidden matrices, AdamW for the rest.
    Raises ValueError where the model has no hidden matrix."""
    matrices = [group for group in groups if group["role"] == "hidden_matrix"]
    rest = [group for group in groups if group["role"] != "hidden_matrix"]
    if not matrices:
        raise ValueError("this model has no hidden matrix for Muon: choose optimizer=adamw")
    decay: dict[str, Any] = {"weight_decay": weight_decay}
    first = Muon(matrices, lr=muon_lr, momentum=muon_momentum, **decay)
    if not rest:
        return CombinedOptimizer(first)
    second = torch.optim.AdamW(rest, lr=peak_lr(lr, groups), **decay, **adamw_options)
    return CombinedOptimizer(first, second)
