"""Read targets and weights off the gradient of a cross-entropy.

For logits z with p = softmax(z), the gradient of almost every language-model loss at a position is
g = a p - w onehot(y) - u 1, with y the target. Plain cross-entropy has a = w and u = 0; label
smoothing moves part of w into u; a z-loss (PaLM, arXiv:2204.02311, section 5) adds to a alone.
Least squares give y, w, a and u; what they leave over widens the tolerances of the probes.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

_CHUNK = 2**22  # values fitted at a time
EXACT = 1e-5  # residual below which the loss is a cross-entropy in float32
_TRAINED = 1e-3  # fraction of the largest weight below which a position has no target


@dataclass
class Readout:
    """What the loss trained, per position (B, T): see `fit`. 0 where nothing.

    `pieces` of logits were used: of several calls, or of a head applied in chunks. `scaled`: the
    loss caps or scales the logits.
    """

    loss: float
    residual: float
    pieces: int
    target: Tensor
    weight: Tensor
    onehot_weight: Tensor
    max_abs_grad: Tensor
    grad_sum: Tensor
    scaled: bool = False

    @cached_property
    def trained(self) -> Tensor:
        """(B, T) bool: positions that the loss trains on a target."""
        weight = self.weight.abs()
        least = _TRAINED * weight.max().clamp_min(1e-300)
        return weight.minimum(self.onehot_weight.abs()) > least


def fit(logits: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, float]:
    """Fit every position of logits and grad, both (b, t, V), in float64.

    Returns the target ids (b, t); a stack (4, b, t) of `weight` (w + u V, the token's weight in the
    loss), `onehot_weight` (w), `max_abs_grad` (largest |g|), `grad_sum` (0 for a cross-entropy,
    positive for a z-loss); and the residual: rms of what is left over that of g.
    """
    device, shape, v = grad.device, grad.shape[:-1], grad.shape[-1]
    mps = device.type == "mps"  # has no float64
    parts = [x.reshape(-1, v).split(max(1, _CHUNK // v)) for x in (logits, grad)]
    fitted = [_fit(*(x.cpu() if mps else x for x in pair)) for pair in zip(*parts, strict=True)]
    target, rest, mean_square, *values = (torch.cat(x) for x in zip(*fitted, strict=True))
    nonzero = mean_square > 1e-24 * mean_square.max()
    ratio = rest[nonzero].sum() / mean_square[nonzero].sum()
    residual = float(ratio.sqrt()) if bool(nonzero.any()) else 0.0
    stack = torch.stack([x.float() if mps else x for x in values])
    return target.view(shape).to(device), stack.view(4, *shape).to(device), residual


def _fit(logits: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    g = torch.nan_to_num(grad.double(), 0.0, 0.0, 0.0)
    p = torch.nan_to_num(logits.double().softmax(-1), 0.0)
    mean_square = g.pow(2).mean(-1)
    # The target is the lowest g; with a confident model it can be the largest p instead, and with
    # a negative weight (an advantage) it is the largest g.
    y, w, u, rest = _fit_target(p, g, g.argmin(-1))
    for other in (p.argmax(-1), g.argmax(-1)):
        if bool((rest > 1e-6 * mean_square).any()):
            fitted = _fit_target(p, g, other)
            better = (rest > 1e-6 * mean_square) & (fitted[3] < rest * 0.5)
            pairs = zip((y, w, u, rest), fitted, strict=True)
            y, w, u, rest = (torch.where(better, b, a) for a, b in pairs)
    return y, rest, mean_square, w + u * g.shape[-1], w, g.abs().amax(-1), g.sum(-1)


def _fit_target(p: Tensor, g: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fit a and u on every id but y; the gap at y is w. Returns y, w, u, mean squared residual."""
    others = torch.ones_like(g).scatter_(-1, y[..., None], 0.0)
    n = others.sum(-1, keepdim=True).clamp_min(1)
    pm, gm = ((x * others).sum(-1, keepdim=True) / n for x in (p, g))
    dp, dg = (p - pm) * others, (g - gm) * others
    var = dp.pow(2).sum(-1, keepdim=True)
    flat = var < 1e-24  # uniform p: a and u are not separable, so u is 0
    a = torch.where(flat, gm / pm.clamp_min(1e-300), (dp * dg).sum(-1, keepdim=True) / var)
    u = a * pm - gm
    deviation = g - a * p + u
    w = -deviation.gather(-1, y[..., None])[..., 0]
    return y, w, u[..., 0], (deviation * others).pow(2).mean(-1)


def fit_hidden(grad: Tensor, head: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, float]:
    """As `fit`, of the gradient (b, t, D) at hidden states of 0 and the weights of a head (V, D).

    A target y of weight w leaves w (sum_v p_v W_v - W_y): its direction names y, its size w.
    """
    g = grad.float()
    weight = head.detach().to(g)
    p = (weight.new_zeros(len(weight)) if bias is None else bias.detach().to(g)).softmax(-1)
    by_target = p @ weight - weight
    norm = by_target.norm(dim=1)
    along = g @ by_target.T / norm
    y = along.abs().argmax(-1)
    w = along.gather(-1, y[..., None])[..., 0] / norm[y]
    rest = float((g - w[..., None] * by_target[y]).norm() / g.norm().clamp_min(1e-30))
    # Weights that differ by rounding, as of bfloat16, become their mean; 0 stays 0.
    ordered, index = w[w != 0].sort()
    group = torch.zeros_like(index)
    group[1:] = (ordered.diff() > rest * ordered[1:].abs()).cumsum(0)
    means = torch.zeros_like(ordered).scatter_reduce(0, group, ordered, "mean", include_self=False)
    w = w.masked_scatter(w != 0, torch.empty_like(ordered).scatter(0, index, means[group]))
    return y, torch.stack([w, w, w.abs(), torch.zeros_like(w)]), rest


def is_distribution(z: Tensor) -> bool:
    """Whether these, (..., V), are probabilities rather than logits."""
    return bool((z >= 0).all()) and bool(((z.sum(-1) - 1).abs() < 1e-2).all())
