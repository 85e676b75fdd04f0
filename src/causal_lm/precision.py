"""``trainer.precision=auto``: bfloat16 where the hardware computes in it, float32 elsewhere."""

import logging
import statistics
import time

import torch

from causal_lm.report.files import is_rank_zero

log = logging.getLogger(__name__)

SIZE, ROUNDS = 512, 5  # of the matrix products that are timed
CPU_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")  # the last one is that of ARM


def has_bfloat16(accelerator: str) -> bool:
    """Whether the device of ``trainer.accelerator`` multiplies bfloat16 without emulating it."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    uses_mps = torch.backends.mps.is_available() and accelerator != "cpu"
    capabilities = torch.cpu.get_capabilities()
    return not uses_mps and any(capabilities.get(name) for name in CPU_INSTRUCTIONS)


def resolve(precision: str | int, accelerator: str) -> str | int:
    """The precision to train in, which is the given one unless that is ``auto``.

    Says in one line what was chosen; warns, with the factor measured on a matrix product, where the
    given one is emulated. The choice depends on the hardware alone, so ranks of one machine agree.
    """
    supported = has_bfloat16(accelerator)
    if precision == "auto":
        precision = "bf16-mixed" if supported else "32-true"
        if is_rank_zero():
            has = "has" if supported else "has no"
            log.info(f"trainer.precision=auto: {precision}, as the device {has} bf16 instructions")
    elif "bf16" in str(precision) and not supported and is_rank_zero():
        log.warning(
            f"trainer.precision={precision} is emulated here: a matrix product takes "
            f"{emulation_factor():.1f} times as long as in float32; type trainer.precision=auto"
        )
    return precision


def emulation_factor() -> float:
    """Time of a matrix product in bfloat16 over that in float32 on the CPU: medians, in turns."""
    seconds: dict[torch.dtype, list[float]] = {torch.bfloat16: [], torch.float32: []}
    for _ in range(ROUNDS + 1):
        for dtype, took in seconds.items():
            x = torch.ones(SIZE, SIZE, dtype=dtype)
            started = time.perf_counter()
            x @ x
            took.append(time.perf_counter() - started)
    slow, fast = (statistics.median(took[1:]) for took in seconds.values())
    return slow / fast
