"""HuggingFaceDataset: a source of data sets of the ``datasets`` library."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from causal_lm import extras
from causal_lm.data import token_cache
from causal_lm.data.documents import Corpus
from causal_lm.data.sources.file_reader import FileReader
from causal_lm.data.sources.files import text_size
from causal_lm.data.tokenize_corpus import Part

BATCH_ROWS = 256
"""Rows that are taken from a data set's memory map at a time."""


class HuggingFaceDataset(FileReader):
    """Source of a data set's text column, of which each row is a document.

    The ``datasets`` library reads the hub and folders; a local file is read as ``data=text`` reads
    it, a .txt line by line.

    Args:
        path: a name on the hub; a folder that ``save_to_disk`` wrote or ``load_dataset`` reads; or
            a local file.
        name: configuration of a data set on the hub.
        split: split to train on.
        val_split: split to validate on; null: ``val_share`` of the documents.
        val_path: a data set to validate on, of which ``split`` is taken too.
        options: see :class:`causal_lm.data.sources.file_reader.FileReader`.
    """

    TXT_UNIT = "line"

    def __init__(
        self,
        *,
        path: str,
        name: str | None = None,
        split: str = "train",
        val_split: str | None = None,
        val_path: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.name = name
        self.splits: list[tuple[str, str, bool | None]] = [(path, split, None)]
        """Path, split, and whether it is held out (None: some of its documents are)."""
        if val_split or val_path:
            self.splits = [(val_path or path, val_split or split, True), (path, split, False)]
            self.has_separate_val = True
        if val_split and not val_path and Path(path).expanduser().is_file():
            raise ValueError(
                f"data.val_split={val_split}: {path} is a file and has no splits; set data.val_path"
            )
        self._loaded: dict[tuple[str, str], Any] = {}

    def load(self) -> Corpus:
        try:
            return super().load()
        finally:
            self._loaded.clear()

    def identity(self) -> dict[str, Any]:
        splits = [[self._split_identity(path, split), split] for path, split, _ in self.splits]
        return super().identity() | {"splits": splits, "name": self.name}

    def _split_identity(self, path: str, split: str) -> Any:
        """Local data is not loaded for it: its files are identified."""
        local = Path(path).expanduser()
        if local.is_file():
            self.check(local)
        if local.exists():
            files = sorted(local.rglob("*")) if local.is_dir() else [local]
            return [token_cache.file_identity(file) for file in files if file.is_file()]
        return [path, self._dataset(path, split)._fingerprint]

    def size(self) -> int:
        files = [Path(path).expanduser() for path, _, _ in self.splits]
        return sum(
            text_size(file) if file.is_file() else self._dataset(path, split).data.nbytes
            for file, (path, split, _) in zip(files, self.splits, strict=True)
        )

    def parts(self) -> Iterator[tuple[Iterable[Part], bool | None]]:
        for path, split, val in self.splits:
            local = Path(path).expanduser()
            if local.is_file():
                yield self.documents(local), val
            else:
                yield self.records(self._dataset_rows(path, split)), val

    def _dataset_rows(self, path: str, split: str) -> Iterator[tuple[str, Any]]:
        found = self._dataset(path, split).select_columns(self.fields)
        batches = found.with_format("arrow").iter(batch_size=BATCH_ROWS)
        records = (record for batch in batches for record in batch.to_pylist())
        where = f"{path} (split {split})"
        yield from ((f"{where}, row {n}", record) for n, record in enumerate(records, start=1))

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
        return datasets.load_dataset(path, self.name, split=split, num_proc=self.num_proc)
