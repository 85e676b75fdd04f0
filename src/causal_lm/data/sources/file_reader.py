"""FileReader: cuts files (.txt, .jsonl, .json, .csv, .parquet) into documents."""

import codecs
import csv
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from causal_lm import extras
from causal_lm.data.sources import files
from causal_lm.data.sources.base import TextSource
from causal_lm.data.sources.files import FORMATS, known_format, read_blocks
from causal_lm.data.tokenize_corpus import Part, Segments

MAX_UNIT_BYTES = 16 << 20
"""Bytes of a line, paragraph or record; a longer one is a fault, mostly of a file without lines."""


class FileReader(TextSource):
    """What the sources of files and records share: cutting a file into documents.

    Faults are an empty file, bytes that are not UTF-8, a line of more than 16 MiB, and a record
    that is not JSON or lacks the field. They raise, or what they are in is skipped and counted. A
    blank line, paragraph or record is counted and never a document.

    Args:
        format: of all files: one of :data:`FORMATS`; None: by each one's suffix, and ``txt`` where
            that is another. Files that end in .gz or .zst are decompressed.
        unit: one document is a ``file``, ``line`` or ``paragraph`` (up to a blank line) of txt, or
            a ``record`` of another format; None: :data:`TXT_UNIT` or record.
        field: key or column of a record's text.
        prompt_field: key or column of a prompt, which precedes the text and is not learned.
        on_error: ``raise`` or ``skip``.
        options: see :class:`causal_lm.data.sources.base.TextSource`.
    """

    TXT_UNIT = "file"

    def __init__(
        self,
        *,
        format: str | None = None,
        unit: str | None = None,
        field: str = "text",
        prompt_field: str | None = None,
        on_error: str = "raise",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if format not in (None, *FORMATS):
            raise ValueError(f"data.format={format}: valid formats are {', '.join(FORMATS)}")
        self.format, self.unit, self.on_error = format, unit, on_error
        self.fields = [prompt_field, field] if prompt_field else [field]

    def identity(self) -> dict[str, Any]:
        reading = [self.format, self.unit, self.fields, self.on_error]
        return {"reading": reading}

    def format_of(self, path: Path) -> str:
        return self.format or known_format(path) or "txt"

    def check(self, path: Path) -> None:
        """Raises ValueError for a file whose format does not have the unit or the fields."""
        is_txt = self.format_of(path) == "txt"
        units = ("file", "line", "paragraph") if is_txt else ("record",)
        if self.unit and self.unit not in units:
            raise ValueError(
                f"data.unit={self.unit}: {path} can be cut by {' or '.join(units)} only"
            )
        if len(self.fields) > 1 and is_txt:
            raise ValueError(f"data.prompt_field is a key of records, which {path} does not have")

    def unit_of(self, path: Path) -> str:
        return self.unit or (self.TXT_UNIT if self.format_of(path) == "txt" else "record")

    def documents(self, path: Path) -> Iterator[Part]:
        """The documents of a file. Only whole files come in several parts."""
        unit = self.unit_of(path)
        if unit == "file":
            yield from self.whole_file(path)
            return
        if not next(read_blocks(path), b""):
            return self._fault("empty files", f"{path} is empty")
        if unit == "record":
            yield from self.records(self._file_rows(path))
        else:
            texts = self._lines(path) if unit == "line" else self._paragraphs(path)
            yield from self._not_blank(((text,) for text in texts), f"{unit}s")

    def whole_file(self, path: Path, start: int = 0, end: int | None = None) -> Iterator[Part]:
        """The bytes from ``start`` to ``end`` of a file as one document, in parts that end with a
        line."""
        try:
            size = _utf8_size(path)
        except ValueError as error:
            return self._fault("files that are not UTF-8 or not complete", str(error))
        if not size:
            return self._fault("empty files", f"{path} is empty")
        decoder = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")()
        text, left, long = "", (size if end is None else end) - start, False
        with files.open_bytes(path) as file:
            file.seek(start)
            while block := file.read(min(files.BLOCK_BYTES, left)):
                left -= len(block)
                text += decoder.decode(block)
                if left:
                    cut = text.rfind("\n") + 1 or len(text)
                    yield (text[:cut],), False
                    long = True
                    text = text[cut:]
        if long or text.strip():
            yield (text,), True
        else:
            self.skipped["blank files"] += 1

    def records(self, rows: Iterable[tuple[str, Any]]) -> Iterator[Part]:
        """The documents of records, each given as (where it is, the record)."""
        for where, record in rows:
            values = record if isinstance(record, dict) else {}
            faults = [field for field in self.fields if not _is_text(values.get(field))]
            if faults:
                key = faults[0]
                has = f"the record has {', '.join(values) or 'no keys'}"
                has = f"it is {values[key]!r:.40}" if key in values else has
                self._fault("records without a text", f"{where}: no text at key {key!r}; {has}")
            else:
                yield from self._not_blank([tuple(record[f] for f in self.fields)], "records")

    def _not_blank(self, documents: Iterable[Segments], units: str) -> Iterator[Part]:
        for segments in documents:
            if any(map(str.strip, segments)):
                yield segments, True
            else:
                self.skipped[f"blank {units}"] += 1

    def _fault(self, kind: str, what: str) -> None:
        """Raise ValueError, or count what is skipped."""
        if self.on_error == "raise":
            raise ValueError(f"{what}: correct it, or skip such {kind} with data.on_error=skip")
        self.skipped[kind] += 1

    def _lines(self, path: Path) -> Iterator[str]:
        for number, raw in enumerate(_raw_lines(path), start=1):
            text = self._decode(raw, path, number, "lines")
            if text is not None:
                yield text.removesuffix("\r")

    def _paragraphs(self, path: Path) -> Iterator[str]:
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
                    yield text
                lines, size = [], 0

    def _file_rows(self, path: Path) -> Iterator[tuple[str, Any]]:
        """The records of a file, each with where it is."""
        format_ = self.format_of(path)
        if format_ == "json" and not next(_raw_lines(path), b"").lstrip().startswith(b"["):
            format_ = "jsonl"
        read = {"parquet": self._parquet, "csv": self._csv, "json": self._json_array}
        return read.get(format_, self._jsonl)(path)

    def _jsonl(self, path: Path) -> Iterator[tuple[str, Any]]:
        for number, raw in enumerate(_raw_lines(path), start=1):
            text = self._decode(raw, path, number, "records")
            if text is None:
                continue
            if not text.strip():
                self.skipped["blank records"] += 1
                continue
            try:
                record = json.loads(text)
            except (ValueError, RecursionError) as error:
                self._fault("records that are not JSON", f"{path}, line {number}: {error}")
                continue
            yield f"{path}, line {number}", record

    def _json_array(self, path: Path) -> Iterator[tuple[str, Any]]:
        """An array of records, which is read as a whole."""
        try:
            records = json.loads(b"".join(read_blocks(path)))
        except (ValueError, RecursionError) as error:
            return self._fault("files that are not JSON", f"{path}: {error}")
        yield from ((f"{path}, record {n}", record) for n, record in enumerate(records, start=1))

    def _csv(self, path: Path) -> Iterator[tuple[str, Any]]:
        csv.field_size_limit(MAX_UNIT_BYTES)
        rows = csv.DictReader((f"{line}\n" for line in self._lines(path)), restkey="surplus")
        try:
            yield from ((f"{path}, line {rows.line_num}", row) for row in rows)
        except csv.Error as error:
            self._fault("files that are not CSV", f"{path}, line {rows.line_num}: {error}")

    def _parquet(self, path: Path) -> Iterator[tuple[str, Any]]:
        arrow = extras.load("pyarrow", "huggingface")
        parquet = extras.load("pyarrow.parquet", "huggingface")
        try:
            file = parquet.ParquetFile(path, memory_map=True)
            for field in self.fields:
                if field not in file.schema_arrow.names:
                    has = ", ".join(file.schema_arrow.names)
                    what = f"{path}: no column {field!r}; it has {has}"
                    return self._fault("files without the field", what)
            batches = file.iter_batches(batch_size=256, columns=self.fields)
            records = (record for batch in batches for record in batch.to_pylist())
            yield from ((f"{path}, row {n}", record) for n, record in enumerate(records, start=1))
        except (arrow.ArrowException, OSError) as error:  # OSError: the data of a column
            self._fault("files that are not parquet", f"{path}: {error}")

    def _decode(self, raw: bytes, path: Path, number: int, units: str) -> str | None:
        """The text of the unit that begins in line ``number``; None where it is skipped."""
        if len(raw) > MAX_UNIT_BYTES:
            limit = f"longer than {MAX_UNIT_BYTES >> 20} MiB"
            self._fault(f"{units} {limit}", f"{path}, line {number}: {limit}")
            return None
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            self._fault(f"{units} that are not UTF-8", f"{path}, {_where(error, number)}")
            return None


def _where(error: UnicodeDecodeError, first_line: int) -> str:
    """The line and the byte of a decoding error in bytes that begin in ``first_line``."""
    line = first_line + error.object.count(b"\n", 0, error.start)
    return f"line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8"


def _is_text(value: Any) -> bool:
    """Whether a value is a string, without half surrogate pairs (JSON can spell these)."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _raw_lines(path: Path) -> Iterator[bytes]:
    """Lines without their line feeds. A line that is too long is cut one byte above the limit."""
    rest = b""
    for number, block in enumerate(read_blocks(path)):
        block = block if number else block.removeprefix(codecs.BOM_UTF8)
        *lines, rest = (rest + block).split(b"\n")
        yield from lines
        rest = rest[: MAX_UNIT_BYTES + 1]
    if rest:
        yield rest


def _utf8_size(path: Path) -> int:
    """The number of bytes of a file. Raises ValueError, with the line, where it is not UTF-8."""
    decoder, line, size = codecs.getincrementaldecoder("utf-8")(), 1, 0
    for block in chain(read_blocks(path), [b""]):
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, {_where(error, line)}") from error
        line += block.count(b"\n")
        size += len(block)
    return size
