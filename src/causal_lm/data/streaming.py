"""Text that is read and tokenized while it is trained on, instead of before."""

import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, Sampler

from causal_lm.data import tokenize_corpus
from causal_lm.data.documents import Document, Documents
from causal_lm.data.sampler import Address, DocumentSampler, Start
from causal_lm.data.sources.base import cut_chunks
from causal_lm.data.token_cache import SPLITS, TokenizedChunk
from causal_lm.data.tokenize_corpus import TRAIN, Chunk, DocumentPart, HeldOut, hash_of
from causal_lm.data.tokenizers import TextTokenizer

OpenAt = Callable[[Any], tuple[Iterable[DocumentPart], Callable[[], Any]]]
"""Called with a state, None for the start: the documents from there on, and a function that returns
the state after the last one that was read. A state is plain data, which checkpoints hold."""
EMPTY: Any = Document(np.empty(0, np.int32))  # type: ignore[arg-type]  # fills up a last batch
MAX_PLACES = 1000  # pools whose places are remembered: those that one optimizer step may reach back


class TextStream:
    """Documents for training that are tokenized as they are read; never all in memory or on disk.

    Documents whose hash is in ``held_out`` are passed over. With more than one of ``processes``,
    others tokenize ahead of this one. ``open_at`` may be called again while an earlier reader is
    unfinished, which is then not used any more.
    """

    def __init__(
        self, open_at: OpenAt, tokenizer: TextTokenizer, held_out: set[bytes], processes: int = 1
    ) -> None:
        self.open_at, self.tokenizer, self.processes = open_at, tokenizer, processes
        self.held_out = held_out

    def windows(self, address: Address, max_length: int) -> Iterator[tuple[Document, Address]]:
        """The windows of at most ``max_length`` tokens from an address on, as NumPy arrays, which
        are quick to send to data-loader workers, each with the address of the next one."""
        state, skip = address
        for chunk, before in self._chunks(state):
            windows = as_documents(chunk).windows(max_length)
            for i in range(skip, len(windows)):
                arrays = (x if x is None else x.numpy() for x in windows[i])
                yield Document(*arrays), (before, i + 1)
            skip = 0

    def _chunks(self, state: Any) -> Iterator[tuple[TokenizedChunk, Any]]:
        """Tokenized chunks, each with the state of the source before it."""
        states = deque([state])
        documents, tell = self.open_at(state)
        kept = (part for part in documents if hash_of(part[0]) not in self.held_out)

        def read() -> Iterator[Chunk]:
            for chunk in cut_chunks(kept, TRAIN):
                states.append(tell())  # no document after the chunk has been read yet
                yield chunk

        tokenizer = self.tokenizer.state()
        for chunk in tokenize_corpus.tokenize_chunks(read(), tokenizer, self.processes):
            yield chunk, states.popleft()

    def fingerprint(self, max_length: int) -> list[int]:
        """Changes with the held out documents, and with the first windows. Raises ValueError where
        there are none."""
        first = [document for document, _ in islice(self.windows((None, 0), max_length), 100)]
        if not first:
            raise ValueError("the stream holds no document for training")
        tokens = np.concatenate([document.tokens for document in first]).astype("<i4")
        held_out = zlib.crc32(b"".join(sorted(self.held_out)))
        return [max_length, len(tokens), zlib.crc32(tokens.tobytes()), held_out]


def as_documents(chunk: TokenizedChunk) -> Documents:
    """The documents of a chunk, of which no part is in another one."""
    offsets = torch.from_numpy(np.append(0, chunk.lengths.cumsum()))
    mask = None if chunk.loss_mask is None else torch.from_numpy(chunk.loss_mask)
    return Documents(torch.from_numpy(chunk.ids.astype(np.int32)), offsets, mask)


def take_held_out(
    documents: Iterable[DocumentPart], fractions: HeldOut, split: int, most: int,
    tokenizer: TextTokenizer,
) -> TokenizedChunk:  # fmt: skip
    """The first ``most`` documents of a split, an index in ``token_cache.SPLITS``. Raises
    ValueError where there is none."""
    chunks = cut_chunks(documents, fractions)
    pairs = (zip(c.documents, c.splits(c.hashes()), strict=True) for c in chunks)
    found = list(islice((d for pair in pairs for d, s in pair if s == split), most))
    if not found:
        name = SPLITS[split]
        raise ValueError(f"the stream holds no document for {name}: raise data.{name}_share")
    return tokenize_corpus.tokenize(Chunk(found, False, TRAIN, None), tokenizer)


class StreamSampler(Sampler[list[Document]]):
    """Batches of a stream's windows, of which it holds a pool of ``pool_size`` at a time.

    ``make_sampler`` makes the :class:`DocumentSampler` of a pool from its size, a function that
    returns the lengths of its windows, and where a run goes on in it. So shuffling, length buckets,
    packing and the split over ranks are those of stored documents, pool by pool.

    Every rank reads the whole stream and takes its share of each pool, so that all ranks take the
    same number of steps. Data-loader workers collate what this process has read.
    """

    def __init__(
        self, windows: Callable[[Address], Iterator[tuple[Document, Address]]], pool_size: int,
        make_sampler: Callable[..., DocumentSampler], batches_done: Callable[[], int], start: Start,
    ) -> None:  # fmt: skip
        self.windows, self.pool_size = windows, pool_size
        self.make_sampler, self.batches_done = make_sampler, batches_done
        self.places = deque([start], maxlen=MAX_PLACES)  # the newest last

    def __iter__(self) -> Iterator[list[Document]]:
        """The rest of the current epoch."""
        place = self.position(self.batches_done())
        windows = self.windows(place.address)
        while pool := list(islice(windows, place.pool_size or self.pool_size)):
            place = place._replace(pool_size=place.pool_size or self.pool_size)
            self.places.append(place)
            lengths = np.array([len(window.tokens) for window, _ in pool])
            sampler = self._sampler(place, len(pool), lengths)
            left = sampler.n_batches(place.segments)
            indices = sampler.remaining_indices(place.batches) if left else iter(())
            while batch := list(islice(indices, sampler.group_size // sampler.world_size)):
                yield [pool[i][0] if i >= 0 else EMPTY for i in batch]
            done, after = place.batches + left, pool[-1][1]
            place = Start(done, place.epoch, pool=place.pool + 1, address=after)
        self.places.append(Start(place.batches, place.epoch + 1, (), place.pool))

    def position(self, batches_done: int) -> Start:
        """Where a run goes on that stops after ``batches_done`` batches over all epochs."""
        place = next(p for p in reversed(self.places) if p.batches <= batches_done)
        segments = self._sampler(place, sys.maxsize).position(batches_done).segments
        return place._replace(batches=batches_done, segments=segments)

    def _sampler(self, place: Start, size: int, lengths: Any = None) -> DocumentSampler:
        start = Start(place.batches, place.pool, place.segments)  # a pool is as an epoch there
        return self.make_sampler(size, lambda: lengths, start=start)


class StreamedDocuments(Dataset[Document]):
    """A data set of which each "index" is a document, as :class:`StreamSampler` yields them."""

    def __getitem__(self, document: Document) -> Document:
        return Document(*(x if x is None else torch.as_tensor(x) for x in document))
