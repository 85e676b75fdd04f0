"""Tokenize chunks of text, in this process or in several."""

import collections
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np

from causal_lm.data.token_cache import TokenizedChunk
from causal_lm.data.tokenizers import ByteTokenizer, TextTokenizer, from_state
from causal_lm.signals import leave_to_parent

HeldOut = tuple[float, float]  # fractions for validation and testing, by a hash of each document
TRAIN, VAL, TEST = (0.0, 0.0), (1.0, 0.0), (0.0, 1.0)  # all of them for one split

Segments = tuple[str, ...]  # a document's text: what is learned, or context and that in turn
DocumentPart = tuple[Segments, bool]  # a document, or a part of it, and whether it is the last


def hash_of(segments: Segments) -> bytes:
    """Eight bytes that equal documents have in common."""
    return sha256("".join(segments).encode()).digest()[:8]


class Rendered(Segments):
    """Segments that a tokenizer's own chat template wrote: their special tokens are meant."""


class Chunk(NamedTuple):
    """Some documents; the first and the last may be parts of a long one."""

    documents: list[Segments]
    ends_mid_document: bool  # the last document goes on in the next chunk
    held_out: HeldOut
    first_split: int | None  # of a first document that began in the chunk before

    def hashes(self) -> list[bytes]:
        return [hash_of(segments) for segments in self.documents]

    def splits(self, hashes: list[bytes]) -> list[int]:
        """The index in ``token_cache.SPLITS`` of each document, by its hash."""
        val, test = self.held_out
        if max(val, test) in (0, 1):
            return [int(val + 2 * test)] * len(hashes)
        ends = [int(end * 2**64).to_bytes(8, "big") for end in (val, val + test)]
        splits = [1 if digest < ends[0] else 2 * (digest < ends[1]) for digest in hashes]
        return splits if self.first_split is None else [self.first_split, *splits[1:]]


def tokenize(chunk: Chunk, tokenizer: TextTokenizer) -> TokenizedChunk:
    """BOS before each document, EOS after each learned segment: the last, each second before it."""
    texts = [text for segments in chunk.documents for text in segments]
    is_rendered = isinstance(chunk.documents[0], Rendered)
    ids, lengths, loss_mask = (_encode_rendered if is_rendered else _encode)(chunk, tokenizer)
    hashes = chunk.hashes()
    splits = np.array(chunk.splits(hashes))
    text_bytes = np.zeros(len(hashes), np.int64)
    if not is_rendered and not isinstance(tokenizer, ByteTokenizer):  # whose tokens are bytes
        text_bytes[:] = [len("".join(segments[::-2]).encode()) for segments in chunk.documents]
    return TokenizedChunk(
        ids, lengths, loss_mask, splits, chunk.ends_mid_document, hashes,
        int(splits[0]) if max(chunk.held_out) == 1 else None,
        sum(map(len, texts)), tokenizer.unknown(texts), text_bytes,
    )  # fmt: skip


def _encode_rendered(chunk: Chunk, tokenizer: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    encoded = [tokenizer.encode_rendered(segments) for segments in chunk.documents]
    ids, masks = zip(*encoded, strict=True)
    return np.concatenate(ids), np.array([*map(len, masks)]), np.concatenate(masks)


def _encode(chunk: Chunk, tokenizer: TextTokenizer) -> tuple[np.ndarray, np.ndarray, Any]:
    texts = [text for segments in chunk.documents for text in segments]
    text_ids, sizes = tokenizer.encode_batch(texts)
    counts = np.fromiter(map(len, chunk.documents), np.int64)
    stops, is_first = counts.cumsum(), np.zeros(len(texts), bool)
    is_first[stops - counts] = True
    is_learned = (np.repeat(stops, counts) - np.arange(len(texts))) % 2 == 1
    has_bos, has_eos = is_first.copy(), is_learned.copy()  # a continued document: at its two ends
    has_bos[0] &= chunk.first_split is None
    has_eos[-1] &= not chunk.ends_mid_document
    sizes = sizes + has_bos + has_eos
    ends = sizes.cumsum()
    begins, eos = (ends - sizes)[has_bos], ends[has_eos] - 1
    ids = np.empty(ends[-1], text_ids.dtype)
    is_text = np.ones(len(ids), bool)
    is_text[begins] = is_text[eos] = False
    ids[begins], ids[eos], ids[is_text] = tokenizer.bos_id, tokenizer.eos_id, text_ids
    lengths, loss_mask = np.add.reduceat(sizes, stops - counts), None
    if not is_learned.all():
        loss_mask = np.repeat(is_learned, sizes)
        loss_mask[begins] = True  # as in documents without context
    return ids, lengths, loss_mask


def tokenize_chunks(
    chunks: Iterable[Chunk], state: dict[str, Any], processes: int
) -> Iterator[TokenizedChunk]:
    """Tokenize ``chunks`` in their order, holding a few of them in memory at a time. Each process
    makes its tokenizer from ``state``."""
    if processes == 1:
        tokenizer: Any = from_state(state)  # a TextTokenizer
        yield from (tokenize(chunk, tokenizer) for chunk in chunks)
        return
    # multiprocessing.Pool may hang where a process ends early, or where a signal ends this one.
    with ProcessPoolExecutor(processes, initializer=_start_worker, initargs=(state,)) as pool:
        waiting = collections.deque[Future[TokenizedChunk]]()
        try:
            for chunk in chunks:
                waiting.append(pool.submit(_tokenize_in_worker, chunk))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker(state: dict[str, Any]) -> None:
    global _worker_tokenizer
    leave_to_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is one process per core
    _worker_tokenizer = from_state(state)


def _tokenize_in_worker(chunk: Chunk) -> TokenizedChunk:
    return tokenize(chunk, _worker_tokenizer)


_worker_tokenizer: Any  # a TextTokenizer
