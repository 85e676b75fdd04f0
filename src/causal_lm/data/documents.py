"""Token documents of uneven length in one flat array, in memory or in a file."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from causal_lm.data.tokenizers import Tokenizer

MAX_PREAD_VALUES = 2**20  # most values read by one ``os.pread``, which the kernel limits to 2 GiB
CHUNK_DOCUMENTS = 2**20  # documents whose lengths are computed at a time


class FileArray:
    """A flat array in a file of values of a NumPy ``dtype``; indexing reads a slice from disk.

    It is not memory-mapped: all pages read in an epoch would count as memory of the process.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype, self._itemsize = path, dtype, np.dtype(dtype).itemsize
        self._file = path.open("rb")
        self._length = os.fstat(self._file.fileno()).st_size // self._itemsize

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: slice) -> Tensor:
        """The values of a slice as bool where the file holds bool, otherwise as int64."""
        start, stop, _ = index.indices(len(self))
        count, offset = max(stop - start, 0), start * self._itemsize
        if count <= MAX_PREAD_VALUES:  # six times as fast as fromfile
            raw = os.pread(self._file.fileno(), count * self._itemsize, offset)
            values = np.frombuffer(raw, self.dtype)
        else:
            values = np.fromfile(self.path, self.dtype, count, offset=offset)
        return torch.from_numpy(values.astype(bool if self.dtype == "bool" else np.int64))

    def __reduce__(self) -> tuple:  # a data-loader worker opens the file itself
        return FileArray, (self.path, self.dtype)


Array = Tensor | FileArray


class Document(NamedTuple):
    """The tokens of one document, and which of them may be targets."""

    tokens: Tensor  # (n,)
    loss_mask: Tensor | None = None  # bool (n,), False in a prompt; None: all True


class Documents(Dataset[Document]):
    """A map-style data set of D documents stored end to end in one flat array.

    Args:
        tokens: (N,) the tokens of all documents.
        offsets: (D + 1,) index of the first token of each document, and N at the end.
        loss_mask: bool (N,), see :class:`Document`.
        text_bytes: UTF-8 bytes of all text that is learned; 0 where that is not known.
    """

    def __init__(
        self, tokens: Array, offsets: Array, loss_mask: Array | None = None, text_bytes: int = 0
    ) -> None:
        self.tokens, self.offsets, self.loss_mask = tokens, offsets, loss_mask
        self.text_bytes = text_bytes

    @classmethod
    def from_lists(cls, documents: Iterable[Sequence[int]]) -> "Documents":
        """Documents from ids with BOS and EOS. Raises ValueError for one of fewer than two ids."""
        arrays = [np.asarray(document, dtype=np.int32) for document in documents]
        for i, array in enumerate(arrays):
            if len(array) < 2:
                raise ValueError(f"document {i} has {len(array)} token(s): at least 2 are needed")
        tokens = torch.from_numpy(np.concatenate(arrays) if arrays else np.empty(0, np.int32))
        return cls(tokens, torch.tensor([0, *map(len, arrays)]).cumsum(0))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Document:
        """One document; index -1 (a filler of ``DocumentSampler``) gives an empty one."""
        span = self.span(index) if index >= 0 else slice(0, 0)
        mask = None if self.loss_mask is None else self.loss_mask[span]
        return Document(self.tokens[span], mask)

    def span(self, index: int) -> slice:
        """The slice of ``tokens`` that holds one document."""
        return slice(*self.offsets[index : index + 2].tolist())

    @property
    def lengths(self) -> Tensor:
        """(D,) tokens of each document, int32 where that is wide enough."""
        dtype = torch.int32 if len(self.tokens) < 2**31 else torch.int64
        lengths = torch.empty(len(self), dtype=dtype)
        for start in range(0, len(self), CHUNK_DOCUMENTS):
            stop = start + CHUNK_DOCUMENTS
            lengths[start:stop] = self.offsets[start : stop + 1].diff()
        return lengths

    def count_targets(self) -> int:
        """Tokens that are learned: all but BOS, and the False ones of a loss mask."""
        learned = len(self.tokens) if self.loss_mask is None else int(self.loss_mask[:].sum())
        return learned - (len(self.offsets) - 1)

    def windows(self, max_length: int) -> "Documents":
        """Cut documents longer than ``max_length`` tokens into windows, keeping every target.

        Neighboring windows share one token: the last target of the first is the first input of
        the second. The number of targets thus does not depend on ``max_length``.
        """
        counts = self.lengths.numpy()  # changed in place: there may be 10^7 documents
        counts -= 2
        counts //= max_length - 1
        counts += 1
        window_ends = np.cumsum(counts, dtype=counts.dtype, out=counts)
        if not len(window_ends) or int(window_ends[-1]) == len(self):
            return self
        return Windows(self, max_length, window_ends)


class Windows(Documents):
    """The windows of :meth:`Documents.windows`; where each lies is computed when it is read."""

    def __init__(self, whole: Documents, max_length: int, window_ends: np.ndarray) -> None:
        super().__init__(whole.tokens, whole.offsets, whole.loss_mask, whole.text_bytes)
        self.documents, self.max_length = whole, max_length
        self.window_ends = window_ends  # (D,) windows up to and including those of each document

    def __len__(self) -> int:
        return int(self.window_ends[-1])

    def span(self, index: int) -> slice:
        ends = self.window_ends  # of another type than the index, all of them would be converted
        document = int(ends.searchsorted(ends.dtype.type(index), side="right"))
        number = index - int(self.window_ends[document - 1] if document else 0)
        whole = self.documents.span(document)
        start = whole.start + number * (self.max_length - 1)
        return slice(start, min(start + self.max_length, whole.stop))

    @property
    def lengths(self) -> Tensor:
        """(W,) tokens of each window: ``max_length``, except for the last one of a document."""
        last = self.documents.lengths.numpy()
        windows = np.diff(self.window_ends, prepend=self.window_ends.dtype.type(0))
        last -= (windows - 1) * (self.max_length - 1)
        lengths = np.full(len(self), self.max_length, last.dtype)
        lengths[self.window_ends - 1] = last
        return torch.from_numpy(lengths)


class Language(Protocol):
    """A source's true distribution, where it is known."""

    def nll(self, documents: Documents) -> tuple[float, int]:
        """Sum of the negative log-likelihood in nats, and number of targets."""

    def legal(self, previous: Tensor, following: Tensor) -> Tensor:
        """bool, elementwise: ``following`` has nonzero probability after ``previous``."""


@dataclass(frozen=True)
class Corpus:
    """What a source loads: documents ``BOS … EOS`` of each split, and their tokenizer."""

    train: Any  # Documents, or a streaming.TextStream
    val: Documents
    tokenizer: Tokenizer
    language: Language | None = None
    test: Documents | None = None


class Source(Protocol):
    """Where documents come from: any object with ``load() -> Corpus``."""

    def load(self) -> Corpus: ...
