"""A command that counts to two and writes a checkpoint at each number, to be killed and started
again: ``python checkpoint_loop.py FOLDER``."""

import sys
from pathlib import Path

import torch

from causal_lm.checkpoint_file import AtomicCheckpointIO

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    last, save = folder / "last.ckpt", AtomicCheckpointIO().save_checkpoint
    state = {"step": 0, "weights": torch.arange(1000.0)}
    if last.exists():
        state = torch.load(last, weights_only=True)
    print(f"resumed from step {state['step']}")
    for step in range(state["step"] + 1, 3):
        state = {"step": step, "weights": state["weights"] * 1.5 + step}
        save(state, last)  # over the one before
        save(state, folder / f"step_{step}.ckpt")
