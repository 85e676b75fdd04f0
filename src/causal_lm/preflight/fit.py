"""Reading a cross-entropy off its gradient.

For logits z with p = softmax(z), the gradient of almost every language-model loss at a position is

    g = a p - w onehot(y) - u 1

with y the target, and w, a, u told apart by p: plain cross-entropy has a = w, u = 0; label
smoothing moves a part of w into u (w + u V stays the weight of the token); a z-loss adds to a alone
(Chowdhery et al., PaLM, arXiv:2204.02311, section 5). So a small least-squares fit reads off which
token was trained at each position and how strongly, whatever code lies between logits and loss.

Limits: losses that are no sum over positions of such terms leave a residual. The target is still
the outlier then, and the residual widens the tolerances downstream.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 2**22  # numbers in hand at a time


@dataclass(frozen=True)
class Fit:
    """Per position, (b, t), float64.

    target: id y. weight: w + u V, the token's weight in the loss. sharp: w alone, the part on the
    target. pull: largest |g|, zero exactly where the position plays no part. lump: sum of g, zero
    for cross-entropy, positive for a z-loss. residual: rms of what the fit leaves over rms of g.
    """

    target: Tensor
    weight: Tensor
    sharp: Tensor
    pull: Tensor
    lump: Tensor
    residual: float


def fit(logits: Tensor, grad: Tensor) -> Fit:
    """Fit every position of logits and grad, both (..., V); in chunks, to spare memory."""
    shape, v = grad.shape[:-1], grad.shape[-1]
    step = max(1, _CHUNK // v)
    parts = torch.split(logits.reshape(-1, v), step), torch.split(grad.reshape(-1, v), step)
    fitted = [_fit(z, g) for z, g in zip(*parts, strict=True)]
    y, w, u, left, pull, lump, rms = (torch.cat(x) for x in zip(*fitted, strict=True))
    live = rms > 1e-24 * rms.max()
    residual = float((left[live].sum() / rms[live].sum()).sqrt()) if bool(live.any()) else 0.0
    y, weight, w, pull, lump = (x.reshape(shape) for x in (y, w + u * v, w, pull, lump))
    return Fit(y, weight, w, pull, lump, residual)


def _fit(logits: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    g = torch.nan_to_num(grad.double(), 0.0, 0.0, 0.0)
    p = torch.nan_to_num(logits.double().softmax(-1), 0.0)
    y, w, u, left = _given(p, g, g.argmin(-1))
    # With a confident model the target can be the largest p instead of the lowest g.
    sure = left > 1e-6 * g.pow(2).mean(-1)
    if bool(sure.any()):
        other = _given(p, g, p.argmax(-1))
        better = sure & (other[3] < left * 0.5)
        y, w, u, left = (
            torch.where(better, b, a) for a, b in zip((y, w, u, left), other, strict=True)
        )
    return y, w, u, left, g.abs().amax(-1), g.sum(-1), g.pow(2).mean(-1)


def _given(p: Tensor, g: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fit a and u on every id but y; what is missing at y is w. Mean squared rest last."""
    others = torch.ones_like(g).scatter_(-1, y[..., None], 0.0)
    n = others.sum(-1, keepdim=True).clamp_min(1)
    pm = (p * others).sum(-1, keepdim=True) / n
    gm = (g * others).sum(-1, keepdim=True) / n
    dp, dg = (p - pm) * others, (g - gm) * others
    var = dp.pow(2).sum(-1, keepdim=True)
    flat = var < 1e-24  # uniform p: a and u cannot be told apart, call it all a
    a = torch.where(flat, gm / pm.clamp_min(1e-300), (dp * dg).sum(-1, keepdim=True) / var)
    u = a * pm - gm
    rest = (g - a * p + u) * others
    w = (a * p - u - g).gather(-1, y[..., None])[..., 0]
    return y, w, u[..., 0], rest.pow(2).mean(-1)
