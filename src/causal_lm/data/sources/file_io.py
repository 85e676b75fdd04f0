"""Find the files of a corpus, and read them decompressed."""

import collections
import glob
import gzip
import logging
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from hydra.utils import to_absolute_path

from causal_lm import extras

log = logging.getLogger(__name__)

FORMATS = ("txt", "jsonl", "json", "csv", "parquet")
COMPRESSIONS = (".gz", ".zst")
COMPRESSION_RATIO = 4  # bytes of text per byte of a compressed file, roughly
BLOCK_BYTES = 1 << 20  # bytes that are read from a file at a time


def find_files(pattern: str, key: str, any_format: bool = False) -> list[Path]:
    """The files of a path, a folder or a glob, sorted; messages name the configuration ``key``.

    In a folder or a glob, hidden files and (unless ``any_format``) files of other formats are left
    out, with a warning. Raises FileNotFoundError where no file is left.
    """
    root = local_path(pattern)
    if root.is_file():
        return [root]
    base = next(p for p in (root, *root.parents) if p.is_dir())
    matches = glob.glob(str(root), recursive=True, include_hidden=True)
    paths = root.rglob("*") if base == root else map(Path, matches)
    found, others = [], collections.Counter[str]()
    for path in sorted(path for path in paths if path.is_file()):
        if any(part.startswith(".") for part in path.relative_to(base).parts):
            others["hidden"] += 1
        elif any_format or known_format(path):
            found.append(path)
        else:
            others[path.suffix or "without a suffix"] += 1
    skipped = ", ".join(f"{n:,} {kind}" for kind, n in sorted(others.items()))
    if not found:
        hint = f", only other files ({skipped}): set data.format to read them" if skipped else ""
        raise FileNotFoundError(f"{key}={pattern}: no {', '.join(FORMATS)} file found{hint}")
    if skipped:
        log.warning(f"{key}={pattern}: {len(found):,} files are read; not read: {skipped}")
    return found


def local_path(path: str) -> Path:
    """Relative ones are of where the command was typed, under ``hydra.job.chdir`` too."""
    return Path(to_absolute_path(str(Path(path).expanduser())))


def known_format(path: Path) -> str | None:
    """The format that a file's suffix names, in any case and before .gz or .zst; None: another."""
    plain = Path(path.stem) if path.suffix.lower() in COMPRESSIONS else path
    suffix = plain.suffix.lower()[1:]
    return suffix if suffix in FORMATS else None


def text_size(path: Path) -> int:
    """Bytes of a file's text, roughly where it is compressed."""
    return path.stat().st_size * (COMPRESSION_RATIO if path.suffix.lower() in COMPRESSIONS else 1)


def open_bytes(path: Path) -> IO[bytes]:
    """Open a file, decompressed where it ends in .gz or .zst (which needs the extra zstd)."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path)  # type: ignore[return-value]  # a GzipFile reads bytes
    if path.suffix.lower() == ".zst":
        return extras.load("zstandard", "zstd").open(path)
    return path.open("rb")


def read_blocks(path: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file in blocks; ValueError where it cannot be decompressed."""
    with open_bytes(path) as file:
        try:
            while block := file.read(BLOCK_BYTES):
                yield block
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} cannot be decompressed: {error}") from error
