"""Learning-rate schedules: pure functions of the optimizer step. Imports nothing slow to load.

Each takes the steps of the run and gives ``factor(step)``, the share of the peak rate at which the
optimizer takes that step (0, 1, …). All rise in a line first, ``1/n, 2/n … 1`` over n steps.
"""

import logging
import math
from collections.abc import Callable

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


def _after_warmup(total_steps: int, steps: int | str, cap: float) -> Callable[..., Factor]:
    """A decorator: ``shape(since, rest)`` of the steps since and after the warm-up -> factor."""
    rise, rule = warmup(total_steps, steps, cap)
    log.info(f"warm-up of {rise} steps out of {total_steps}: {rule}")

    def decorate(shape: Callable[[int, int], float]) -> Factor:
        def factor(step: int) -> float:
            return (step + 1) / rise if step < rise else shape(step - rise, total_steps - rise)

        return factor

    return decorate


def _half_cosine(progress: float, final_share: float) -> float:
    """From 1 down to ``final_share`` as ``progress`` goes from 0 to 1."""
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def constant(total_steps: int, *, warmup_steps: int | str, warmup_cap: float) -> Factor:
    """The peak rate throughout."""

    @_after_warmup(total_steps, warmup_steps, warmup_cap)
    def factor(since: int, rest: int) -> float:
        return 1.0

    return factor


def warmup_cosine(
    total_steps: int, *, warmup_steps: int | str, warmup_cap: float, final_share: float
) -> Factor:
    """A half cosine from the peak to ``final_share`` of it, where the run ends."""

    @_after_warmup(total_steps, warmup_steps, warmup_cap)
    def factor(since: int, rest: int) -> float:
        return _half_cosine(since / rest, final_share)

    return factor


def cosine_restarts(
    total_steps: int,
    *,
    warmup_steps: int | str,
    warmup_cap: float,
    period: int,
    peak_decay: float,
    final_share: float,
) -> Factor:
    """A half cosine every ``period`` steps (SGDR, https://arxiv.org/abs/1608.03983).

    Each starts at ``peak_decay`` times the start of the one before, and ends at ``final_share`` of
    its own.
    """

    @_after_warmup(total_steps, warmup_steps, warmup_cap)
    def factor(since: int, rest: int) -> float:
        cycle, within = divmod(since, period)
        return peak_decay**cycle * _half_cosine(within / period, final_share)

    return factor


def step(
    total_steps: int, *, warmup_steps: int | str, warmup_cap: float, every: int, drop: float
) -> Factor:
    """Times ``drop`` every so many steps."""

    @_after_warmup(total_steps, warmup_steps, warmup_cap)
    def factor(since: int, rest: int) -> float:
        return drop ** (since // every)

    return factor


def warmup_stable_decay(
    total_steps: int,
    *,
    warmup_steps: int | str,
    warmup_cap: float,
    decay_share: float,
    final_share: float,
) -> Factor:
    """The peak rate, then a line down to ``final_share`` of it over the last ``decay_share`` of the
    run (MiniCPM, https://arxiv.org/abs/2404.06395): how long to train can be said late."""
    decay = round(decay_share * total_steps)

    @_after_warmup(total_steps, warmup_steps, warmup_cap)
    def factor(since: int, rest: int) -> float:
        gone = max(0, since - (rest - decay))
        return 1 - (1 - final_share) * min(1.0, gone / max(1, decay))

    return factor
