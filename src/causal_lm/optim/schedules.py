"""Learning-rate schedules: pure functions of the optimizer step. Imports nothing slow to load.

Each takes the steps of the run and gives ``factor(step)``, the share of the peak rate at which the
optimizer takes that step (0, 1, …). All rise in a line first, ``1/n, 2/n … 1`` over n steps;
``warmup_cosine`` and ``warmup_stable_decay`` are down at the last step of the run.
"""

import logging
import math
from collections.abc import Callable
from functools import partial

log = logging.getLogger(__name__)

Factor = Callable[[int], float]


def warmup(total_steps: int, steps: int | str, cap: float) -> tuple[int, str]:
    """Steps of the warm-up, and which rule said so.

    Args:
        total_steps: of the run.
        steps: so many, or ``auto`` for the longer of 500 and a tenth of the run.
        cap: the largest share of the run, so that a short one still has time at its peak.
    """
    wanted = max(500, total_steps // 10) if steps == "auto" else int(steps)
    rule = "scheduler.warmup_steps"
    if steps == "auto":
        rule = "500 at least" if wanted == 500 else "a tenth of the run"
    most = int(cap * total_steps)
    return (wanted, rule) if wanted <= most else (most, f"at most {cap:g} of the run")


def _schedule(
    shape: Callable[..., float],
    total_steps: int,
    *,
    warmup_steps: int | str,
    warmup_cap: float,
    **keys: float,
) -> Factor:
    """The warm-up and, from step ``rise`` on, ``shape(step, rise, total_steps, **keys)``."""
    rise, rule = warmup(total_steps, warmup_steps, warmup_cap)

    def factor(step: int) -> float:
        return (step + 1) / rise if step < rise else shape(step, rise, total_steps, **keys)

    last = factor(total_steps - 1)
    log.info(f"warm-up of {rise} steps out of {total_steps}: {rule}; the last step at {last:.3g}")
    return factor


def _half_cosine(progress: float, final_share: float) -> float:
    """From 1 down to ``final_share`` as ``progress`` goes from 0 to 1."""
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _constant(step: int, rise: int, total: int) -> float:
    """The peak rate throughout."""
    return 1.0


def _warmup_cosine(step: int, rise: int, total: int, final_share: float) -> float:
    """A half cosine from the peak to ``final_share`` of it, at the last step."""
    return _half_cosine((step + 1 - rise) / (total - rise), final_share)


def _cosine_restarts(
    step: int, rise: int, total: int, period: int, peak_decay: float, final_share: float
) -> float:
    """A half cosine every ``period`` steps (SGDR, https://arxiv.org/abs/1608.03983).

    Each starts at ``peak_decay`` times the start of the one before, and its last step is at
    ``final_share`` of its own.
    """
    cycle, within = divmod(step - rise, period)
    return peak_decay**cycle * _half_cosine(within / max(1, period - 1), final_share)


def _step(step: int, rise: int, total: int, every: int, drop: float) -> float:
    """Times ``drop`` every so many steps."""
    return drop ** ((step - rise) // every)


def _warmup_stable_decay(
    step: int, rise: int, total: int, decay_share: float, final_share: float
) -> float:
    """The peak rate, then a line down to ``final_share`` of it over the last ``decay_share`` of the
    run, or what the warm-up leaves of it (MiniCPM, https://arxiv.org/abs/2404.06395): how long to
    train can be said late."""
    decay = min(round(decay_share * total), total - rise)
    gone = max(0, step + 1 - (total - decay))
    return 1 - (1 - final_share) * min(1.0, gone / max(1, decay))


constant = partial(_schedule, _constant)
warmup_cosine = partial(_schedule, _warmup_cosine)
cosine_restarts = partial(_schedule, _cosine_restarts)
step = partial(_schedule, _step)
warmup_stable_decay = partial(_schedule, _warmup_stable_decay)
