"""Text that is read and tokenized while it is trained on, instead of before."""

import logging
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from causal_lm.data import tokenize_corpus
from causal_lm.data.documents import Document, Documents
from causal_lm.data.sampler import DocumentSampler, Start
from causal_lm.data.sources.base import Overlap, check_overlap, cut_chunks, warn_of_unknown
from causal_lm.data.token_cache import SPLITS, TokenizedChunk
from causal_lm.data.tokenize_corpus import TRAIN, Chunk, DocumentPart, HeldOut
from causal_lm.data.tokenizers import TextTokenizer

log = logging.getLogger(__name__)

Address = tuple[Any, int]  # state of a source, and windows to pass over from there on
OpenAt = Callable[[Any], tuple[Iterable[DocumentPart], Callable[[], Any]]]
"""Called with a state, None for the start: the documents from there on, and a function that returns
the state after the last one that was read. A state is plain data, which checkpoints hold."""
Window = tuple[np.ndarray, np.ndarray | None]  # tokens and loss mask, see ``Document``
EMPTY: Window = (np.empty(0, np.int32), None)  # fills up the last batch of a rank
MAX_UNKNOWN = 10_000  # different characters or words that are counted
MAX_PLACES = 1000  # pools whose places are remembered: those that one optimizer step may reach back


@dataclass
class TextStream(Dataset[list[Document]]):
    """Training documents that are tokenized as they are read, and are never all in memory or on
    disk; as a data set, their windows, of which :class:`StreamSampler` gives batches as indices.

    ``open_at`` may be called again while an earlier reader is unfinished, which is not used then.
    """

    open_at: OpenAt
    tokenizer: TextTokenizer
    max_overlap: float  # of held out files with each other, and with what is read for ``first``
    processes: int = 1  # if more than one, others tokenize ahead of this one
    max_length: int = sys.maxsize  # tokens of a window
    held_out: set[bytes] = field(default_factory=set)  # hashes of documents to pass over
    overlap: Overlap = field(default_factory=Overlap)

    def hold_out(
        self, documents: Iterable[DocumentPart], fractions: HeldOut, split: int, most: int
    ) -> Documents:
        """Take the first ``most`` documents of a split, an index in ``token_cache.SPLITS``, out of
        the training documents. Raises ValueError where there is none."""
        chunks, name = cut_chunks(documents, fractions), SPLITS[split]
        pairs = (zip(c.documents, c.splits(c.hashes()), strict=True) for c in chunks)
        found = list(islice((d for pair in pairs for d, s in pair if s == split), most))
        if not found:
            raise ValueError(f"the stream holds no document for {name}: raise data.{name}_share")
        chunk = tokenize_corpus.tokenize(Chunk(found, False, fractions, None), self.tokenizer)
        self.held_out.update(chunk.hashes)
        self.overlap.add(chunk.hashes, chunk.separate)
        warn_of_unknown(chunk.unknown, f"{len(found):,} {name} documents")
        return as_documents(chunk, chunk.splits == split)

    def windows(self, max_length: int) -> "TextStream":
        """The same stream in windows, see :meth:`Documents.windows`."""
        return replace(self, max_length=max_length)

    @property
    def lengths(self) -> Tensor:
        """(1,) The most tokens that a window may have."""
        return torch.tensor([self.max_length])

    @cached_property
    def first(self) -> Documents:
        """The windows that come first, about 1 MB. Raises ValueError above ``max_overlap``."""
        found = next((w for w, _ in self._pieces(None) if len(w)), Documents.from_lists([]))
        check_overlap(self.overlap.fractions(), self.max_overlap)
        return found

    def read(self, address: Address) -> Iterator[tuple[Window, Address]]:
        """The windows from an address on, as NumPy arrays, which are quick to send to data-loader
        workers; each with the address of the next one."""
        state, skip = address
        for windows, before in self._pieces(state):
            for i in range(skip, len(windows)):
                tokens, mask = windows[i]
                yield (tokens.numpy(), None if mask is None else mask.numpy()), (before, i + 1)
            skip = 0

    def __getitem__(self, batch: list[Window]) -> list[Document]:
        as_tensor = torch.from_numpy
        return [Document(as_tensor(t), None if m is None else as_tensor(m)) for t, m in batch]

    def _pieces(self, state: Any) -> Iterator[tuple[Documents, Any]]:
        """The windows of about 1 MB at a time, each with the state of the source before it. Logs
        what the vocabulary lacks as it lacks some, and at the end what was read and passed over."""
        states, tokenizer = deque([state]), self.tokenizer.state()
        documents, tell = self.open_at(state)
        n_read, n_passed, unknown = 0, 0, Counter[str]()

        def read() -> Iterator[Chunk]:
            for chunk in cut_chunks(documents, TRAIN):
                states.append(tell())  # no document after the chunk has been read yet
                yield chunk

        for chunk in tokenize_corpus.tokenize_chunks(read(), tokenizer, self.processes):
            self.overlap.add(chunk.hashes, None)
            kept = np.array([digest not in self.held_out for digest in chunk.hashes])
            n_read, n_passed = n_read + len(kept), n_passed + int((~kept).sum())
            if chunk.unknown and not unknown:
                warn_of_unknown(chunk.unknown, f"{len(kept):,} training documents")
            unknown.update(chunk.unknown)
            if len(unknown) > MAX_UNKNOWN:  # words of a vocabulary of words
                unknown = Counter(dict(unknown.most_common(MAX_UNKNOWN // 10)))
            yield as_documents(chunk, kept).windows(self.max_length), states.popleft()
        log.info(f"end of the stream: {n_read:,} documents, {n_passed:,} passed over as held out")
        check_overlap(self.overlap.fractions())
        warn_of_unknown(unknown, f"{n_read:,} training documents")


def as_documents(chunk: TokenizedChunk, chosen: np.ndarray) -> Documents:
    """Some documents of a chunk, bool (D,), all of which are whole."""
    offsets = torch.from_numpy(np.append(0, chunk.lengths[chosen].cumsum()))
    in_chosen = np.repeat(chosen, chunk.lengths)
    mask = None if chunk.loss_mask is None else torch.from_numpy(chunk.loss_mask[in_chosen])
    tokens = torch.from_numpy(chunk.ids[in_chosen].astype(np.int32))
    return Documents(tokens, offsets, mask, int(chunk.text_bytes[chosen].sum()))


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
