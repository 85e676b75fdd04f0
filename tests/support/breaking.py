"""A module whose loss or gradient breaks on certain batches."""

import torch

from causal_lm.module import CausalLM
from causal_lm.optim import optimizers
from support import make_batch, make_model

MUON = {"muon_lr": 0.02, "muon_momentum": 0.95, "lr": 0.01, "weight_decay": 0.1}


class Breaks(torch.autograd.Function):
    """The identity, with a NaN output (``at="forward"``) or gradient (``at="backward"``)."""

    @staticmethod
    def forward(ctx, x, at):
        ctx.at = at
        return x * float("nan") if at == "forward" else x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("nan") if ctx.at == "backward" else gradient, None


def module_that_breaks(at, nonfinite=None):
    """Its first block's MLP breaks on batches of nine slots (``make_batch((9, …))``)."""
    model = make_model()

    def hook(module, inputs, output):
        return Breaks.apply(output, at if output.shape[1] == 9 else "")

    model.blocks.layers[0].linear2.register_forward_hook(hook)
    return CausalLM(model, lambda p: optimizers.muon(p, **MUON), nonfinite=nonfinite)


GOOD, BAD = make_batch((5, 2, 7)), make_batch((9, 4))


def state(module):
    return [p.detach().clone() for p in module.parameters()]
