"""TextFiles: a source of local files."""

import glob
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from causal_lm.data import token_cache
from causal_lm.data.sources.file_reader import BLOCK_BYTES, SUFFIXES, FileReader
from causal_lm.data.tokenize_corpus import Part


class TextFiles(FileReader):
    """Source of UTF-8 text files and files of records.

    Args:
        path: a file, a folder, or a glob.
        val_path: the same, for validation; null: ``val_share`` of the documents, or the last part
            of the text where there is one document only.
        options: see :class:`causal_lm.data.sources.file_reader.FileReader`.
    """

    def __init__(self, *, path: str, val_path: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.path, self.val_path = path, val_path

    def files(self) -> tuple[list[Path], list[Path]]:
        """The files of ``path`` and of ``val_path``.

        Raises:
            FileNotFoundError: there is none.
            ValueError: a file is in both, or its kind is not read or does not have the unit.
        """
        train = find_files(self.path, "data.path")
        val = find_files(self.val_path, "data.val_path") if self.val_path else []
        for path in train + val:
            self.check(path)
        both = {p.resolve() for p in train} & {p.resolve() for p in val}
        if both:
            raise ValueError(f"{min(both)} is in data.path and in data.val_path")
        return train, val

    def identity(self) -> dict[str, Any]:
        files = [[token_cache.file_identity(path) for path in paths] for paths in self.files()]
        return super().identity() | {"files": files}

    def size(self) -> int:
        return sum(path.stat().st_size for path in chain(*self.files()))

    def parts(self) -> Iterator[tuple[Iterable[Part], bool | None]]:
        train, val = self.files()
        if val:
            yield chain.from_iterable(map(self.documents, train)), False
            yield chain.from_iterable(map(self.documents, val)), True
        elif len(train) == 1 and self.unit_of(train[0]) == "file":
            cut = _start_of_last_part(train[0], self.val_fraction)
            yield self.whole_file(train[0], 0, cut), False
            yield self.whole_file(train[0], cut), True
        else:
            yield chain.from_iterable(map(self.documents, train)), None


def find_files(pattern: str, key: str) -> list[Path]:
    """The files of a path, a folder or a glob, sorted.

    Args:
        key: configuration key that ``pattern`` comes from, for messages.

    Raises:
        FileNotFoundError: there is none.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix in SUFFIXES]
    else:
        found = [path] if path.is_file() else [*map(Path, glob.glob(str(path), recursive=True))]
    found = sorted(p for p in found if p.is_file())
    if not found:
        raise FileNotFoundError(f"{key}={pattern}: no {', '.join(SUFFIXES)} file is there")
    return found


def _start_of_last_part(path: Path, fraction: float) -> int:
    """The byte at which about the last ``fraction`` of a file begins: the first of a line, or of a
    character where no line ends nearby."""
    size = path.stat().st_size
    cut = int(size * (1 - fraction))
    with path.open("rb") as file:
        file.seek(cut)
        line = file.readline(BLOCK_BYTES)
    if line.endswith(b"\n") and cut + len(line) < size:
        return cut + len(line)
    return cut + next((i for i, byte in enumerate(line) if byte & 0xC0 != 0x80), 0)
