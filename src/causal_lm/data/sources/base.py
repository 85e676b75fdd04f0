"""TextSource: what all sources of text share (the split, the tokenizer, the cache on disk)."""

import abc
import functools
import logging
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from causal_lm.data import token_cache
from causal_lm.data.documents import Corpus
from causal_lm.data.subwords import SubwordTokenizer
from causal_lm.data.tokenize_corpus import Chunk, DocumentPart, HeldOut, Segments, tokenize_chunks
from causal_lm.data.tokenizers import ByteTokenizer, TextTokenizer, from_state

log = logging.getLogger(__name__)

CHUNK_CHARACTERS = 1 << 20  # characters that are tokenized at a time
BPE_TRAINING_BYTES = 16 << 20  # of a BPE's training text, spread evenly over the training documents
SINGLE_PROCESS_BYTES = 16 << 20  # below which one process tokenizes: starting more takes a second
EXAMPLES = 8  # characters that are named where a tokenizer's vocabulary lacks some
FORMAT = 5  # version of the cached files and of how text is cut; older caches are not read


def warn_of_unknown(unknown: Mapping[str, int], where: str) -> None:
    """Log the most frequent characters or words of a text that a tokenizer lacks, if any."""
    found = Counter(unknown).most_common(EXAMPLES)
    if examples := ", ".join(f"{unit!r} ({n:,})" for unit, n in found):
        log.warning(f"the tokenizer lacks {examples} of {where}; set another data.tokenizer")


class Overlap:
    """Which documents of data that are held out as a whole are in another split, too."""

    def __init__(self) -> None:
        self.is_elsewhere = {1: dict[bytes, bool](), 2: dict[bytes, bool]()}  # by split and hash

    def add(self, hashes: list[bytes], separate: int | None) -> None:
        """Documents of a split that is held out as a whole, or else (None) of other data."""
        for split, own in self.is_elsewhere.items():
            found = hashes if split == separate else own.keys() & hashes
            own.update(dict.fromkeys(found, split != separate))

    def fractions(self) -> dict[str, float]:
        """Of the documents of each split that shares some."""
        found = ((token_cache.SPLITS[i], own.values()) for i, own in self.is_elsewhere.items())
        return {split: sum(own) / len(own) for split, own in found if any(own)}


def check_overlap(fractions: Mapping[str, float], most: float = 1.0) -> None:
    """Warn of :meth:`Overlap.fractions`; ValueError for one of more than ``most``."""
    for split, fraction in fractions.items():
        message = f"{fraction:.1%} of the {split} documents are also in another split"
        if fraction > most:
            raise ValueError(f"{message}: more than data.max_overlap={most}")
        log.warning(message)


def cut_chunks(parts: Iterable[DocumentPart], held_out: HeldOut) -> Iterator[Chunk]:
    """Chunks of about :data:`CHUNK_CHARACTERS`; each is yielded before the next part is read."""
    documents: list[Segments] = []
    size, first_split = 0, None
    for segments, complete in parts:
        documents.append(segments)
        size += len(segments[-1])
        if size >= CHUNK_CHARACTERS or not complete:
            chunk = Chunk(documents, not complete, held_out, first_split)
            first_split = None if complete else chunk.splits(chunk.hashes())[-1]
            yield chunk
            documents, size = [], 0
    if documents:
        yield Chunk(documents, False, held_out, first_split)


@dataclass(kw_only=True)
class TextSource(abc.ABC):
    """A source of text documents that are tokenized once and cached on disk. A hash of its text
    decides in which split a document is, so that equal ones are in the same."""

    val_share: float = 0.05  # fraction of documents held out, where there is no validation data
    test_share: float = 0.0  # the same for testing; 0: there is no test split
    tokenizer: str | TextTokenizer = "bytes"  # or bpe, a path of a tokenizer.json, an object
    vocab_size: int = 2048  # ids of a bpe, PAD, BOS and EOS included
    special_tokens: Mapping[str, str | None] | None = None  # names in a tokenizer.json, by role
    cache_dir: str | None = None  # folder of the tokens; None: token_cache.default_folder()
    num_proc: int | None = None  # processes that tokenize; None: one per core
    max_overlap: float = 0.5  # fraction of separate held out documents that may be elsewhere, too

    def __post_init__(self) -> None:
        self.num_proc = self.num_proc or os.cpu_count() or 1
        self.skipped = Counter[str]()  # documents by kind ("blank lines"), which ``parts`` counts

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain data that identifies the texts and how they are read (part of the cache key)."""

    @abc.abstractmethod
    def parts(self) -> Iterator[tuple[Iterable[DocumentPart], HeldOut]]:
        """All documents in a fixed order, in groups (documents, what of them is held out): first
        those for testing, then those for validation, as an overlap is found with later ones.
        A document is (segments, True), or (part, False) … (last part, True)."""

    def held_out(self, val_data: Any = None, test_data: Any = None) -> HeldOut:
        """The fractions to hold out of the other documents: none for a split with its own data."""
        return 0.0 if val_data else self.val_share, 0.0 if test_data else self.test_share

    @abc.abstractmethod
    def size(self) -> int:
        """Approximate number of bytes of all documents."""

    def load(self) -> Corpus:
        """Tokenize the documents, or read the tokens from the cache. Raises ValueError where a
        split holds no document, or shares more than ``max_overlap`` of them with another."""
        is_bpe = self.tokenizer == "bpe"  # trained only if its tokens are not cached
        tokenizer_key = self.vocab_size if is_bpe else self._given_tokenizer.state()
        key = [FORMAT, type(self).__name__, self.identity(), self.held_out(), tokenizer_key]
        cache = Path(self.cache_dir or token_cache.default_folder()).expanduser()
        folder, started = cache / token_cache.fingerprint(key), time.perf_counter()
        token_cache.build_once(folder, self._build, token_cache.find_damage)
        (train, val, test), about = token_cache.read_corpus(folder)
        log.info(f"{about['summary']}; kept in {folder} ({time.perf_counter() - started:.1f} s)")
        check_overlap(about["overlap"], self.max_overlap)
        warn_of_unknown(dict(about["unknown"]), "all documents")
        return Corpus(train, val, from_state(about["tokenizer"]), test=test)

    def chunks(self) -> Iterator[Chunk]:
        """All documents in chunks of about :data:`CHUNK_CHARACTERS`."""
        for parts, held_out in self.parts():
            yield from cut_chunks(parts, held_out)

    @functools.cached_property
    def _given_tokenizer(self) -> TextTokenizer:
        if not isinstance(self.tokenizer, str):
            return self.tokenizer
        if self.tokenizer == "bytes":
            return ByteTokenizer()
        return SubwordTokenizer.from_file(self.tokenizer, self.special_tokens or {})

    def _build(self, folder: Path) -> None:
        tokenizer = self._train_bpe() if self.tokenizer == "bpe" else self._given_tokenizer
        state, size = tokenizer.state(), self.size()
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1).name
        # Sending text to another process costs more than encoding it as bytes.
        single = size < SINGLE_PROCESS_BYTES or isinstance(tokenizer, ByteTokenizer)
        processes = 1 if single else self.num_proc or 1
        overlap, unknown = Overlap(), Counter[str]()
        text_bytes = np.zeros(len(token_cache.SPLITS), np.int64)
        self.skipped.clear()

        def observed() -> Iterator[token_cache.TokenizedChunk]:
            for chunk in tokenize_chunks(self.chunks(), state, processes):
                bar.update(chunk.characters)
                unknown.update(chunk.unknown)
                overlap.add(chunk.hashes, chunk.separate)
                np.add.at(text_bytes, chunk.splits, chunk.text_bytes)
                yield chunk

        with tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
            train, val, test = token_cache.write_corpus(folder, observed(), dtype)
        summary = f"{train:,} documents for training, {val:,} for validation, {test:,} for testing"
        summary += "".join(f"; skipped {n:,} {kind}" for kind, n in sorted(self.skipped.items()))
        if not train or not val:
            hint = "set data.val_path or another data.val_share, or give more or smaller documents"
            raise ValueError(f"{summary}: both first need a document; {hint}")
        about = {"tokenizer": state, "dtype": dtype, "summary": summary}
        found = {"overlap": overlap.fractions(), "unknown": unknown.most_common(EXAMPLES),
                 "text_bytes": text_bytes.tolist()}  # fmt: skip
        token_cache.write_about(folder, about | found)

    def _train_bpe(self) -> SubwordTokenizer:
        """A BPE of the training documents, from a subset of the chunks if the corpus is large."""
        fraction = min(1.0, BPE_TRAINING_BYTES / max(self.size(), 1))

        def texts() -> Iterator[list[str]]:
            for n, chunk in enumerate(self.chunks()):
                if int((n + 1) * fraction) > int(n * fraction):
                    pairs = zip(chunk.documents, chunk.splits(chunk.hashes()), strict=True)
                    yield [text for document, split in pairs if not split for text in document]

        return SubwordTokenizer.train(texts(), self.vocab_size)
