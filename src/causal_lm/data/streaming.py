"""Text that is read and tokenized while it is trained on, instead of before."""

import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from causal_lm.data import tokenize_corpus
from causal_lm.data.documents import Document, Documents
from causal_lm.data.sampler import DocumentSampler, Start
from causal_lm.data.sources.base import EXAMPLES, cut_chunks, warn_of_unknown
from causal_lm.data.token_cache import SPLITS, TokenizedChunk
from causal_lm.data.tokenize_corpus import TRAIN, Chunk, DocumentPart, HeldOut, Segments, hash_of
from causal_lm.data.tokenizers import TextTokenizer

Address = tuple[Any, int]  # state of a source, and windows to pass over from there on
OpenAt = Callable[[Any], tuple[Iterable[DocumentPart], Callable[[], Any]]]
"""Called with a state, None for the start: the documents from there on, and a function that returns
the state after the last one that was read. A state is plain data, which checkpoints hold."""
Window = tuple[np.ndarray, np.ndarray | None]  # tokens and loss mask, see ``Document``
EMPTY: Window = (np.empty(0, np.int32), None)  # fills up the last batch of a rank
MAX_PLACES = 1000  # pools whose places are remembered: those that one optimizer step may reach back


@dataclass
class TextStream(Dataset[list[Document]]):
    """Training documents that are tokenized as they are read, and are never all in memory or on
    disk; as a data set, their windows, of which :class:`StreamSampler` gives batches as indices.

    ``open_at`` may be called again while an earlier reader is unfinished, which is not used then.
    """

    open_at: OpenAt
    tokenizer: TextTokenizer
    held_out: set[bytes]  # hashes of documents to pass over
    processes: int = 1  # if more than one, others tokenize ahead of this one
    max_length: int = sys.maxsize  # tokens of a window

    def windows(self, max_length: int) -> "TextStream":
        """The same stream in windows, see :meth:`Documents.windows`."""
        return replace(self, max_length=max_length)

    @property
    def lengths(self) -> Tensor:
        """(1,) The most tokens that a window may have."""
        return torch.tensor([self.max_length])

    def first(self) -> Documents:
        """The windows that come first, about 1 MB. Raises ValueError where there is none."""
        for chunk, _ in self._chunks(None):
            return as_documents(chunk).windows(self.max_length)
        raise ValueError("the stream holds no document for training")

    def read(self, address: Address) -> Iterator[tuple[Window, Address]]:
        """The windows from an address on, as NumPy arrays, which are quick to send to data-loader
        workers; each with the address of the next one."""
        state, skip = address
        for chunk, before in self._chunks(state):
            windows = as_documents(chunk).windows(self.max_length)
            for i in range(skip, len(windows)):
                tokens, mask = windows[i]
                window = tokens.numpy(), None if mask is None else mask.numpy()
                yield window, (before, i + 1)
            skip = 0

    def __getitem__(self, batch: list[Window]) -> list[Document]:
        as_tensor = torch.from_numpy
        return [Document(as_tensor(t), None if m is None else as_tensor(m)) for t, m in batch]

    def _chunks(self, state: Any) -> Iterator[tuple[TokenizedChunk, Any]]:
        """Tokenized chunks, each with the state of the source before it."""
        states, tokenizer = deque([state]), self.tokenizer.state()
        documents, tell = self.open_at(state)
        kept = (part for part in documents if hash_of(part[0]) not in self.held_out)

        def read() -> Iterator[Chunk]:
            for chunk in cut_chunks(kept, TRAIN):
                states.append(tell())  # no document after the chunk has been read yet
                yield chunk

        for chunk in tokenize_corpus.tokenize_chunks(read(), tokenizer, self.processes):
            yield chunk, states.popleft()


def as_documents(chunk: TokenizedChunk) -> Documents:
    """The documents of a chunk, all of which are whole."""
    offsets = torch.from_numpy(np.append(0, chunk.lengths.cumsum()))
    mask = None if chunk.loss_mask is None else torch.from_numpy(chunk.loss_mask)
    tokens, size = torch.from_numpy(chunk.ids.astype(np.int32)), int(chunk.text_bytes.sum())
    return Documents(tokens, offsets, mask, size)


def tokenized(documents: list[Segments], tokenizer: TextTokenizer) -> Documents:
    """Whole documents, in memory; logs what the tokenizer's vocabulary lacks of them."""
    chunk = tokenize_corpus.tokenize(Chunk(documents, False, TRAIN, None), tokenizer)
    warn_of_unknown(chunk.unknown.most_common(EXAMPLES))
    return as_documents(chunk)


def take_held_out(
    documents: Iterable[DocumentPart], fractions: HeldOut, split: int, most: int
) -> list[Segments]:
    """The first ``most`` documents of a split, an index in ``token_cache.SPLITS``. Raises
    ValueError where there is none."""
    chunks = cut_chunks(documents, fractions)
    pairs = (zip(c.documents, c.splits(c.hashes()), strict=True) for c in chunks)
    if found := list(islice((d for pair in pairs for d, s in pair if s == split), most)):
        return found
    name = SPLITS[split]
    raise ValueError(f"the stream holds no document for {name}: raise data.{name}_share")


class StreamSampler(Sampler[list[Window]]):
    """Batches of a stream's windows, of which it holds a pool of about ``pool_size`` at a time.

    Shuffling, length buckets, packing and the split over ranks are those of the ``options`` of a
    :class:`DocumentSampler`, pool by pool. Every rank reads the whole stream and takes its share of
    each pool, so that all ranks take the same number of steps. Data-loader workers collate what
    this process has read. ``batches_done`` and ``start`` are as in :class:`DocumentSampler`.
    """

    def __init__(
        self, stream: TextStream, pool_size: int, batches_done: Callable[[], int], start: Start,
        **options: Any,
    ) -> None:  # fmt: skip
        self.stream, self.batches_done, self.options = stream, batches_done, options
        self.start, self.places = start, deque([start], maxlen=MAX_PLACES)  # the newest last
        self.group_size = self._sampler(start, 0).group_size
        self.pool_size = -(-pool_size // self.group_size) * self.group_size

    def __iter__(self) -> Iterator[list[Window]]:
        """The rest of the current epoch."""
        place = self.position(self.batches_done())
        windows = self.stream.read(place.address)
        while pool := list(islice(windows, place.pool_size or self.pool_size)):
            place = place._replace(pool_size=place.pool_size or self.pool_size)
            self.places.append(place)
            lengths = np.array([len(tokens) for (tokens, _), _ in pool])
            sampler = self._sampler(place, len(pool), lengths)
            left = sampler.n_batches(place.segments)
            indices = sampler.remaining_indices(place.batches) if left else iter(())
            while batch := list(islice(indices, self.options["batch_size"])):
                yield [pool[i][0] if i >= 0 else EMPTY for i in batch]
            done, after = place.batches + left, pool[-1][1]
            place = Start(done, place.epoch, pool=place.pool + 1, address=after)
        self.places.append(Start(place.batches, place.epoch + 1, pool=place.pool))

    def position(self, batches_done: int) -> Start:
        """Where a run goes on that stops after ``batches_done`` batches over all epochs."""
        place = next(p for p in reversed(self.places) if p.batches <= batches_done)
        segments = self._sampler(place, sys.maxsize).position(batches_done).segments
        return place._replace(batches=batches_done, segments=segments)

    def _sampler(self, place: Start, size: int, lengths: Any = None) -> DocumentSampler:
        """Of a pool, which is as an epoch of a stored corpus."""
        start = Start(place.batches, place.pool, place.segments)
        return DocumentSampler(size, start=start, lengths=lambda: lengths, **self.options)
