"""Files that are whole or absent: written beside their place, then renamed into it."""

import json
import math
import os
from pathlib import Path
from typing import Any


def write_text(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def strict(data: dict[str, Any]) -> dict[str, Any]:
    """NaN and infinities, which JSON has no word for, become null."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in data.items()
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Strict JSON (see :func:`strict`)."""
    write_text(path, json.dumps(strict(data), indent=2, allow_nan=False) + "\n")
