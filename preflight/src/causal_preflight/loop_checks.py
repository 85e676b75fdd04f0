"""The checks of `LoopProbe`: their remedies, and what they ask of modules, schedules, metrics."""

import copy
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

STEPS = 3  # optimizer steps that are watched; ten times as many where one optimizer steps rarely
PATIENCE = 200  # batches, times accumulate_grad_batches, until three steps must have been seen
SAMPLES = 64  # elements of a parameter, or rows of a matrix, that are compared
SIMULATED = 20_000  # steps of a schedule that are simulated at most
PERPLEXITY = re.compile("perplexity|ppl", re.IGNORECASE)
LOG_GAP = 2e-4  # nats by which the log of a perplexity may exceed its loss
BY_EPOCH = ("ReduceLROnPlateau", "SWALR")  # schedulers that are meant to move by epochs
REMEDIES = {  # name of a check -> what to change
    "parameters": "give them to the optimizer, or freeze them with requires_grad_(False)",
    "gradients": "look for detach(), no_grad() or an unused layer between them and the loss",
    "tensors": "make the optimizer in configure_optimizers, after embeddings are resized",
    "zeroing": "call optimizer.zero_grad() before the first backward pass of each step",
    "clipping": "clip in configure_gradient_clipping, or after scaler.unscale_(optimizer)",
    "division": "divide the loss by the micro-batches once; Lightning does, except in manual loops",
    "train mode": "call self.train() before training: from_pretrained leaves eval mode on",
    "validation mode": "keep eval mode, and pass training=self.training to functional dropout",
    "tie": "assign head.weight = embedding.weight again after a resize, a copy or a load",
    "rate": "let the warm-up begin above 0; look for integer division in the schedule",
    "schedule": 'return {"scheduler": ..., "interval": "step"}, or call its step() each step',
    "ranks": "seed all ranks alike, and call self.manual_backward without no_sync()",
    "autocast": "remove autocast(enabled=False) and casts to float32; name the device in use",
    "perplexity": "average the loss over all batches first, then log its exponential",
}


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def sample(p: Tensor) -> Tensor:
    """Up to SAMPLES elements, as a copy in float32."""
    return p.detach().flatten()[:: max(1, p.numel() // SAMPLES)][:SAMPLES].float().clone()


def is_compiled(root: nn.Module) -> bool:
    """Whether a part of the model is compiled."""
    kinds = ((type(m).__name__, m._compiled_call_impl) for m in root.modules())
    return any(name == "OptimizedModule" or call is not None for name, call in kinds)


def ties(module: nn.Module) -> set[tuple[str, str]]:
    """Pairs of names of one parameter."""
    first = {id(p): name for name, p in module.named_parameters()}
    names = ((first[id(p)], n) for n, p in module.named_parameters(remove_duplicate=False))
    return {pair for pair in names if pair[0] != pair[1]}


def untied_copies(module: nn.Module) -> Iterator[str]:
    """Pairs of an embedding, tied to nothing, and a matrix of which most rows are equal."""
    tables = {f"{n}.weight": m for n, m in module.named_modules() if isinstance(m, nn.Embedding)}
    heads = [x for x in module.named_parameters() if x[0] not in tables and x[1].ndim == 2]
    tied = {name for pair in ties(module) for name in pair}
    for (name, table), (other, head) in product(tables.items(), heads):
        a, b = table.weight.detach(), head.detach()
        if {name, other} & tied or a.shape[1] != b.shape[1] or a.data_ptr() == b.data_ptr():
            continue
        rows = torch.linspace(0, min(len(a), len(b)) - 1, SAMPLES).long()
        a, b = a[rows.to(a.device)].float().cpu(), b[rows.to(b.device)].float().cpu()
        equal = torch.isclose(a, b, rtol=1e-2).all(1) & a.any(1)
        if equal.float().mean() > 0.5:
            yield f"{name} and {other}"


def in_eval_mode(root: nn.Module) -> list[str]:
    """Modules that train in eval mode; not batch norms, nor what `train()` leaves in eval mode."""

    def found() -> set[str]:
        idle = [(n, m) for n, m in root.named_modules() if not m.training]
        idle = [(n, m) for n, m in idle if not isinstance(m, nn.modules.batchnorm._BatchNorm)]
        return {n for n, m in idle if any(p.requires_grad for p in m.parameters(recurse=False))}

    modes, names = [(m, m.training) for m in root.modules()], found()
    if names:
        root.train()
        names -= found()
        for module, mode in modes:
            module.training = mode
    return sorted(names)


def log_softmax(loss: Tensor) -> Any:
    """The node of the one log-softmax that makes a loss; None if the loss has other parts."""
    node: Any = loss.grad_fn
    for _ in range(12):
        inputs = [n for n, _ in node.next_functions if n is not None] if node else []
        if len(inputs) != 1 or node.name() == "LogSoftmaxBackward0":
            break
        node = inputs[0]
    return node if node and node.name() == "LogSoftmaxBackward0" else None


def run_length(trainer: Any) -> tuple[int, int]:
    """Optimizer steps and epochs of the run; 0 steps if that is unknown."""
    per_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    lengths = trainer.max_steps, (trainer.max_epochs or -1) * per_epoch
    steps = math.ceil(min((n for n in lengths if 0 < n < math.inf), default=0))
    return steps, max(1, math.ceil(steps / per_epoch))


def meant_for_steps(scheduler: Any, epochs: int, steps: int, shared: Iterable[Any]) -> str:
    """What a schedule that moves by epochs does for too many; empty if nothing says so.

    It is if it rises for longer than the run has epochs, or falls until the run's last step. A copy
    is simulated; `shared` is not copied with it.
    """
    own = {"params", "param_names"}
    groups = [
        {k: v for k, v in g.items() if k not in own} for g in scheduler.optimizer.param_groups
    ]
    memo: dict[int, Any] = {id(x): x for x in shared}
    stand_in = torch.optim.SGD([g | {"params": [torch.zeros(1)]} for g in groups], lr=0.0)
    memo[id(scheduler.optimizer)] = stand_in
    twin, rates = copy.deepcopy(scheduler, memo), list[float]()
    with warnings.catch_warnings(action="ignore"), suppress(ValueError):  # OneCycleLR has an end
        for _ in range(min(2 * steps, SIMULATED) + 1):
            rates.append(sum(float(g["lr"]) for g in stand_in.param_groups))
            twin.step()
    peak, end = rates.index(max(rates[: steps + 1])), rates.index(min(rates))
    if peak > 2 * epochs and max(rates[:epochs]) < 0.99 * rates[peak]:
        return f"rises for {peak}"
    falls = end > 2 * epochs and rates[end] < 0.9 * rates[peak] and 2 * steps <= SIMULATED
    return f"falls for {end}" if falls and 0.5 <= end / steps <= 1.05 else ""


def perplexities(logged: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Name of a perplexity, name of the loss beside it, and log(perplexity) - loss in nats."""
    for name in filter(PERPLEXITY.search, logged):
        names = [PERPLEXITY.sub(loss, name) for loss in ("loss", "nll", "ce", "cross_entropy")]
        for loss in [x for x in names if x in logged and 0 < float(logged[name]) < math.inf][:1]:
            yield name, loss, math.log(logged[name]) - float(logged[loss])
