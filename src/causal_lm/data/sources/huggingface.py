"""Data sets of the ``datasets`` library: from the hub, from files, or saved to disk."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from causal_lm import extras
from causal_lm.data import token_cache
from causal_lm.data.documents import Corpus
from causal_lm.data.sources.base import TextSource
from causal_lm.data.tokenize_corpus import Chunk, Segments

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".txt": "text", ".csv": "csv"}
"""Suffix of a local file -> what reads it."""
ROWS = 256
"""Rows that are taken from the memory map at a time."""


class HuggingFace(TextSource):
    """Source of a data set's text column; a row is a document, and blank ones are none.

    Rows stay in memory-mapped Arrow files and are tokenized once.

    Args:
        path: a name on the hub; a folder that ``save_to_disk`` wrote; or a local file.
        name: the configuration of a data set on the hub.
        split: the split to train on.
        val_split: the split held out; null: ``val_share`` of the documents.
        val_path: a data set to validate on, of which ``split`` is taken too.
        field: the column of the text.
        prompt_field: the column of a prompt, which comes before the text and is no target.
        options: see :class:`causal_lm.data.sources.base.TextSource`.
    """

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        val_path: str | None = None,
        field: str = "text",
        prompt_field: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.path, self.name, self.field = path, name, field
        self.fields = [prompt_field, field] if prompt_field else [field]
        self.wanted = [(path, split, False if val_split or val_path else None)]
        if val_split or val_path:
            self.wanted.append((val_path or path, val_split or split, True))
        self._loaded: dict[tuple[str, str], Any] = {}

    def load(self) -> Corpus:
        """As every source of text; what ``datasets`` makes of local files is gone afterwards."""
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.cache_dir) as self._scratch:
            try:
                return super().load()
            finally:
                self._loaded.clear()

    def identity(self) -> dict[str, Any]:
        parts = [[self._fingerprint(path, split), split] for path, split, _ in self.wanted]
        return {"parts": parts, "name": self.name, "fields": self.fields}

    def _fingerprint(self, path: str, split: str) -> Any:
        """Of local data the files', which need not be loaded for it."""
        local = Path(path).expanduser()
        if local.is_file():
            return token_cache.identity(local)
        if local.is_dir():
            return [
                token_cache.identity(file) for file in sorted(local.rglob("*")) if file.is_file()
            ]
        return [path, self._dataset(path, split)._fingerprint]

    def _dataset(self, path: str, split: str) -> Any:
        """Raises:
        ValueError: there is no such data set, split or column."""
        if (path, split) not in self._loaded:
            try:
                found = self._load(path, split)
            except ImportError:
                raise
            except Exception as error:  # the library raises a dozen kinds
                raise ValueError(f"data.path={path} (split {split}): {error}") from error
            for field in self.fields:
                if field not in found.column_names:
                    has = ", ".join(found.column_names)
                    raise ValueError(f"data.path={path} has no column {field!r}; it has {has}")
            self._loaded[path, split] = found
        return self._loaded[path, split]

    def _load(self, path: str, split: str) -> Any:
        datasets = extras.load("datasets", "huggingface")
        local = Path(path).expanduser()
        if (local / "dataset_dict.json").exists():
            return datasets.load_from_disk(str(local))[split]
        if (local / "state.json").exists():
            return datasets.load_from_disk(str(local))
        if local.is_file():
            if local.suffix not in BUILDERS:
                raise ValueError(f"a file must be one of {', '.join(BUILDERS)}")
            # In a folder of its own: the library knows a file by its time of writing alone.
            return datasets.load_dataset(
                BUILDERS[local.suffix], data_files=str(local), split="train",
                cache_dir=self._scratch,
            )  # fmt: skip
        return datasets.load_dataset(path, self.name, split=split, num_proc=self.num_proc)

    def size(self) -> int:
        return sum(self._dataset(path, split).data.nbytes for path, split, _ in self.wanted)

    def read(self) -> Iterator[Chunk]:
        for path, split, val in self.wanted:
            yield from self.chunks(((row, True) for row in self._rows(path, split)), val=val)

    def _rows(self, path: str, split: str) -> Iterator[Segments]:
        found = self._dataset(path, split).select_columns(self.fields).with_format("arrow")
        number = 0
        for batch in found.iter(batch_size=ROWS):
            columns = [batch.column(field).to_pylist() for field in self.fields]
            for row in zip(*columns, strict=True):
                number += 1
                if not all(isinstance(text, str) for text in row):
                    what = f"{path} (split {split}), row {number}: no text in column {self.fields}"
                    raise ValueError(what)
                if any(map(str.strip, row)):
                    yield row
                else:
                    self.left_out["blank rows"] += 1
