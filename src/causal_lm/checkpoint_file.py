"""The checkpoint file: written whole or not at all, and read with a check of its parts."""

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from causal_lm.config import rename_file

CONFIG, TOKENIZER = "causal_lm_config", "causal_lm_tokenizer"
"""Keys of a checkpoint for the configuration and the tokenizer of its run, as plain data."""
PARTS: dict[tuple[str, ...], type] = {
    (CONFIG,): dict, (CONFIG, "model"): dict, (CONFIG, "data"): dict,
    (CONFIG, "data", "max_length"): int, (TOKENIZER,): dict, ("state_dict",): dict,
    ("global_step",): int,
}  # fmt: skip
"""What a checkpoint must hold: keys -> type."""


class RefusedError(ValueError):
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
        part = path.with_name(f".{path.name}{self.SUFFIX}")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        if hasattr(os, "O_DIRECTORY"):  # the new name, too, must reach the disk
            folder = os.open(path.parent, os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)


def read(path: str | Path) -> dict[str, Any]:
    """Load a checkpoint of this project onto the CPU: tensors and plain data only.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not a checkpoint of this project.
    """
    path = rename_file(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no checkpoint at {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read: it is damaged, or no checkpoint") from error
    for keys, kind in PARTS.items():
        part = checkpoint
        for key in keys:
            part = part.get(key) if isinstance(part, dict) else None
        if not isinstance(part, kind):
            wrong = f"{'.'.join(keys)} is {type(part).__name__}, not {kind.__name__}"
            raise ValueError(f"{path} is not a checkpoint of this project: {wrong}")
    return checkpoint
