"""Make the logits visible that a fused loss keeps to itself (Liger, chunks, cut-cross-entropy).

Such a loss is given the last hidden states h and the weights W of the head. With h = 0 a target y
of weight w leaves the gradient w (sum_v p_v W_v - W_y) at h: its direction names y, its size w.
"""

from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_preflight import locate
from causal_preflight.batch import AuditBatch
from causal_preflight.instrumented_model import InstrumentedModel, loss_of_model

_TRIED = 6  # outputs of modules that are tried as hidden states, the last one first
_NARROW = 8  # width below which a gradient fits the row of some target by chance
_SURE = 0.01  # residual below which no others are tried


class RebuiltHead(nn.Module):
    """Makes logits of the hidden states that a module puts out, and the loss of these logits."""

    residual = 1.0  # the part of the last run's gradient that no target explains

    def __init__(self, audited: InstrumentedModel, *given: Any) -> None:
        super().__init__()
        # The loss, the module, the path in its output, weight and bias: a tuple, so that they stay
        # the model's own.
        self.sandbox, self.seed, self.given = audited.sandbox, audited.seed, given

    def forward(self, hidden: Tensor) -> Tensor:
        *_, weight, bias = self.given
        return F.linear(hidden.to(weight.dtype), weight, bias).float()

    def loss(self, model: Any, batch: Any) -> Tensor:
        """The loss as a sum of w * nll over the rebuilt logits, and of what does not need them."""
        loss_fn, module, path, *_ = self.given
        logits, states = list[Tensor](), list[Tensor]()

        def make_logits(_: nn.Module, args: Any, output: Any) -> None:
            logits.append(self(locate.get_path(output, path)))

        def zero(_: nn.Module, args: Any, output: Any) -> Any:
            states.append(torch.zeros_like(locate.get_path(output, path)).requires_grad_())
            return locate.set_path(output, path, states[-1])

        with module.register_forward_hook(make_logits):
            loss_fn(model, batch)
        self.sandbox.rewind(self.seed, model.training)
        with module.register_forward_hook(zero):
            const = loss_fn(model, batch)
        if const.requires_grad:
            const.backward()  # not autograd.grad, which checkpointing may refuse
        model.zero_grad()
        weight, const = self.given[3].detach().float(), const.detach()
        log_p = self.forward(torch.zeros_like(weight[0])).detach().log_softmax(-1)
        by_target = log_p.exp() @ weight - weight
        norm, pairs, nll, total = by_target.norm(dim=1), list[tuple[Tensor, Tensor]](), 0.0, 0.0
        for g in (torch.zeros_like(s) if s.grad is None else s.grad.float() for s in states):
            along = g @ by_target.T / norm
            y = along.abs().argmax(-1)
            w = along.gather(-1, y[..., None])[..., 0] / norm[y]
            self.residual = float((g - w[..., None] * by_target[y]).norm() / g.norm())
            pairs.append((y, _merged(w, self.residual)))
            nll, total = nll - float((pairs[-1][1] * log_p[y]).sum()), total + float(w.sum())
        # A mean, of logits that are scaled on their way or of smoothed labels: its weights are 1.
        mean = nll and abs(float(const) / nll * total - 1) < 0.02 and abs(total - 1) > 1e-3
        scale = 1 / total if mean else 1.0
        loss = const - scale * nll
        for z, (y, w) in zip(logits, pairs, strict=True):
            on = w != 0
            loss = loss + scale * (w[on] * F.cross_entropy(z[on], y[on], reduction="none")).sum()
        return loss


def _merged(w: Tensor, near: float) -> Tensor:
    """Weights that differ by rounding, as of bfloat16, become their mean; 0 stays 0."""
    on = w != 0
    ordered, index = w[on].sort()
    group = torch.zeros_like(index)
    group[1:] = (ordered.diff() > near * ordered[1:].abs()).cumsum(0)
    means = torch.zeros_like(ordered).scatter_reduce(0, group, ordered, "mean", include_self=False)
    return w.masked_scatter(on, torch.empty_like(ordered).scatter(0, index, means[group]))


def rebuild_logits(model: InstrumentedModel, batch: AuditBatch, limit: float) -> float | None:
    """Replace the loss by one with visible logits; the residual of the fit, None if above `limit`.

    Any matrix with more rows than the largest id may be the head, any output the hidden states.
    """
    given, found, modules = model.loss_fn, None, model.sandbox.modules
    own = [(p, m) for m in reversed(modules) for p in m.parameters(recurse=False) if p.ndim == 2]
    states = [x for x in model.outputs if len(x[2]) < 4 and x[2][-1] >= _NARROW]
    for module, path, shape in states[: -_TRIED - 1 : -1]:
        for weight, m in ((w, m) for p, m in own for w in (p, p.T)):
            fits = weight.shape[1] == shape[-1] and len(weight) > int(batch.ids.max())
            if limit < _SURE or not fits:
                continue
            bias = m.bias if getattr(m, "bias", None) is not None and weight.is_leaf else None
            rebuilt = RebuiltHead(model, given or loss_of_model, module, path, weight, bias)
            model.loss_fn = rebuilt.loss
            with suppress(Exception):  # of a loss that is given what it is not made for
                model.run(batch, True)
            if rebuilt.residual < limit:
                limit, found = rebuilt.residual, rebuilt
    model.loss_fn = found.loss if found else given
    model.sandbox.modules += [found] if found else []
    return found.residual if found else None
