"""Optimizers: which parameters decay, which Muon takes, and the rule for the peak rate."""

import logging
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

log = logging.getLogger(__name__)

Named = tuple[str, nn.Parameter]

EMBEDDING = re.compile(r"(^|\.)(tokens|positions|wte|wpe|\w*emb(ed\w*)?)(\.|$)")
"""What tables of tokens and positions are called here, in transformers and in x-transformers."""

HEAD = re.compile(r"(^|\.)(head|lm_head|output|to_logits)\.weight$")
"""What the map to logits is called. A tied one bears the name of the embedding."""


def is_hidden_matrix(named: Named) -> bool:
    """A matrix between the embedding and the head, which is what Muon is for."""
    name, parameter = named
    return parameter.dim() == 2 and not EMBEDDING.search(name) and not HEAD.search(name)


def decays(named: Named) -> bool:
    """A weight that multiplies; norms, biases and embeddings are not drawn towards zero."""
    name, parameter = named
    return parameter.dim() >= 2 and not EMBEDDING.search(name)


def groups(parameters: Iterable[Named], weight_decay: float) -> list[dict[str, Any]]:
    """Every trainable parameter in one of two groups, with weight decay and without."""
    trained = [named for named in parameters if named[1].requires_grad]
    parted = (
        {"params": [n for n in trained if decays(n)], "weight_decay": weight_decay},
        {"params": [n for n in trained if not decays(n)], "weight_decay": 0.0},
    )
    return [group for group in parted if group["params"]]


def peak_rate(lr: float | str, parameters: Iterable[Named]) -> float:
    """``lr``, or for ``auto`` 6e-3 / sqrt(width), which is 2.2e-4 at a width of 768.

    Raises:
        ValueError: ``auto``, and no parameter is called an embedding, whose width it would be.
    """
    if lr != "auto":
        return float(lr)
    width = next((p.shape[-1] for name, p in parameters if EMBEDDING.search(name)), None)
    if width is None:
        raise ValueError(
            "optimizer.lr=auto follows the width of the embedding, and no parameter is named as "
            "one: set optimizer.lr to a number"
        )
    rate = 6e-3 * width**-0.5
    log.info(f"optimizer.lr=auto: 6e-3 / sqrt({width}) = {rate:.2g}")
    return rate


def _grouped(
    kind: Callable[..., Optimizer],
    parameters: Iterable[Named],
    *,
    lr: float | str,
    weight_decay: float,
    **options: Any,
) -> Optimizer:
    """An optimizer of torch over :func:`groups`; ``options`` are its own."""
    parameters = list(parameters)
    return kind(groups(parameters, weight_decay), lr=peak_rate(lr, parameters), **options)


adamw = partial(_grouped, torch.optim.AdamW)
adam = partial(_grouped, torch.optim.Adam)
sgd = partial(_grouped, torch.optim.SGD)


class Joint(Optimizer):
    """Several optimizers, over parameters that no two share, as one.

    Its groups and its state *are* those of its parts, so that a schedule, a loss scaler and a
    checkpoint deal with one optimizer.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        start = 0
        for part in self.parts:
            stop = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:stop], self.state
            start = stop

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        with torch.enable_grad():
            loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)  # which makes new groups and a new state
        self._share()


def muon(
    parameters: Iterable[Named],
    *,
    muon_lr: float,
    muon_momentum: float,
    lr: float | str,
    weight_decay: float,
    **adamw_options: Any,
) -> Joint:
    """Muon (https://kellerjordan.github.io/posts/muon/) for hidden matrices, AdamW for the rest.

    Raises:
        ValueError: there is no hidden matrix.
    """
    parameters = [named for named in parameters if named[1].requires_grad]
    matrices = [named for named in parameters if is_hidden_matrix(named)]
    rest = [named for named in parameters if not is_hidden_matrix(named)]
    if not matrices:
        raise ValueError("this model has no hidden matrix for Muon: choose optimizer=adamw")
    names = ", ".join(name for name, parameter in rest if parameter.dim() > 1)
    log.info(f"Muon has {len(matrices)} matrices; AdamW has {names} and what is no matrix")
    first = torch.optim.Muon(
        matrices, lr=muon_lr, momentum=muon_momentum, weight_decay=weight_decay
    )
    rate = peak_rate(lr, parameters)
    return Joint(first, torch.optim.AdamW(groups(rest, weight_decay), lr=rate, **adamw_options))
