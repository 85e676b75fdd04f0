"""Learning-rate schedules: pure functions of the optimizer step. Imports only the standard library.

Each factory takes the optimizer steps of the run and returns the factor of the peak learning rate
at step 0, 1, … All begin with a linear warm-up, ``1/n, 2/n … 1`` over n steps.
``warmup_cosine`` and ``warmup_stable_decay`` reach ``final_share`` at the last step.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any

log = logging.getLogger(__name__)
Factor = Callable[[int], float]  # optimizer step -> factor of the peak learning rate


def warmup(total_steps: int, steps: int | str, cap: float) -> tuple[int, str]:
    """Length of the warm-up in optimizer steps, and the reason for it, for the log: ``steps``, or
    for ``auto`` the longer of 500 and a tenth of the run; at most the fraction ``cap`` of the run,
    so that a short run still has time at its peak."""
    if steps == "auto":
        requested = max(500, total_steps // 10)
        reason = "the minimum of 500" if requested == 500 else "a tenth of the run"
    else:
        requested, reason = int(steps), "scheduler.warmup_steps"
    limit = int(cap * total_steps)
    return (requested, reason) if requested <= limit else (limit, f"capped at {cap:.0%}")


def _schedule(
    shape: Any, total_steps: int, *, warmup_steps: int | str, warmup_cap: float, **options: float
) -> Factor:
    """The warm-up, and after its W steps ``shape(step, W, total_steps, **options)``."""
    n_warmup, reason = warmup(total_steps, warmup_steps, warmup_cap)

    def factor(step: int) -> float:
        if step < n_warmup:
            return (step + 1) / n_warmup
        return shape(step, n_warmup, total_steps, **options)

    end = f"the last step is at {factor(total_steps - 1):.3g} of the peak learning rate"
    log.info(f"warm-up: {n_warmup} of {total_steps} steps ({reason}); {end}")
    return factor


def _half_cosine(progress: float, final_share: float) -> float:
    """From 1 down to ``final_share`` as ``progress`` goes from 0 to 1."""
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _constant(step: int, n_warmup: int, total: int) -> float:
    return 1.0


def _warmup_cosine(step: int, n_warmup: int, total: int, final_share: float) -> float:
    """One half cosine, lowest at the last step of the run."""
    return _half_cosine((step + 1 - n_warmup) / (total - n_warmup), final_share)


def _cosine_restarts(
    step: int, n_warmup: int, total: int, period: int, peak_decay: float, final_share: float
) -> float:
    """A half cosine every ``period`` steps, down to ``final_share`` of its own peak, which is
    ``peak_decay`` times the one before (SGDR, https://arxiv.org/abs/1608.03983)."""
    cycle, within = divmod(step - n_warmup, period)
    return peak_decay**cycle * _half_cosine(within / max(1, period - 1), final_share)


def _step(step: int, n_warmup: int, total: int, every: int, drop: float) -> float:
    """Multiplied by ``drop`` every ``every`` steps."""
    return drop ** ((step - n_warmup) // every)


def _warmup_stable_decay(
    step: int, n_warmup: int, total: int, decay_share: float, final_share: float
) -> float:
    """The peak, then a linear decay to ``final_share`` over the last ``decay_share`` of the run, or
    over what the warm-up leaves of it (MiniCPM, https://arxiv.org/abs/2404.06395). A checkpoint
    from before the decay can be continued for more steps."""
    decay_steps = min(round(decay_share * total), total - n_warmup)
    done = max(0, step + 1 - (total - decay_steps))
    return 1 - (1 - final_share) * min(1.0, done / max(1, decay_steps))


constant = partial(_schedule, _constant)
warmup_cosine = partial(_schedule, _warmup_cosine)
cosine_restarts = partial(_schedule, _cosine_restarts)
step = partial(_schedule, _step)
warmup_stable_decay = partial(_schedule, _warmup_stable_decay)
