"""The files of a run: its directory, atomic writing, and what can be read back from it."""

import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from causal_lm.config import ConfigError

MARKER = ".causal_lm_run"  # marks the directory of a run, and is locked while the run writes
HYDRA_FILES = r"\.hydra|.*\.log"  # pattern of what Hydra writes into the directory of a job


def is_rank_zero() -> bool:
    """Whether this process writes files; known before the Trainer is made."""
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID")
    return all(int(os.environ.get(name) or 0) == 0 for name in ranks)


def claim_directory(path: Path, ignored: str = "") -> None:
    """Make the directory of a run, with its :data:`MARKER`. Raises ConfigError where it has other
    files than the pattern ``ignored`` allows, but no marker: they are not those of a run."""
    path.mkdir(parents=True, exist_ok=True)
    marker = path / MARKER
    if not marker.exists():
        others = sorted(p.name for p in path.iterdir() if not re.fullmatch(ignored, p.name))
        if others:
            found = f"{path.absolute()} is not the directory of a run: it holds {others[0]}"
            raise ConfigError(f"{found}, but no {MARKER}; set hydra.run.dir to a new directory")
        marker.touch()


@contextmanager
def replacing(path: Path) -> Iterator[TextIO]:
    """Open a UTF-8 file beside ``path`` for writing; rename it to ``path`` at the end. A reader
    finds the old file or the new one, never a part, also where writing raises."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            yield file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 atomically, see :func:`replacing`."""
    with replacing(path) as file:
        file.write(text)


def sample_files(directory: Path) -> list[tuple[int, Path]]:
    """Step and path of each file ``samples/step_….txt`` of a run, in the order of the steps."""
    files = [path for path in directory.glob("samples/step_*.txt") if path.is_file()]
    steps = [re.fullmatch(r"step_(\d+)\.txt", path.name) for path in files]
    return sorted((int(m[1]), path) for m, path in zip(steps, files, strict=True) if m)


def replace_nonfinite(data: dict[str, Any]) -> dict[str, Any]:
    """A copy of ``data`` with None for NaN and infinities, which JSON cannot represent."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in data.items()
    }


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write ``data`` as JSON, null for NaN and infinities, atomically."""
    write_text(path, json.dumps(replace_nonfinite(data), indent=2, allow_nan=False) + "\n")


def read_summary(path: Path) -> dict[str, Any]:
    """Read a ``summary.json``, whose missing keys are None. Raises OSError where there is none,
    ValueError where it is damaged, or not a summary."""
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):  # not UTF-8, or not JSON
        summary = None
    if not isinstance(summary, dict) or not isinstance(summary.get("status"), str):
        raise ValueError(f"{path} is damaged, or no summary of a run: delete it, or run again")
    return defaultdict(lambda: None, summary)
