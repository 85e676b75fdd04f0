"""``trainer.precision``: what ``auto`` means on this hardware, and what is emulated on it."""

import logging

import torch
from torch.utils.benchmark import Timer

from causal_lm.report.files import is_rank_zero
from causal_lm.schema import is_float16

log = logging.getLogger(__name__)

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
        return any(map(torch.cpu.get_capabilities().get, CPU_INSTRUCTIONS[dtype]))
    if device == "cuda" and dtype == torch.bfloat16:
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return dtype == torch.float16


def resolve(precision: str | int, accelerator: str) -> str | int:
    """The precision to train in: the given one, unless that is ``auto``, or ``16-mixed`` on a CPU.

    Says in one line what was chosen; warns, with the factor measured on a matrix product, where it
    is emulated. The choice depends on the hardware alone, so ranks of one machine agree.
    """
    device, chosen, reason = device_type(accelerator), precision, ""
    if precision == "auto":
        supported = has_instructions(torch.bfloat16, device)
        chosen = "bf16-mixed" if supported else "32-true"
        reason = f"as the device has {'' if supported else 'no '}bf16 instructions"
    elif device == "cpu" and is_float16(precision):
        chosen, reason = "bf16-mixed", "as Lightning has no float16 autocast on a CPU"
    if reason and is_rank_zero():
        log.info(f"trainer.precision={precision}: {chosen}, {reason}")
    dtype = torch.bfloat16 if "bf16" in str(chosen) else torch.float16
    if "16" in str(chosen) and not has_instructions(dtype, device) and is_rank_zero():
        factor = f"{emulation_factor(dtype, device):.1f} times as long as in float32"
        hint = f"a matrix product takes {factor}; type trainer.precision=auto"
        log.warning(f"trainer.precision={chosen} is emulated here: {hint}")
    return chosen


def emulation_factor(dtype: torch.dtype, device: str) -> float:
    """Time of a matrix product in ``dtype`` over that in float32, of each the median."""
    seconds = []
    for kind in (dtype, torch.float32):
        x = torch.ones(256, 256, dtype=kind, device=device)
        timer = Timer("x @ x", globals={"x": x}, num_threads=torch.get_num_threads())
        seconds.append(timer.blocked_autorange(min_run_time=0.05).median)
    return seconds[0] / seconds[1]
