"""Set-ups that the preflight must judge rightly: `RIGHT` and, each with a right twin, `FAULTY`."""

from . import causal, eos, logits, pad, position, reduction, right, shift  # noqa: F401
from .registry import FAULTY, RIGHT, Setup

__all__ = ["FAULTY", "RIGHT", "Setup"]
