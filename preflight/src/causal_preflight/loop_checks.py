"""What `LoopProbe` asks of modules, schedules and metrics: plain functions."""

import copy
import math
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

SAMPLES = 64  # elements of a parameter, or rows of a matrix, that are compared
SIMULATED = 20_000  # steps of a schedule that are simulated at most
PERPLEXITY = re.compile("perplexity|ppl", re.IGNORECASE)


def sample(p: Tensor) -> Tensor:
    """Up to SAMPLES elements of a tensor, as a copy in float32."""
    return p.detach().flatten()[:: max(1, p.numel() // SAMPLES)][:SAMPLES].float().clone()


def shared_names(module: nn.Module) -> set[frozenset[str]]:
    """The names of each parameter that has several."""
    names = defaultdict(set)
    for name, p in module.named_parameters(remove_duplicate=False):
        names[id(p)].add(name)
    return {frozenset(group) for group in names.values() if len(group) > 1}


def untied_copies(module: nn.Module) -> Iterator[str]:
    """Embeddings and matrices that are two tensors, but have the same rows or are declared tied."""
    tied = frozenset[str]().union(*shared_names(module))
    tables = {f"{n}.weight": m for n, m in module.named_modules() if isinstance(m, nn.Embedding)}
    for name, table in ((n, m.weight) for n, m in tables.items() if n not in tied):
        for other, p in module.named_parameters():
            alike = other not in tables and p.ndim == 2 and p.shape[1] == table.shape[1]
            apart = p.data_ptr() != table.data_ptr() and (p.requires_grad or table.requires_grad)
            if alike and apart and _same_rows(table.detach(), p.detach()):
                yield f"{name} and {other}"
    for part in module.modules():  # a model of transformers
        if getattr(getattr(part, "config", None), "tie_word_embeddings", False):
            ends = [getattr(part, f"get_{end}_embeddings", None) for end in ("input", "output")]
            first, last = (getattr(end and end(), "weight", None) for end in ends)
            if first is not None and last is not None and first is not last:
                yield "the embeddings that tie_word_embeddings=True ties"


def _same_rows(a: Tensor, b: Tensor) -> bool:
    """Whether most rows that both have are equal, up to rounding to 16 bits; zeros do not count."""
    rows = torch.linspace(0, min(len(a), len(b)) - 1, min(len(a), len(b), SAMPLES)).long()
    a, b = (x[rows.to(x.device)].float().cpu() for x in (a, b))
    return bool((torch.isclose(a, b, rtol=1e-2).all(1) & a.any(1)).float().mean() > 0.5)


def in_eval_mode(root: nn.Module) -> list[str]:
    """Modules that train in eval mode; not batch norms, nor what `train()` leaves in eval mode."""

    def found() -> list[str]:
        trained = ((name, m) for name, m in root.named_modules() if not m.training)
        trained = ((n, m) for n, m in trained if any(p.requires_grad for p in m.parameters(False)))
        return [n for n, m in trained if not isinstance(m, nn.modules.batchnorm._BatchNorm)]

    if not (names := found()):
        return []
    modes = [(module, module.training) for module in root.modules()]
    root.train()
    intended = set(found())
    for module, mode in modes:
        module.training = mode
    return [name for name in names if name not in intended]


def meant_for_steps(scheduler: Any, epochs: int, steps: int, shared: list[Any]) -> str:
    """Why a schedule that moves once an epoch is meant for optimizer steps; empty if it is not.

    It is if it rises for longer than the run has epochs, or falls until the last step of the run.
    A copy of the schedule is simulated; `shared` is not copied with it.
    """
    groups = [dict(g, params=[torch.zeros(1)]) for g in scheduler.optimizer.param_groups]
    memo: dict[int, Any] = {id(x): x for x in shared}
    memo[id(scheduler.optimizer)] = stand_in = torch.optim.SGD(groups, lr=0.0)
    twin, rates = copy.deepcopy(scheduler, memo), list[float]()
    with warnings.catch_warnings(action="ignore"):
        while len(rates) <= min(2 * steps, SIMULATED):
            rates.append(sum(float(g["lr"]) for g in stand_in.param_groups))
            try:
                twin.step()
            except ValueError:  # OneCycleLR has an end
                break
    peak, end = rates.index(max(rates[: steps + 1])), rates.index(min(rates))
    if peak > 2 * epochs and max(rates[:epochs]) < 0.99 * rates[peak]:
        return f"rises for {peak} of its steps"
    falls = end > 2 * epochs and rates[end] < 0.9 * rates[peak] and 2 * steps <= SIMULATED
    return f"falls for {end} of its steps" if falls and 0.5 <= end / steps <= 1.05 else ""


def perplexities(metrics: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Name of a perplexity, name of the loss beside it, and log(perplexity) - loss in nats."""
    for name in filter(PERPLEXITY.search, metrics):
        prefix, losses = PERPLEXITY.split(name)[0], ("loss", "nll", "ce", "cross_entropy")
        beside = [x for x in (PERPLEXITY.sub(loss, name) for loss in losses) if x in metrics]
        beside += [x for x in metrics if prefix and x.startswith(prefix) and "loss" in x.lower()]
        if beside and 0 < (value := float(metrics[name])) < math.inf:
            yield name, beside[0], math.log(value) - float(metrics[beside[0]])
