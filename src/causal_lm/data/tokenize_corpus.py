"""Chunks of text to tokens, here or in several processes."""

import collections
import functools
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from causal_lm.data.token_cache import Tokens
from causal_lm.data.tokenizers import TextTokenizer, from_state

Segments = tuple[str, ...]
"""A document's text: one segment, or a prompt and what follows it."""


class Chunk(NamedTuple):
    """Some whole documents, or a part of a long one.

    begins, ends: False where a long document goes on from the chunk before, or in the next.
    val: the split of all; None: by a hash of each document's text.
    """

    documents: list[Segments]
    begins: bool = True
    ends: bool = True
    val: bool | None = None

    def held_out(self, val_share: float) -> list[bool]:
        """Which of the documents are in validation: a hash of each one's text decides."""
        if self.val is not None:
            return [self.val] * len(self.documents)
        limit = min(int(val_share * 2**64), 2**64 - 1).to_bytes(8, "big")
        return [
            sha256("".join(segments).encode(errors="surrogatepass")).digest() < limit
            for segments in self.documents
        ]


class TokenizeChunk:
    """Chunk -> Tokens. It travels to other processes as plain data."""

    def __init__(self, state: dict[str, Any], val_share: float) -> None:
        self.state, self.val_share = state, val_share

    @functools.cached_property
    def tokenizer(self) -> TextTokenizer:
        return from_state(self.state)  # type: ignore[return-value]  # one of text, as it came

    def __reduce__(self) -> tuple:
        return TokenizeChunk, (self.state, self.val_share)

    def __call__(self, chunk: Chunk) -> tuple[Tokens, int]:
        """The tokens, and how many characters they stand for."""
        tokenizer, documents = self.tokenizer, len(chunk.documents)
        texts = [text for segments in chunk.documents for text in segments]
        text_ids, sizes = tokenizer.encode_batch(texts)
        lengths = sizes.reshape(documents, -1).sum(axis=1)
        lengths += 2  # BOS and EOS; a long document has them at its ends only
        lengths[0] -= not chunk.begins
        lengths[-1] -= not chunk.ends
        ends = lengths.cumsum()
        ids = np.empty(ends[-1], text_ids.dtype)
        is_text = np.ones(len(ids), bool)
        for id_, places in (
            (tokenizer.bos_id, (ends - lengths)[not chunk.begins :]),
            (tokenizer.eos_id, ends[: documents - (not chunk.ends)] - 1),
        ):
            ids[places], is_text[places] = id_, False
        ids[is_text] = text_ids
        counts = None
        if len(texts) > documents:  # each has a prompt, which is there to be read
            counts = np.ones(len(ids), bool)
            counts[is_text] = np.repeat(np.tile([False, True], documents), sizes)
        val = np.array(chunk.held_out(self.val_share))
        return Tokens(ids, lengths, counts, val, chunk.ends), sum(map(len, texts))


def tokenize_chunks(
    chunks: Iterable[Chunk],
    tokenize: TokenizeChunk,
    processes: int,
    progress: Callable[[int], Any],
) -> Iterator[Tokens]:
    """The tokens of ``chunks``, in their order; a few chunks are held at a time, never all."""
    alone = processes == 1
    for tokens, size in map(tokenize, chunks) if alone else _in_order(chunks, tokenize, processes):
        progress(size)
        yield tokens


def _in_order(
    chunks: Iterable[Chunk], tokenize: TokenizeChunk, processes: int
) -> Iterator[tuple[Tokens, int]]:
    with multiprocessing.Pool(processes, _start, (tokenize,)) as pool:
        waiting: collections.deque = collections.deque()
        for chunk in chunks:
            waiting.append(pool.apply_async(_work, (chunk,)))
            if len(waiting) > 2 * processes:
                yield waiting.popleft().get()
        while waiting:
            yield waiting.popleft().get()


def _start(tokenize: TokenizeChunk) -> None:
    """Once in each process of the pool, which then is one of as many as there are cores."""
    global _here
    _here = tokenize
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _work(chunk: Chunk) -> tuple[Tokens, int]:
    return _here(chunk)


_here: TokenizeChunk
