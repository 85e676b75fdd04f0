"""Learning-rate schedules, per optimizer step."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(
    optimizer: Optimizer, *, total_steps: int, warmup_steps: int, final_share: float
) -> LambdaLR:
    """Linear warm-up to the optimizer's rate, then a half cosine down to a share of it.

    A run shorter than ten warm-ups warms up for a tenth of its steps, so that it still decays.
    """
    warmup = max(1, min(warmup_steps, total_steps // 10))

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)
