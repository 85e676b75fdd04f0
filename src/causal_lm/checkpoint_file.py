"""Atomic writing and validated reading of checkpoint files."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from causal_lm.config import ConfigError

CONFIG, TOKENIZER = "causal_lm_config", "causal_lm_tokenizer"
"""Keys of a checkpoint for the configuration and the tokenizer of its run, as plain data."""
PARTS: dict[tuple[str, ...], type] = {  # what a checkpoint must hold: keys -> type
    (CONFIG,): dict, (CONFIG, "model"): dict, (CONFIG, "data"): dict,
    (CONFIG, "data", "max_length"): int, (TOKENIZER,): dict, ("state_dict",): dict,
    ("global_step",): int,
}  # fmt: skip


class RefusedError(ConfigError):
    """A run cannot continue from this checkpoint; no file of the earlier run is changed."""


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside the old one, flushes it to the disk, then renames it.

    The old file stays until the new one is complete. (Lightning writes into the system's temporary
    folder and, where that is another file system, copies over the old file.)
    """

    SUFFIX = ".part"

    def save_checkpoint(self, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}{self.SUFFIX}")
        try:
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        descriptor = os.open(path.parent, os.O_DIRECTORY)  # flush the rename, too
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of this project onto the CPU: tensors and plain data only. Raises
    FileNotFoundError, or ValueError where it is damaged or not a checkpoint of this project."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: it is damaged, or not a checkpoint") from error
    for keys, kind in PARTS.items():
        value = checkpoint
        for key in keys:
            value = value.get(key) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            wrong = f"{'.'.join(keys)} is {type(value).__name__}, not {kind.__name__}"
            raise ValueError(f"{path} is not a checkpoint of this project: {wrong}")
    return checkpoint
