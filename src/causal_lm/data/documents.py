"""Token documents of uneven length, stored flat."""

import mmap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from causal_lm.data.tokenizers import Tokenizer

READS_KEPT, VALUES_KEPT = 64, 2**20
"""Reads, and values of one read, after which a mapped file's pages are handed back."""
CHUNK_DOCUMENTS = 2**20
"""Documents whose lengths are worked out at a time."""


class Mapped:
    """A flat array in a file: slices are copied out of a memory map, the whole never is.

    Every page that was touched counts as resident, and the kernel brings sixteen for one, so that
    an epoch would end with the whole file in this process. Hence pages are handed back now and
    then; they stay in the system's cache, from where the next read takes them in microseconds.

    Args:
        path: a file of ``dtype`` values, at least one.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype, self._reads = path, dtype, 0
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._array = np.frombuffer(self._map, dtype=dtype)

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, piece: slice) -> Tensor:
        """The values of a slice, in a dtype that torch knows well: bool, otherwise int64."""
        values = self._array[piece].astype(bool if self.dtype == "bool" else np.int64)
        self._reads += 1
        enough = self._reads % READS_KEPT == 0 or len(values) > VALUES_KEPT
        if enough and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
        return torch.from_numpy(values)

    def __reduce__(self) -> tuple:  # a data loader's worker opens the file for itself
        return Mapped, (self.path, self.dtype)


class Document(NamedTuple):
    """The tokens of one document, (n,).

    loss_mask: bool (n,), False at tokens that are given and not to be learned; None: learn all.
    """

    tokens: Tensor
    loss_mask: Tensor | None = None


class Documents(Dataset[Document]):
    """A sized, map-style data set of documents over one flat array.

    Args:
        tokens: (N,) every token, documents end to end.
        offsets: (D + 1,) where each document begins; the last is where the last one ends.
        loss_mask: bool (N,), see :class:`Document`.
    """

    def __init__(
        self,
        tokens: Tensor | Mapped,
        offsets: Tensor | Mapped,
        loss_mask: Tensor | Mapped | None = None,
    ) -> None:
        self.tokens, self.offsets, self.loss_mask = tokens, offsets, loss_mask

    @classmethod
    def from_lists(cls, documents: Iterable[Sequence[int]]) -> "Documents":
        """Raises:
        ValueError: a document of fewer than two tokens (BOS and EOS count) has no target."""
        arrays = [np.asarray(document, dtype=np.int32) for document in documents]
        for i, array in enumerate(arrays):
            if len(array) < 2:
                raise ValueError(f"document {i} has {len(array)} token(s): it needs two")
        tokens = torch.from_numpy(np.concatenate(arrays) if arrays else np.empty(0, np.int32))
        return cls(tokens, torch.tensor([0, *map(len, arrays)]).cumsum(0))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Document:
        """Index -1 (a sampler's filler) is a document of no tokens."""
        here = self.span(index)
        mask = None if self.loss_mask is None else self.loss_mask[here]
        return Document(self.tokens[here], mask)

    def span(self, index: int) -> slice:
        """Where in ``tokens`` a document lies."""
        if index < 0:
            return slice(0, 0)
        start, end = self.offsets[index : index + 2].tolist()
        return slice(start, end)

    @property
    def lengths(self) -> Tensor:
        """(D,) tokens of each document; int32 where that is wide enough."""
        narrow = len(self.tokens) < 2**31
        lengths = torch.empty(len(self), dtype=torch.int32 if narrow else torch.int64)
        for start in range(0, len(self), CHUNK_DOCUMENTS):
            here = self.offsets[start : start + CHUNK_DOCUMENTS + 1]
            lengths[start : start + CHUNK_DOCUMENTS] = here.diff()
        return lengths

    def windows(self, max_length: int) -> "Documents":
        """Cut documents longer than ``max_length`` into windows that together keep every target.

        Neighbouring windows share one token: the last of one, which only is a target there, is
        the first of the next, where it only is an input. So the number of targets does not
        depend on ``max_length``; only the context that precedes them does.
        """
        rows = self.lengths.numpy()  # from here on in place: there may be 10^7 documents
        rows -= 2
        rows //= max_length - 1
        rows += 1
        np.cumsum(rows, dtype=rows.dtype, out=rows)
        if not len(rows) or int(rows[-1]) == len(self):
            return self
        return Windows(self, max_length, rows)


class Windows(Documents):
    """The rows of :meth:`Documents.windows`, computed when asked for.

    Args:
        rows: (D,) windows up to and including those of each document.
    """

    def __init__(self, documents: Documents, max_length: int, rows: np.ndarray) -> None:
        super().__init__(documents.tokens, documents.offsets, documents.loss_mask)
        self.documents, self.max_length, self.rows = documents, max_length, rows

    def __len__(self) -> int:
        return int(self.rows[-1])

    def span(self, index: int) -> slice:
        if index < 0:
            return slice(0, 0)
        owner = int(np.searchsorted(self.rows, index, side="right"))
        rank = index - int(self.rows[owner - 1] if owner else 0)
        whole = self.documents.span(owner)
        start = whole.start + rank * (self.max_length - 1)
        return slice(start, min(start + self.max_length, whole.stop))

    @property
    def lengths(self) -> Tensor:
        """(R,) tokens of each window: ``max_length``, but for the last one of each document."""
        last = self.documents.lengths.numpy()
        counts = np.diff(self.rows, prepend=self.rows.dtype.type(0))  # windows of each document
        last -= (counts - 1) * (self.max_length - 1)
        lengths = torch.full((len(self),), self.max_length, dtype=torch.from_numpy(last).dtype)
        lengths[torch.from_numpy(self.rows) - 1] = torch.from_numpy(last)
        return lengths


class Language(Protocol):
    """A source that knows its own probabilities."""

    def nll(self, documents: Documents) -> tuple[float, int]:
        """Nats and number of the targets of ``documents`` under the true distribution."""

    def legal(self, previous: Tensor, following: Tensor) -> Tensor:
        """bool: may ``following`` come after ``previous``?"""


@dataclass(frozen=True)
class Corpus:
    """What a source gives: documents ``BOS … EOS`` of both splits, and how to read them."""

    train: Documents
    val: Documents
    tokenizer: Tokenizer
    language: Language | None = None


class Source(Protocol):
    """Anything with ``load() -> Corpus`` is a source."""

    def load(self) -> Corpus: ...
