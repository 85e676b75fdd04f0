"""HuggingFaceDataset: a source of data sets of the ``datasets`` library."""

import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

from causal_lm import extras
from causal_lm.data.documents import Corpus
from causal_lm.data.sources.file_io import local_path, text_size
from causal_lm.data.sources.file_reader import FileReader, arrow_rows
from causal_lm.data.streaming import TextStream
from causal_lm.data.token_cache import file_identity
from causal_lm.data.tokenize_corpus import TEST, VAL, DocumentPart, HeldOut

log = logging.getLogger(__name__)

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
    streaming: bool = False  # read and tokenize while training; num_proc None is then one process
    max_held_out: int = 1000  # documents of a stream for validation, and for testing, in memory

    TXT_UNIT = "line"

    def __post_init__(self) -> None:
        self.num_proc = self.num_proc or (1 if self.streaming else None)
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
        if self.streaming:
            return self._load_stream()
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

    def _load_stream(self) -> Corpus:
        """Read the held out documents; the :class:`TextStream` reads those that equal none."""
        for path in {path for path, _, _ in self.splits if local_path(path).is_file()}:
            self.check(local := local_path(path))
            if self.format_of(local) == "json" or self.unit_of(local) == "file":
                todo = "name a file of a record or text in each line, or set data.format=jsonl"
                raise ValueError(f"data.streaming=true: {local} is read as a whole: {todo}")
        open_at = partial(self.open_at, self.path, self.split)
        train = TextStream(open_at, self._given_tokenizer, self.max_overlap, self.num_proc or 1)
        held_out = {
            index: train.hold_out(self.open_at(path, split)[0], shares, index, self.max_held_out)
            for path, split, shares in self.splits for index in (1, 2) if shares[index - 1]
        }  # fmt: skip
        return Corpus(train, held_out[1], train.tokenizer, test=held_out.get(2))

    def open_at(
        self, path: str, split: str, state: Any = None
    ) -> tuple[Iterator[DocumentPart], Callable[[], Any]]:
        """The documents after a state, and a function that returns the state that is reached: the
        number of records read, and the state of the library.

        A file is read from its start, without being tokenized; the library finds its place.
        """
        read, inner = state or (0, None)

        def counted(items: Iterable[Any]) -> Iterator[Any]:
            nonlocal read
            for item in items:
                read += 1
                yield item
            if skipped := ", ".join(f"{n:,} {kind}" for kind, n in self.skipped.items()):
                log.warning(f"{path} (split {split}): of {read:,} records, skipped {skipped}")

        self.skipped.clear()
        if (local := local_path(path)).is_file():
            return counted(islice(self.documents(local), read, None)), lambda: [read, None]
        dataset = self._dataset(path, split)
        dataset.load_state_dict(inner)
        where = f"{path} (split {split}), row"
        rows = ((f"{where} {read}", row) for row in counted(dataset))
        return self.records(rows), lambda: [read, dataset.state_dict()]

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
                name = str(local) if local.exists() else path
                how = {"streaming": True} if self.streaming else {"num_proc": self.num_proc}
                found = datasets.load_dataset(name, self.name, split=split, **how)
        if set(self.fields) <= set(found.column_names or ()):
            found = found.select_columns(self.fields)
        if self.streaming and not isinstance(found, datasets.IterableDataset):
            found = found.to_iterable_dataset()
        self._loaded[path, split] = found
        return found
