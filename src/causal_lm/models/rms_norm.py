"""RMSNorm in few passes over memory."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class RMSNorm(nn.RMSNorm):
    """``nn.RMSNorm``, which PyTorch runs as a chain of operations on a CPU: this takes half the
    time there, forward and backward (docs/performance.md)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (…, C) -> (…, C)."""
        is_whole = x.dtype == self.weight.dtype and x.dtype in (torch.float32, torch.float64)
        if x.device.type != "cpu" or not is_whole or torch.compiler.is_compiling():
            return super().forward(x)
        return _RMSNorm.apply(x, self.weight, self.eps)


class _RMSNorm(torch.autograd.Function):
    """y = s w x with s = (mean(x²) + eps)^(-1/2), (…, 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # one pass, without x²
        s = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, s)
        return (x * s).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, s = ctx.saved_tensors
        grad_x = grad * x
        # Of s: -s³ / C · Σ grad · w · x, and s itself multiplies x.
        of_s = (grad_x @ weight)[..., None].mul_(s.square()).div_(-x.shape[-1])
        grad_weight = s.flatten() @ grad_x.flatten(0, -2)
        return torch.mul(grad, weight).addcmul_(x, of_s).mul_(s), grad_weight, None
