"""TextFiles: a source of local files."""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import Any

from causal_lm.data import token_cache
from causal_lm.data.sources import file_io
from causal_lm.data.sources.file_reader import FileReader
from causal_lm.data.tokenize_corpus import TEST, TRAIN, VAL, DocumentPart, HeldOut


@dataclass(kw_only=True)
class TextFiles(FileReader):
    """Source of UTF-8 text files and files of records.

    ``path`` is a file, which is read whatever its suffix; or a folder or a glob, of which hidden
    files are not read, and files with other suffixes only where ``format`` is given.
    """

    path: str
    val_path: str | None = None  # the same, for validation; None: val_share of the documents, or
    # the last part of the text where there is one document only
    test_path: str | None = None  # the same for testing; None: test_share of the documents

    @functools.cached_property
    def files(self) -> list[list[Path]]:
        """The files of ``path``, ``val_path`` and ``test_path``. Raises FileNotFoundError for none,
        ValueError for one that is in two of them, or does not have the unit or the fields."""
        find = functools.partial(file_io.find_files, any_format=self.format is not None)
        paths = {f"data.{key}": getattr(self, key) for key in ("path", "val_path", "test_path")}
        found = {key: find(path, key) if path else [] for key, path in paths.items()}
        for path in chain(*found.values()):
            self.check(path)
        for (key, some), (other, others) in combinations(found.items(), 2):
            if both := {p.resolve() for p in some} & {p.resolve() for p in others}:
                raise ValueError(f"{min(both)} is in {key} and in {other}")
        return list(found.values())

    def identity(self) -> dict[str, Any]:
        found = [[token_cache.file_identity(path) for path in paths] for paths in self.files]
        return super().identity() | {"files": found}

    def size(self) -> int:
        return sum(map(file_io.text_size, chain(*self.files)))

    def parts(self) -> Iterator[tuple[Iterable[DocumentPart], HeldOut]]:
        train, val, test = self.files
        for files, split in ((test, TEST), (val, VAL)):
            yield chain.from_iterable(map(self.documents, files)), split
        held_out = self.held_out(val, test)
        if len(train) > 1 or self.unit_of(train[0]) != "file" or not any(held_out):
            yield chain.from_iterable(map(self.documents, train)), held_out
            return
        start, size = 0, sum(map(len, file_io.read_blocks(train[0])))  # decompressed
        for split, fraction_after in ((TRAIN, sum(held_out)), (VAL, held_out[1]), (TEST, 0.0)):
            end = _start_of_line(train[0], int(size * (1 - fraction_after)), size)
            if end > start:
                yield self.whole_file(train[0], start, end), split
            start = end


def _start_of_line(path: Path, cut: int, size: int) -> int:
    """The start of a line, or else of a UTF-8 character, from byte ``cut`` on."""
    with file_io.open_bytes(path) as file:
        file.seek(cut)
        line = file.readline(file_io.BLOCK_BYTES)
    if line.endswith(b"\n") and cut + len(line) < size:
        return cut + len(line)
    return cut + next((i for i, byte in enumerate(line) if byte & 0xC0 != 0x80), 0)
