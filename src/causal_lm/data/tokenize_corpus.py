"""Tokenize chunks of text, in this process or in several."""

import collections
import functools
import multiprocessing
import os
from collections.abc import Iterable, Iterator
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from causal_lm.data.token_cache import TokenizedChunk
from causal_lm.data.tokenizers import TextTokenizer, from_state

Segments = tuple[str, ...]
"""A document's text: one segment, or a prompt and what follows it."""
Part = tuple[Segments, bool]
"""A document and True, or a part of a long one and whether it is the last part."""


class Chunk(NamedTuple):
    """Some complete documents, or a part of one long document.

    continues: the first document began in the chunk before.
    continued: the last document goes on in the next chunk.
    val: whether all documents are held out; None: decided by a hash of each document's text.
    """

    documents: list[Segments]
    continues: bool = False
    continued: bool = False
    val: bool | None = None

    def hashes(self) -> list[bytes]:
        """A hash of each document's text."""
        return [sha256("".join(segments).encode()).digest()[:8] for segments in self.documents]

    def held_out(self, val_fraction: float) -> list[bool]:
        """Which documents are held out for validation."""
        if self.val is not None:
            return [self.val] * len(self.documents)
        limit = min(int(val_fraction * 2**64), 2**64 - 1).to_bytes(8, "big")
        return [digest < limit for digest in self.hashes()]


class ChunkTokenizer:
    """Turns a Chunk into a TokenizedChunk; other processes receive it as plain data.

    Args:
        state: of the tokenizer.
        val_fraction: fraction of the documents that are held out.
        keep_hashes: give the hashes of the texts too.
    """

    def __init__(self, state: dict[str, Any], val_fraction: float, keep_hashes: bool) -> None:
        self.state, self.val_fraction, self.keep_hashes = state, val_fraction, keep_hashes

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        return from_state(self.state)  # type: ignore[return-value]  # the state of a TextTokenizer

    def __reduce__(self) -> tuple:
        return ChunkTokenizer, (self.state, self.val_fraction, self.keep_hashes)

    def __call__(self, chunk: Chunk) -> TokenizedChunk:
        tokenizer, documents = self.tokenizer, len(chunk.documents)
        texts = [text for segments in chunk.documents for text in segments]
        text_ids, sizes = tokenizer.encode_batch(texts)
        lengths = sizes.reshape(documents, -1).sum(axis=1)
        lengths += 2  # BOS and EOS, which a continued document has at its two ends only
        lengths[0] -= chunk.continues
        lengths[-1] -= chunk.continued
        ends = lengths.cumsum()
        ids = np.empty(ends[-1], text_ids.dtype)
        is_text = np.ones(len(ids), bool)
        for special, indices in (
            (tokenizer.bos_id, (ends - lengths)[chunk.continues :]),
            (tokenizer.eos_id, ends[: documents - chunk.continued] - 1),
        ):
            ids[indices], is_text[indices] = special, False
        ids[is_text] = text_ids
        loss_mask = None
        if len(texts) > documents:  # every document has a prompt, which is not learned
            loss_mask = np.ones(len(ids), bool)
            loss_mask[is_text] = np.repeat(np.tile([False, True], documents), sizes)
        val = np.array(chunk.held_out(self.val_fraction))
        hashes = chunk.hashes() if self.keep_hashes else []
        return TokenizedChunk(
            ids, lengths, loss_mask, val, chunk.continued, hashes, sum(map(len, texts)),
            tokenizer.unknown(texts),
        )  # fmt: skip


def tokenize_chunks(
    chunks: Iterable[Chunk], tokenize: ChunkTokenizer, processes: int
) -> Iterator[TokenizedChunk]:
    """Tokenize ``chunks`` in their order, holding a few of them in memory at a time."""
    if processes == 1:
        yield from map(tokenize, chunks)
        return
    with multiprocessing.Pool(processes, _start_worker, (tokenize,)) as pool:
        waiting: collections.deque = collections.deque()
        for chunk in chunks:
            waiting.append(pool.apply_async(_tokenize_in_worker, (chunk,)))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


def _start_worker(tokenize: ChunkTokenizer) -> None:
    global _worker_tokenizer
    _worker_tokenizer = tokenize
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process per core


def _tokenize_in_worker(chunk: Chunk) -> TokenizedChunk:
    return _worker_tokenizer(chunk)


_worker_tokenizer: ChunkTokenizer
