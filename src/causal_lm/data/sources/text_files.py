"""TextFiles: a source of local files."""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from causal_lm.data import token_cache
from causal_lm.data.sources import file_io
from causal_lm.data.sources.file_reader import FileReader
from causal_lm.data.tokenize_corpus import DocumentPart


@dataclass(kw_only=True)
class TextFiles(FileReader):
    """Source of UTF-8 text files and files of records.

    ``path`` is a file, which is read whatever its suffix; or a folder or a glob, of which hidden
    files are not read, and files with other suffixes only where ``format`` is given.
    """

    path: str
    val_path: str | None = None  # the same, for validation; None: val_share of the documents, or
    # the last part of the text where there is one document only

    @functools.cached_property
    def files(self) -> tuple[list[Path], list[Path]]:
        """The files of ``path`` and of ``val_path``. Raises FileNotFoundError for none, ValueError
        for one that is in both, or does not have the unit or the fields."""
        find = functools.partial(file_io.find_files, any_format=self.format is not None)
        train = find(self.path, "data.path")
        val = find(self.val_path, "data.val_path") if self.val_path else []
        for path in train + val:
            self.check(path)
        if both := {p.resolve() for p in train} & {p.resolve() for p in val}:
            raise ValueError(f"{min(both)} is in data.path and in data.val_path")
        return train, val

    def identity(self) -> dict[str, Any]:
        found = [[token_cache.file_identity(path) for path in paths] for paths in self.files]
        return super().identity() | {"files": found}

    def size(self) -> int:
        return sum(map(file_io.text_size, chain(*self.files)))

    def parts(self) -> Iterator[tuple[Iterable[DocumentPart], bool | None]]:
        train, val = self.files
        if val:
            yield chain.from_iterable(map(self.documents, val)), True
        elif len(train) == 1 and self.unit_of(train[0]) == "file":
            cut = _start_of_last_part(train[0], self.val_share)
            yield self.whole_file(train[0], 0, cut), False
            yield self.whole_file(train[0], cut), True
            return
        yield chain.from_iterable(map(self.documents, train)), False if val else None


def _start_of_last_part(path: Path, fraction: float) -> int:
    """The start of a line, or else of a UTF-8 character, after which about ``fraction`` is left."""
    size = sum(map(len, file_io.read_blocks(path)))  # decompressed
    cut = int(size * (1 - fraction))
    with file_io.open_bytes(path) as file:
        file.seek(cut)
        line = file.readline(file_io.BLOCK_BYTES)
    if line.endswith(b"\n") and cut + len(line) < size:
        return cut + len(line)
    return cut + next((i for i, byte in enumerate(line) if byte & 0xC0 != 0x80), 0)
