"""HuggingFaceDataset: a source of data sets of the ``datasets`` library."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from causal_lm import extras
from causal_lm.data.documents import Corpus
from causal_lm.data.sources.file_io import local_path, text_size
from causal_lm.data.sources.file_reader import FileReader, arrow_rows
from causal_lm.data.token_cache import file_identity
from causal_lm.data.tokenize_corpus import TEST, VAL, DocumentPart, HeldOut

BATCH_ROWS = 256  # rows that are taken from a data set's memory map at a time


@dataclass(kw_only=True)
class HuggingFaceDataset(FileReader):
    """Source of a data set's text column, of which each row is a document.

    The ``datasets`` library reads the hub and folders; a local file is read as ``data=text`` reads
    it, a .txt line by line.
    """

    path: str  # on the hub, of a folder (save_to_disk or load_dataset reads it), or of a file
    name: str | None = None  # configuration of a data set on the hub
    split: str = "train"
    val_split: str | None = None  # split to validate on; None: val_share of the documents
    val_path: str | None = None  # another data set to validate on: its val_split, or else split
    test_split: str | None = None  # the same for testing
    test_path: str | None = None

    TXT_UNIT = "line"

    def __post_init__(self) -> None:
        super().__post_init__()
        val, test = (self.val_split, self.val_path), (self.test_split, self.test_path)
        self.splits: list[tuple[str, str, HeldOut]] = []
        """Path, split, and what of it is held out."""
        for name, (split, path), held_out in (("test", test, TEST), ("val", val, VAL)):
            if split or path:
                self.splits.append((path or self.path, split or self.split, held_out))
            if split and not path and local_path(self.path).is_file():
                what = f"{self.path} is a file and has no splits; set data.{name}_path"
                raise ValueError(f"data.{name}_split={split}: {what}")
        self.splits.append((self.path, self.split, self.held_out(any(val), any(test))))
        self._loaded: dict[tuple[str, str], Any] = {}

    def load(self) -> Corpus:
        try:
            return super().load()
        finally:
            self._loaded.clear()

    def identity(self) -> dict[str, Any]:
        identities = []
        for path, split, _ in self.splits:
            local = local_path(path)
            if local.is_file():
                self.check(local)
            # Local data is not loaded: its files identify it.
            found = [file_identity(p) for p in (local, *sorted(local.rglob("*"))) if p.is_file()]
            identities.append([found or (path, self._dataset(path, split)._fingerprint), split])
        return super().identity() | {"splits": identities, "name": self.name}

    def size(self) -> int:
        total = 0
        for path, split, _ in self.splits:
            local = local_path(path)
            total += text_size(local) if local.is_file() else self._dataset(path, split).data.nbytes
        return total

    def parts(self) -> Iterator[tuple[Iterable[DocumentPart], HeldOut]]:
        for path, split, held_out in self.splits:
            if local_path(path).is_file():
                yield self.documents(local_path(path)), held_out
            else:
                batches = self._dataset(path, split).with_format("arrow").iter(BATCH_ROWS)
                yield self.records(arrow_rows(f"{path} (split {split})", batches)), held_out

    def _dataset(self, path: str, split: str) -> Any:
        """A split, cached: its columns ``fields``, or all columns where one of these is missing."""
        if (path, split) in self._loaded:
            return self._loaded[path, split]
        datasets, local = extras.load("datasets", "huggingface"), local_path(path)
        with extras.reading(f"data.path={path} (split {split})"):
            if (local / "dataset_dict.json").exists():
                found = datasets.load_from_disk(str(local))[split]
            elif (local / "state.json").exists():
                found = datasets.load_from_disk(str(local))
            else:
                found = datasets.load_dataset(path, self.name, split=split, num_proc=self.num_proc)
        if set(self.fields) <= set(found.column_names):
            found = found.select_columns(self.fields)
        self._loaded[path, split] = found
        return found
