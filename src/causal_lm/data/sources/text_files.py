"""Text files: .txt, .jsonl and .parquet."""

import codecs
import glob
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from causal_lm import extras
from causal_lm.data import token_cache
from causal_lm.data.sources.base import CHUNK, TextSource
from causal_lm.data.tokenize_corpus import Chunk, Segments

KINDS = (".txt", ".jsonl", ".parquet")
MAX_UNIT_BYTES = 16 << 20
"""Bytes of a line or paragraph; a longer one is a fault (of a file that has no lines, mostly)."""

Part = tuple[Segments, bool]
"""A document, or a part of one, and whether it ends there."""


def find(pattern: str, key: str) -> list[Path]:
    """The files of a path, a folder or a glob, in a fixed order.

    Raises:
        FileNotFoundError: there is none.
        ValueError: one is of a kind that is not read here.
    """
    path = Path(pattern).expanduser()
    if path.is_dir():
        found = [p for p in path.rglob("*") if p.suffix in KINDS]
    else:
        found = [path] if path.is_file() else [*map(Path, glob.glob(str(path), recursive=True))]
    found = sorted(p for p in found if p.is_file())
    if not found:
        raise FileNotFoundError(f"{key}={pattern}: there is no {', '.join(KINDS)} file there")
    for other in found:
        if other.suffix not in KINDS:
            raise ValueError(f"{key}={pattern}: {other} is none of {', '.join(KINDS)}")
    return found


class Text(TextSource):
    """Source of UTF-8 text files.

    A fault in the data (bytes that are not UTF-8, a file without text, a record that is no JSON or
    lacks the field, a line longer than 16 MiB) stops the reading, or what it is in is left out and
    counted. Blank lines, paragraphs and records are no documents, and no fault.

    Args:
        path: a file, a folder, or a glob.
        val_path: the same, held out. Without it ``val_share`` of the documents are; of one long
            document, its last part.
        unit: what a document is: ``file``, ``line`` or ``paragraph`` (up to a blank line) of a
            .txt, ``record`` of a .jsonl or .parquet; null: file or record.
        field: key of a record's text.
        prompt_field: key of a record's prompt, which comes before the text and is no target.
        on_error: ``raise``, or ``skip`` to leave out the unit that is at fault.
        options: see :class:`causal_lm.data.sources.base.TextSource`.
    """

    def __init__(
        self,
        *,
        path: str,
        val_path: str | None = None,
        unit: str | None = None,
        field: str = "text",
        prompt_field: str | None = None,
        on_error: str = "raise",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.path, self.val_path, self.unit = path, val_path, unit
        self.fields = [prompt_field, field] if prompt_field else [field]
        self.on_error = on_error

    def files(self) -> tuple[list[Path], list[Path]]:
        """Of training (and of validation, where it has no files of its own), and of validation.

        Raises:
            FileNotFoundError: there is none.
            ValueError: a file in both, or of a kind that does not have the unit.
        """
        train = find(self.path, "data.path")
        val = find(self.val_path, "data.val_path") if self.val_path else []
        for path in train + val:
            units = ("file", "line", "paragraph") if path.suffix == ".txt" else ("record",)
            if self.unit and self.unit not in units:
                raise ValueError(f"data.unit={self.unit}: {path} has {' or '.join(units)} only")
            if len(self.fields) > 1 and path.suffix == ".txt":
                raise ValueError(f"data.prompt_field is a key of records, and {path} has none")
        both = {p.resolve() for p in train} & {p.resolve() for p in val}
        if both:
            raise ValueError(f"{min(both)} is in data.path and in data.val_path")
        return train, val

    def identity(self) -> dict[str, Any]:
        files = [[token_cache.identity(path) for path in paths] for paths in self.files()]
        return {"files": files, "unit": self.unit, "fields": self.fields, "skip": self.on_error}

    def size(self) -> int:
        return sum(path.stat().st_size for path in chain(*self.files()))

    def read(self) -> Iterator[Chunk]:
        train, val = self.files()
        if val:
            yield from self.chunks(chain.from_iterable(map(self._documents, train)), val=False)
            yield from self.chunks(chain.from_iterable(map(self._documents, val)), val=True)
        elif len(train) == 1 and self._unit(train[0]) == "file":
            cut = _last_part(train[0], self.val_share)
            yield from self.chunks(self._file(train[0], 0, cut), val=False)
            yield from self.chunks(self._file(train[0], cut), val=True)
        else:
            yield from self.chunks(chain.from_iterable(map(self._documents, train)))

    def _unit(self, path: Path) -> str:
        return self.unit or ("file" if path.suffix == ".txt" else "record")

    def _documents(self, path: Path) -> Iterator[Part]:
        unit = self._unit(path)
        if unit == "file":
            yield from self._file(path)
            return
        if not path.stat().st_size:
            self._fault("empty files", f"{path} is empty")
        read = {"line": self._lines, "paragraph": self._paragraphs, "record": self._records}
        for segments in read[unit](path):
            if any(map(str.strip, segments)):
                yield segments, True
            else:
                self.left_out[f"blank {unit}s"] += 1

    def _fault(self, kind: str, what: str) -> None:
        if self.on_error == "raise":
            raise ValueError(f"{what}: mend it, or leave such out with data.on_error=skip")
        self.left_out[kind] += 1

    def _file(self, path: Path, start: int = 0, end: int | None = None) -> Iterator[Part]:
        """The bytes from ``start`` to ``end`` of a file, in parts that end with a line."""
        size = path.stat().st_size
        if not size:
            return self._fault("empty files", f"{path} is empty")
        if bad := _not_utf8(path):
            return self._fault("files that are not UTF-8", f"{path}, {bad}")
        decoder = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")()
        text, left = "", (size if end is None else end) - start
        with path.open("rb") as file:
            file.seek(start)
            while block := file.read(min(CHUNK, left)):
                left -= len(block)
                text += decoder.decode(block)
                if left:
                    cut = text.rfind("\n") + 1 or len(text)
                    yield (text[:cut],), False
                    text = text[cut:]
        yield (text,), True

    def _lines(self, path: Path) -> Iterator[Segments]:
        for number, raw in enumerate(_raw_lines(path), start=1):
            text = self._decode(raw, path, number, "lines")
            if text is not None:
                yield (text.removesuffix("\r"),)

    def _paragraphs(self, path: Path) -> Iterator[Segments]:
        lines: list[bytes] = []
        first = size = 0
        for number, raw in enumerate(chain(_raw_lines(path), [b""]), start=1):
            if raw.strip():
                first = first if lines else number
                if size <= MAX_UNIT_BYTES:
                    lines.append(raw)
                    size += len(raw) + 1
            elif lines:
                text = self._decode(b"\n".join(lines).rstrip(b"\r"), path, first, "paragraphs")
                if text is not None:
                    yield (text,)
                lines, size = [], 0

    def _records(self, path: Path) -> Iterator[Segments]:
        rows = self._parquet(path) if path.suffix == ".parquet" else self._jsonl(path)
        for where, record in rows:
            texts = [record.get(f) if isinstance(record, dict) else None for f in self.fields]
            for field, text in zip(self.fields, texts, strict=True):
                if not isinstance(text, str):
                    has = f"has {', '.join(record)}" if isinstance(record, dict) else "is no object"
                    what = f"{where}: no text at key {field!r}; the record {has}"
                    self._fault("records without the field", what)
                    break
                if not _is_unicode(text):
                    what = f"{where}: half a surrogate pair at key {field!r}"
                    self._fault("records that are not Unicode", what)
                    break
            else:
                yield tuple(texts)  # type: ignore[arg-type]

    def _jsonl(self, path: Path) -> Iterator[tuple[str, Any]]:
        for number, raw in enumerate(_raw_lines(path), start=1):
            text = self._decode(raw, path, number, "records")
            if text is None:
                continue
            if not text.strip():
                self.left_out["blank records"] += 1
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                self._fault("records that are no JSON", f"{path}, line {number}: {error}")
                continue
            yield f"{path}, line {number}", record

    def _parquet(self, path: Path) -> Iterator[tuple[str, Any]]:
        arrow = extras.load("pyarrow", "huggingface")
        parquet = extras.load("pyarrow.parquet", "huggingface")
        try:
            file = parquet.ParquetFile(path, memory_map=True)
        except arrow.ArrowInvalid as error:
            return self._fault("files that are no parquet", f"{path}: {error}")
        for field in self.fields:
            if field not in file.schema_arrow.names:
                what = f"{path}: no column {field!r}; it has {', '.join(file.schema_arrow.names)}"
                return self._fault("files without the field", what)
        row = 0
        for batch in file.iter_batches(batch_size=256, columns=self.fields):
            for record in batch.to_pylist():
                row += 1
                yield f"{path}, row {row}", record

    def _decode(self, raw: bytes, path: Path, number: int, units: str) -> str | None:
        """The text of one unit, which begins in line ``number``; None where it is left out."""
        if len(raw) > MAX_UNIT_BYTES:
            limit = f"longer than {MAX_UNIT_BYTES >> 20} MiB"
            self._fault(f"{units} {limit}", f"{path}, line {number}: {limit}")
            return None
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            line = number + raw.count(b"\n", 0, error.start)
            what = f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8"
            self._fault(f"{units} that are not UTF-8", what)
            return None


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Lines without their ends. What is too long is cut one byte after it is too long."""
    rest = b""
    with path.open("rb") as file:
        if file.read(len(codecs.BOM_UTF8)) != codecs.BOM_UTF8:
            file.seek(0)
        while block := file.read(CHUNK):
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
            rest = rest[: MAX_UNIT_BYTES + 1]
    if rest:
        yield rest


def _not_utf8(path: Path) -> str | None:
    """Where the first byte is that is not UTF-8, in words; None where all is well."""
    decoder, line = codecs.getincrementaldecoder("utf-8")(), 1
    with path.open("rb") as file:
        while True:
            block = file.read(CHUNK)
            try:
                decoder.decode(block, final=not block)
            except UnicodeDecodeError as error:
                line += error.object.count(b"\n", 0, error.start)
                return f"line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8"
            if not block:
                return None
            line += block.count(b"\n")


def _is_unicode(text: str) -> bool:
    """JSON can spell half a surrogate pair, which no encoding has."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _last_part(path: Path, share: float) -> int:
    """Where the last ``share`` of a file begins: with a line, or at least with a character."""
    size = path.stat().st_size
    cut = int(size * (1 - share))
    with path.open("rb") as file:
        file.seek(cut)
        line = file.readline(CHUNK)
    if line.endswith(b"\n") and cut + len(line) < size:
        return cut + len(line)
    return cut + next((i for i, byte in enumerate(line) if byte & 0xC0 != 0x80), 0)
