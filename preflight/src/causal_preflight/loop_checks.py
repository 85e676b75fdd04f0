"""The checks of `LoopProbe`: what is recorded of the first optimizer steps, and what it shows."""

import copy
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import get_total_norm

from causal_preflight.report import require

STEPS = 3  # optimizer steps that are watched; ten times as many where one optimizer steps rarely
SAMPLES = 64  # elements of a parameter, or rows of a matrix, that are compared
SIMULATED = 20_000  # steps of a schedule that are simulated at most
PERPLEXITY = re.compile("perplexity|ppl", re.IGNORECASE)
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
# Methods of `FirstSteps`, each with the optimizer steps that it needs.
STEP_CHECKS = {
    "tie": 0, "autocast": 0, "clipping": STEPS, "division": 1, "tensors": 2, "parameters": 2,
    "gradients": 2, "zeroing": 2, "rate": 2, "schedule": 2,
}  # fmt: skip


@dataclass(eq=False)
class WatchedOptimizer:
    """What is seen of one optimizer; `norms`: Euclidean norm, maximum and sum at an unscaling."""

    optimizer: torch.optim.Optimizer
    params: list[Tensor]
    rates: list[float] = field(default_factory=list)
    norms: list[tuple[float, float, float]] = field(default_factory=list)
    left_over: bool | None = False  # whether old gradients remain; None: no backward since a step
    carried: int = 0  # steps that used old gradients


class FirstSteps:
    """Records gradients, rates and calls by hooks, until `hooks.close()`.

    Each check returns what is wrong, "" for nothing, or raises UnexaminableError.
    """

    def __init__(self, trainer: Any, module: L.LightningModule) -> None:
        self.trainer, self.module, self.hooks = trainer, module, ExitStack()
        self.watched: list[WatchedOptimizer] = []
        for optimizer in trainer.optimizers:
            if hasattr(optimizer, "register_step_post_hook"):  # Lightning takes others, too
                params = [p for group in optimizer.param_groups for p in group["params"]]
                self.watched.append(w := WatchedOptimizer(optimizer, params))
                hook = optimizer.register_step_post_hook(partial(self._stepped, w))
                self.hooks.callback(hook.remove)
        self.names = {id(p): name for name, p in module.named_parameters()}
        held = {id(p): p for w in self.watched for p in w.params}
        trained = {id(p): p for p in module.parameters() if p.requires_grad}
        # Parameters of the optimizers without a gradient so far; parameters of none, with values.
        self.without = {i: p for i, p in held.items() if i in trained or i not in self.names}
        self.outside = {i: (p, sample(p)) for i, p in trained.items() if i not in held}
        self.missed, self.ran, self.dtypes = set[int](), set[int](), set[torch.dtype]()
        self.idle: dict[int, Tensor] = {}  # values of what got no gradient in these steps
        self.backwards, self.weights = 0, list[Tensor]()  # token weights of the next step
        self.weight_sums: list[tuple[int, float]] = []  # micro-batches of a step, weight of one
        self.mixed = "mixed" in str(trainer.precision)
        self.ties, self.copies = ties(module), list(untied_copies(module))
        self.positions = [c.scheduler.last_epoch for c in trainer.lr_scheduler_configs]
        scalers = [getattr(trainer.precision_plugin, "scaler", None), *vars(module).values()]
        self.scalers = [x for x in scalers if isinstance(x, torch.amp.GradScaler)]
        for scaler in self.scalers:
            vars(scaler)["unscale_"] = partial(self._unscale, scaler.unscale_)
            self.hooks.callback(vars(scaler).pop, "unscale_")
        # A hook would compile a compiled model again.
        kinds = ((type(m).__name__, m._compiled_call_impl) for m in module.modules())
        if not any(name == "OptimizedModule" or call is not None for name, call in kinds):
            self.hooks.callback(register_module_forward_hook(self._called).remove)

    @property
    def steps(self) -> list[int]:
        """Steps of each optimizer."""
        return [len(w.rates) for w in self.watched] or [0]

    def _called(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.module._current_fx_name == "training_step":  # else a callback, or validation
            self.ran.add(id(module))
            self.mixed |= any(map(torch.is_autocast_enabled, ("cpu", "cuda", "mps", "xpu")))
            if isinstance(module, nn.Linear | nn.MultiheadAttention):
                self.dtypes.add((output[0] if isinstance(output, tuple) else output).dtype)

    def before_backward(self, loss: Tensor) -> None:
        """Look for gradients of an earlier step, and ask for the token weights of this loss."""
        for w in self.watched:
            if w.left_over is not False:  # else there may be gradients of the same step
                grads = [p.grad for p in w.params if p.grad is not None][:4]
                w.left_over = any(bool(g.any()) for g in grads)
        self.backwards += 1
        self.weights.append(torch.tensor(math.nan))
        if node := log_softmax(loss):
            node.register_prehook(self._weigh)

    def _weigh(self, grads: tuple[Tensor, ...]) -> None:
        """The gradient of a log-softmax is minus the token weights, times the scale of the loss."""
        scale = math.prod(x.get_scale() for x in self.scalers)
        self.weights[-1] = -grads[0].float().sum() / scale

    def _unscale(self, unscale: Any, optimizer: Any) -> None:
        for w in self.watched:
            if w.optimizer in (optimizer, getattr(optimizer, "optimizer", None)):
                grads = [p.grad for p in w.params if p.grad is not None]
                norms = (get_total_norm(grads).item(), get_total_norm(grads, math.inf).item())
                total = sum(g.sum(dtype=torch.float32).item() for g in grads)
                w.norms += [(*norms, total)] if math.isfinite(norms[0]) else []
        unscale(optimizer)

    def _stepped(self, w: WatchedOptimizer, *_: Any) -> None:
        """After a step of one optimizer: the gradients are those that it used."""
        if not self.weights and all(p.grad is None for p in w.params):
            return  # there was no backward pass
        self.without = {i: p for i, p in self.without.items() if p.grad is None}
        self.missed |= {i for i, (p, _) in self.outside.items() if p.grad is not None}
        w.carried, w.left_over = w.carried + bool(w.left_over), None
        w.rates.append(max(float(g.get("lr", 1)) for g in w.optimizer.param_groups))
        automatic = self.module.automatic_optimization
        n = self.trainer.accumulate_grad_batches if automatic else len(self.weights)
        self.weight_sums += [(n, float(weight)) for weight in self.weights if n > 1]
        self.weights = []

    def _stale(self) -> int:
        return len(self.without.keys() - set(map(id, self.module.parameters())))

    def tensors(self) -> str:
        stale = self._stale()
        return f"the optimizer holds {stale} tensors that left the module" if stale else ""

    def parameters(self) -> str:
        """What trains outside of the optimizers, beyond new versions of stale tensors."""
        lost = [self.names[i] for i in self.missed if torch.equal(*map(sample, self.outside[i]))]
        return f"{some(lost)} train, but are in no optimizer" if len(lost) > self._stale() else ""

    def gradients(self, final: bool = False) -> str:
        """A module that was not called is judged only if `final`, and if none like it got any."""
        self.idle = self.idle or {i: sample(p) for i, p in self.without.items()}
        still = {i: p for i, p in self.without.items() if torch.equal(sample(p), self.idle[i])}
        kinds = {i: re.sub(r"\d+", "#", name) for i, name in self.names.items()}  # of equal layers
        live = {kind for i, kind in kinds.items() if i not in still}
        called = [m for m in self.module.modules() if id(m) in self.ran]
        ran = {id(p) for m in called for p in m.parameters(recurse=False)}
        dead = [i for i in map(id, self.module.parameters()) if i in still]
        names = [self.names[i] for i in dead if i in ran or (final and kinds[i] not in live)]
        require(names or not dead, f"not called so far: {some([self.names[i] for i in dead])}")
        return f"{some(names)} got no gradient" if names else ""

    def zeroing(self) -> str:
        require(self.backwards, "manual_backward was not called")
        carried = sum(w.carried for w in self.watched)
        return f"{carried} steps used earlier gradients, too" if carried else ""

    def clipping(self) -> str:
        norms = [w.norms for w in self.watched if len(w.norms) >= STEPS]
        require(norms, f"no GradScaler has unscaled gradients {STEPS} times")
        ranges = [torch.tensor(n).aminmax(dim=0) for n in norms]
        changing = [(low, high) for low, high in ranges if high[2] - low[2] > 0.01 * high[0]]
        require(changing, "the gradients hardly change")
        if any(bool((high < 1.001 * low)[:2].any()) for low, high in changing):
            return "gradients have one norm at each unscale_: clipped before"
        return ""

    def division(self) -> str:
        """Each micro-batch's token weights make 1/n, or 1/n squared if divided twice."""
        n = self.weight_sums[0][0] if self.weight_sums else 0
        sums = [count * weight for count, weight in self.weight_sums]
        twice = n > 0 and all(math.isclose(n * x, 1, rel_tol=1e-3) for x in sums)
        once = n > 0 and all(math.isclose(x, 1, rel_tol=1e-3) for x in sums)
        require(once or twice, "no step takes several losses that are one cross-entropy each")
        return f"{n} micro-batches weigh 1/{n} together, not 1" if twice else ""

    def tie(self) -> str:
        parted = [" and ".join(names) for names in self.ties - ties(self.module)]
        two = f"{some(self.copies)} are two tensors" if self.copies else ""
        return f"{some(parted)} parted" if parted else two

    def autocast(self) -> str:
        require(self.mixed and self.dtypes, "no mixed precision, or no linear layer seen to run")
        lower = self.dtypes & {torch.bfloat16, torch.float16}
        return "" if lower else "all linear layers computed in float32"

    def rate(self) -> str:
        if all(any(w.rates) for w in self.watched):
            return ""
        require(not self.schedule(), "the schedule moves by epochs")
        return f"the rate was 0 in {max(self.steps)} steps"

    def schedule(self) -> str:
        trainer, configs = self.trainer, self.trainer.lr_scheduler_configs
        require(configs, "there is no schedule")
        steps = trainer.estimated_stepping_batches
        for config, position in zip(configs, self.positions, strict=True):
            scheduler, by_epoch = config.scheduler, config.interval == "epoch"
            if not self.module.automatic_optimization:
                by_epoch = scheduler.last_epoch == position
            if by_epoch and type(scheduler).__name__ not in BY_EPOCH:
                epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
                require(0 < steps < math.inf, "the length of the run is unknown")
                require(epoch < math.inf, "the length of an epoch is unknown")
                epochs = max(1, math.ceil(steps / epoch))
                if seen := meant_for_steps(scheduler, epochs, steps, trainer, self.module):
                    return f"the rate {seen} epochs, in a run of {epochs}"
        return ""


def some(names: list[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def sample(p: Tensor) -> Tensor:
    """Up to SAMPLES elements, as a copy in float32."""
    return p.detach().flatten()[:: max(1, p.numel() // SAMPLES)][:SAMPLES].float().clone()


def ties(module: nn.Module) -> set[tuple[str, str]]:
    """Pairs of names of one parameter."""
    first = {id(p): name for name, p in module.named_parameters()}
    names = ((first[id(p)], n) for n, p in module.named_parameters(remove_duplicate=False))
    return {pair for pair in names if pair[0] != pair[1]}


def untied_copies(module: nn.Module) -> Iterator[str]:
    """Pairs of an embedding, tied to nothing, and a matrix of which most rows are equal."""
    tied = {name for pair in ties(module) for name in pair}
    tables = {f"{n}.weight": m for n, m in module.named_modules() if isinstance(m, nn.Embedding)}
    heads = [(n, p) for n, p in module.named_parameters() if n not in tables and p.ndim == 2]
    for (name, table), (other, head) in product(tables.items(), heads):
        if {name, other} & tied or table.embedding_dim != head.shape[1]:
            continue
        rows = torch.linspace(0, min(len(table.weight), len(head)) - 1, SAMPLES).long()
        a, b = (p.detach()[rows.to(p.device)].float().cpu() for p in (table.weight, head))
        if (torch.isclose(a, b, rtol=1e-2).all(1) & a.any(1)).float().mean() > 0.5:
            yield f"{name} and {other}"


def log_softmax(loss: Tensor) -> Any:
    """The node of the one log-softmax that makes a loss; None if the loss has other parts."""
    node: Any = loss.grad_fn
    while node and node.name() != "LogSoftmaxBackward0":
        inputs = [n for n, _ in node.next_functions if n is not None]
        node = inputs[0] if len(inputs) == 1 else None
    return node


def meant_for_steps(scheduler: Any, epochs: int, steps: int, *shared: Any) -> str:
    """What a schedule by epochs does in a simulated copy: rises for longer than the run has epochs,
    or falls until its last step; empty if neither. `shared` is not copied.
    """
    groups = [
        {k: v for k, v in g.items() if k != "param_names"} | {"params": [torch.zeros(1)]}
        for g in scheduler.optimizer.param_groups
    ]
    stand_in = torch.optim.SGD(groups, lr=0.0)
    memo: dict[int, Any] = {id(x): x for x in shared} | {id(scheduler.optimizer): stand_in}
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


def in_eval_mode(root: nn.Module) -> list[str]:
    """Modules that train in eval mode; not batch norms, nor what `train()` leaves in eval mode."""
    modes = {m: m.training for m in root.modules()}
    if all(modes.values()):
        return []
    root.train()
    norms = nn.modules.batchnorm._BatchNorm
    changed = {m for m, mode in modes.items() if m.training and not (mode or isinstance(m, norms))}
    for module, mode in modes.items():
        module.training = mode
    trained = {m for m in changed if any(p.requires_grad for p in m.parameters(recurse=False))}
    return [name for name, m in root.named_modules() if m in trained]


def perplexities(logged: Mapping[str, Any]) -> Iterator[tuple[str, str, float]]:
    """Name of a perplexity, name of the loss beside it, and log(perplexity) - loss in nats."""
    for name in filter(PERPLEXITY.search, logged):
        names = [PERPLEXITY.sub(loss, name) for loss in ("loss", "nll", "ce", "cross_entropy")]
        for loss in [x for x in names if x in logged and 0 < float(logged[name]) < math.inf][:1]:
            yield name, loss, math.log(logged[name]) - float(logged[loss])
