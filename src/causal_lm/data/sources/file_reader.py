"""FileReader: cuts files (.txt, .jsonl, .json, .csv, .parquet) into documents."""

import codecs
import csv
import functools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path
from typing import Any

from causal_lm import extras
from causal_lm.data.chat import ChatTemplate, is_text, segments_of
from causal_lm.data.sources import file_io
from causal_lm.data.sources.base import TextSource
from causal_lm.data.tokenize_corpus import DocumentPart, Segments

MAX_UNIT_BYTES = 16 << 20  # largest line, paragraph or record; longer ones are bad input
RawUnits = Iterator[tuple[int, bytes]]  # lines or paragraphs, each with its first line's number


@dataclass(kw_only=True)
class FileReader(TextSource):
    """What the sources of files and records share: cutting a file into documents.

    Bad input is an empty file, bytes that are not UTF-8, a line of more than 16 MiB, or a record
    that is not JSON or lacks the field. It raises ValueError, or with ``on_error="skip"`` the file,
    line or record is skipped and counted. Blank ones are always skipped and counted.
    """

    format: str | None = None  # of FORMATS; None: by suffix, txt if that is unknown
    unit: str | None = None  # file, line or paragraph of txt, record of another format
    field: str = "text"  # key or column of a record's text, or of its chat (a list of messages)
    prompt_field: str | None = None  # the same of a prompt, which precedes it and is no target
    on_error: str = "raise"  # or skip

    TXT_UNIT = "file"  # of txt where ``unit`` is None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.format not in (None, *file_io.FORMATS):
            raise ValueError(f"data.format={self.format} is none of {', '.join(file_io.FORMATS)}")
        self.has_chats: bool | None = None  # not texts, as the first record says
        self.fields = [self.prompt_field, self.field] if self.prompt_field else [self.field]

    def identity(self) -> dict[str, Any]:
        return {"reading": [self.format, self.unit, self.fields, self.on_error]}

    def format_of(self, path: Path) -> str:
        """The format in which a file is read."""
        return self.format or file_io.known_format(path) or "txt"

    def unit_of(self, path: Path) -> str:
        """Of what each document of a file consists: file, line, paragraph or record."""
        return self.unit or (self.TXT_UNIT if self.format_of(path) == "txt" else "record")

    def check(self, path: Path) -> None:
        """Raises ValueError for a file whose format does not have the unit or the fields."""
        is_txt = self.format_of(path) == "txt"
        units = ("file", "line", "paragraph") if is_txt else ("record",)
        if self.unit_of(path) not in units:
            raise ValueError(f"data.unit={self.unit}: {path} supports only {' or '.join(units)}")
        if self.prompt_field and is_txt:
            raise ValueError(f"data.prompt_field is a key of records, which {path} does not have")

    def documents(self, path: Path) -> Iterator[DocumentPart]:
        """The documents of a file. Only whole files come in several parts."""
        unit = self.unit_of(path)
        if unit == "file":
            yield from self.whole_file(path)
        elif not next(file_io.read_blocks(path), b""):
            self._reject("empty files", f"{path} is empty")
        elif unit == "record":
            yield from self.records(self._file_rows(path))
        else:
            raw_units = _raw_lines(path) if unit == "line" else _raw_paragraphs(path)
            texts = self._decoded(path, raw_units, f"{unit}s")
            yield from self._not_blank(((text,) for _, text in texts), f"{unit}s")

    def whole_file(
        self, path: Path, start: int = 0, end: int | None = None
    ) -> Iterator[DocumentPart]:
        """The bytes from ``start`` to ``end`` as one document, in parts that end with a line."""
        try:
            size = _utf8_size(path)
        except ValueError as error:
            return self._reject("files that are not UTF-8 or not complete", str(error))
        if not size:
            return self._reject("empty files", f"{path} is empty")
        decoder = codecs.getincrementaldecoder("utf-8" if start else "utf-8-sig")()
        text, bytes_left, is_long = "", (size if end is None else end) - start, False
        with file_io.open_bytes(path) as file:
            file.seek(start)
            while block := file.read(min(file_io.BLOCK_BYTES, bytes_left)):
                bytes_left -= len(block)
                text += decoder.decode(block)
                if bytes_left:
                    cut = text.rfind("\n") + 1 or len(text)
                    yield (text[:cut],), False
                    text, is_long = text[cut:], True
        if is_long or text.strip():
            yield (text,), True
        else:
            self.skipped["blank files"] += 1

    def records(self, rows: Iterable[tuple[str, Any]]) -> Iterator[DocumentPart]:
        """The documents of records, each given as (where it is, the record)."""
        for where, record in rows:
            try:
                segments = self._segments(record if isinstance(record, dict) else {})
                yield from self._not_blank([segments], "records")
            except ValueError as error:
                self._reject("records without a text", f"{where}: {error}")

    def _segments(self, record: dict[str, Any]) -> Segments:
        """A record's text, after its prompt, or its chat; ValueError for none, or for a mixture."""
        values: list[Any] = [record.get(field) for field in self.fields]
        segments = tuple(values)
        if is_chat := len(values) == 1 and isinstance(values[0], list):
            segments = segments_of(values[0], self._chat_template)
        elif wrong := [f for f in self.fields if not is_text(record.get(f))]:
            keys = f"the record has {', '.join(record) or 'no keys'}"
            found = f"it is {record[wrong[0]]!r:.40}" if wrong[0] in record else keys
            raise ValueError(f"no text at key {wrong[0]!r}; {found}")
        if self.has_chats not in (None, is_chat):
            raise ValueError(f"texts and chats are mixed at key {self.field!r}")
        self.has_chats = is_chat
        return segments

    @functools.cached_property
    def _chat_template(self) -> ChatTemplate | None:
        tokenizer = None if self.tokenizer == "bpe" else self._given_tokenizer
        return ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None

    def _not_blank(self, documents: Iterable[Segments], units: str) -> Iterator[DocumentPart]:
        for segments in documents:
            if any(map(str.strip, segments)):
                yield segments, True
            else:
                self.skipped[f"blank {units}"] += 1

    def _reject(self, kind: str, message: str) -> None:
        """Raise ValueError, or count what is skipped."""
        if self.on_error == "raise":
            raise ValueError(f"{message}: correct it, or skip such {kind} with data.on_error=skip")
        self.skipped[kind] += 1

    def _decoded(self, path: Path, raw_units: RawUnits, units: str) -> Iterator[tuple[int, str]]:
        """The texts of units, each with the number of its first line; bad ones are left out."""
        for number, raw in raw_units:
            try:
                if len(raw) <= MAX_UNIT_BYTES:
                    yield number, raw.decode().removesuffix("\r")
                else:
                    limit = f"longer than {MAX_UNIT_BYTES >> 20} MiB"
                    self._reject(f"{units} {limit}", f"{path}, line {number}: {limit}")
            except UnicodeDecodeError as error:
                self._reject(f"{units} that are not UTF-8", f"{path}, {_where(error, number)}")

    def _file_rows(self, path: Path) -> Iterator[tuple[str, Any]]:
        name = self.format_of(path)
        if name == "json" and not next(_raw_lines(path), (1, b""))[1].lstrip().startswith(b"["):
            name = "jsonl"
        readers = {"parquet": self._parquet, "csv": self._csv, "json": self._json_array}
        return readers.get(name, self._jsonl)(path)

    def _jsonl(self, path: Path) -> Iterator[tuple[str, Any]]:
        for number, text in self._decoded(path, _raw_lines(path), "records"):
            try:
                if text.strip():
                    yield f"{path}, line {number}", json.loads(text)
                else:
                    self.skipped["blank records"] += 1
            except (ValueError, RecursionError) as error:
                self._reject("records that are not JSON", f"{path}, line {number}: {error}")

    def _json_array(self, path: Path) -> Iterator[tuple[str, Any]]:
        try:
            records = json.loads(b"".join(file_io.read_blocks(path)))  # read as a whole
        except (ValueError, RecursionError) as error:
            return self._reject("files that are not JSON", f"{path}: {error}")
        yield from ((f"{path}, record {n}", record) for n, record in enumerate(records, start=1))

    def _csv(self, path: Path) -> Iterator[tuple[str, Any]]:
        csv.field_size_limit(MAX_UNIT_BYTES)
        lines = (f"{text}\n" for _, text in self._decoded(path, _raw_lines(path), "lines"))
        rows = csv.DictReader(lines, restkey="surplus")
        try:
            yield from ((f"{path}, line {rows.line_num}", row) for row in rows)
        except csv.Error as error:
            self._reject("files that are not CSV", f"{path}, line {rows.line_num}: {error}")

    def _parquet(self, path: Path) -> Iterator[tuple[str, Any]]:
        arrow = extras.load("pyarrow", "huggingface")
        parquet = extras.load("pyarrow.parquet", "huggingface")
        try:
            file = parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)  # page by page
            known = set(self.fields) <= set(file.schema_arrow.names)
            batches = file.iter_batches(batch_size=256, columns=self.fields if known else None)
            yield from arrow_rows(str(path), batches)
        except (arrow.ArrowException, OSError) as error:  # OSError: the data of a column
            self._reject("files that are not parquet", f"{path}: {error}")


def arrow_rows(where: str, batches: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """The records of Arrow's batches, each with where it is."""
    records = (record for batch in batches for record in batch.to_pylist())
    yield from ((f"{where}, row {n}", record) for n, record in enumerate(records, start=1))


def _where(error: UnicodeDecodeError, first_line: int) -> str:
    """The line and the byte of a decoding error in bytes that begin in ``first_line``."""
    line = first_line + error.object.count(b"\n", 0, error.start)
    return f"line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8"


def _raw_lines(path: Path) -> RawUnits:
    """Lines without their line feeds; one that is too long is cut one byte above the limit."""
    number, rest = 1, b""
    for i, block in enumerate(file_io.read_blocks(path)):
        *lines, rest = (rest + (block if i else block.removeprefix(codecs.BOM_UTF8))).split(b"\n")
        yield from enumerate(lines, start=number)
        number += len(lines)
        rest = rest[: MAX_UNIT_BYTES + 1]
    if rest:
        yield number, rest


def _raw_paragraphs(path: Path) -> RawUnits:
    """Runs of lines that are not blank; one that is too long is cut above the limit."""
    for has_text, lines in groupby(_raw_lines(path), lambda line: bool(line[1].strip())):
        if has_text:
            first, raw = next(lines)
            paragraph = bytearray(raw)
            for _, raw in lines:
                if len(paragraph) <= MAX_UNIT_BYTES:
                    paragraph += b"\n" + raw
            yield first, bytes(paragraph)


def _utf8_size(path: Path) -> int:
    """The number of bytes of a file. Raises ValueError, with the line, where it is not UTF-8."""
    decoder, line, size = codecs.getincrementaldecoder("utf-8")(), 1, 0
    for block in chain(file_io.read_blocks(path), [b""]):
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, {_where(error, line)}") from error
        line += block.count(b"\n")
        size += len(block)
    return size
