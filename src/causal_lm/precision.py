"""``trainer.precision``: what ``auto`` means on this hardware, and what is emulated on it."""

import logging
import statistics
import time

import torch

from causal_lm.report.files import is_rank_zero
from causal_lm.schema import is_float16

log = logging.getLogger(__name__)

SIZE, ROUNDS = 256, 5  # of the matrix products that are timed
CPU_INSTRUCTIONS = {  # the last ones are those of ARM
    torch.bfloat16: ("avx512_bf16", "amx_bf16", "bf16"),
    torch.float16: ("avx512_fp16", "amx_fp16", "fp16_arith"),
}


def device_type(accelerator: str) -> str:
    """``cuda``, ``mps`` or ``cpu``: what ``trainer.accelerator`` is on this machine."""
    if accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available():
        return "cuda"
    return "mps" if accelerator != "cpu" and torch.backends.mps.is_available() else "cpu"


def has_instructions(dtype: torch.dtype, device: str) -> bool:
    """Whether a type of device multiplies bfloat16 or float16 without emulating it."""
    if device == "cpu":
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name) for name in CPU_INSTRUCTIONS[dtype])
    if dtype == torch.float16:
        return True
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def resolve(precision: str | int, accelerator: str) -> str | int:
    """The precision to train in: the given one, unless that is ``auto``, or ``16-mixed`` on a CPU.

    Says in one line what was chosen; warns, with the factor measured on a matrix product, where it
    is emulated. The choice depends on the hardware alone, so ranks of one machine agree.
    """
    device, say = device_type(accelerator), log.info if is_rank_zero() else log.debug
    if precision == "auto":
        supported = has_instructions(torch.bfloat16, device)
        precision = "bf16-mixed" if supported else "32-true"
        has = "has" if supported else "has no"
        say(f"trainer.precision=auto: {precision}, as the device {has} bf16 instructions")
        return precision
    if device == "cpu" and is_float16(precision):
        say(f"trainer.precision={precision}: bf16-mixed, which Lightning replaces it by on a CPU")
        precision = "bf16-mixed"
    dtype = torch.bfloat16 if "bf16" in str(precision) else torch.float16
    if "16" in str(precision) and not has_instructions(dtype, device) and is_rank_zero():
        log.warning(
            f"trainer.precision={precision} is emulated here: a matrix product takes "
            f"{emulation_factor(dtype, device):.1f} times as long as in float32; "
            "type trainer.precision=auto"
        )
    return precision


def emulation_factor(dtype: torch.dtype, device: str) -> float:
    """Time of a matrix product in ``dtype`` over that in float32: medians, in turns."""
    seconds: dict[torch.dtype, list[float]] = {dtype: [], torch.float32: []}
    for _ in range(ROUNDS + 1):
        for kind, took in seconds.items():
            x = torch.ones(SIZE, SIZE, dtype=kind, device=device)
            started = time.perf_counter()
            (x @ x)[0, 0].item()  # waits for the device
            took.append(time.perf_counter() - started)
    slow, fast = (statistics.median(took[1:]) for took in seconds.values())
    return slow / fast
