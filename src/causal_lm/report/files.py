"""Write files atomically: a reader finds the old file or the new one, never a part."""

import json
import math
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 into a file beside ``path``, then rename it to ``path``.

    Raises:
        OSError: the disk is full, or the folder cannot be written; ``path`` is as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_nonfinite(data: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``data`` with None for NaN and infinities, which JSON cannot represent."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in data.items()
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write ``data`` as JSON, null for NaN and infinities, atomically."""
    write_text(path, json.dumps(replace_nonfinite(data), indent=2, allow_nan=False) + "\n")
