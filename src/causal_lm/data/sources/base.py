"""TextSource: what all sources of text share (the split, the tokenizer, the cache on disk)."""

import abc
import collections
import functools
import logging
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from causal_lm.data import token_cache
from causal_lm.data.documents import Corpus
from causal_lm.data.subwords import SubwordTokenizer
from causal_lm.data.token_cache import TokenizedChunk
from causal_lm.data.tokenize_corpus import Chunk, ChunkTokenizer, Part, Segments, tokenize_chunks
from causal_lm.data.tokenizers import ByteTokenizer, TextTokenizer, from_state

log = logging.getLogger(__name__)

CHUNK_CHARACTERS = 1 << 20
"""Characters that are tokenized at a time."""
BPE_TRAINING_BYTES = 16 << 20
"""Bytes of text that a BPE is trained on, spread evenly over the training documents."""
SINGLE_PROCESS_BYTES = 16 << 20
"""Bytes of a corpus below which one process tokenizes: others take a second to start. A corpus of
byte tokens is always tokenized by one, because sending text costs more than encoding it."""
EXAMPLES = 8
"""Characters that are named where a tokenizer's vocabulary lacks some."""
FORMAT = 2
"""Version of the cached files and of how text is cut; older caches are not read."""


class TextSource(abc.ABC):
    """A source of text documents that are tokenized once and kept on disk.

    A hash of its text decides whether a document is in training or validation. So the split does
    not depend on the order or on other documents, and equal documents are on the same side.

    Args:
        tokenizer: ``bytes``; ``bpe``, trained on the training documents; the path of a
            ``tokenizer.json``; or a tokenizer object.
        vocab_size: ids of a ``bpe``, PAD, BOS and EOS included.
        special_tokens: names of ``pad``, ``bos`` and ``eos`` in a ``tokenizer.json``; null: the
            usual ones (see :meth:`causal_lm.data.subwords.SubwordTokenizer.resolve`).
        val_share: fraction of the documents held out, where the source has no validation data.
        cache_dir: folder of the tokens; null: :func:`causal_lm.data.token_cache.default_folder`.
        num_proc: processes that tokenize; null: one per core.
        max_overlap: fraction of separate validation documents that may also be training documents.
    """

    has_separate_val = False
    """Whether :meth:`parts` gives the validation documents on their own; they must come first."""

    def __init__(
        self,
        *,
        tokenizer: str | TextTokenizer = "bytes",
        vocab_size: int = 2048,
        special_tokens: Mapping[str, str | None] | None = None,
        val_share: float = 0.05,
        cache_dir: str | None = None,
        num_proc: int | None = None,
        max_overlap: float = 0.5,
    ) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.special_tokens = dict(special_tokens or {})
        self.val_fraction, self.num_proc = val_share, num_proc or os.cpu_count() or 1
        self.max_overlap = max_overlap
        self.cache_dir = Path(cache_dir or token_cache.default_folder()).expanduser()
        self.skipped: collections.Counter[str] = collections.Counter()
        """Number of skipped documents by kind, such as ``blank lines``; :meth:`parts` counts."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain data that changes whenever the texts or how they are read do."""

    @abc.abstractmethod
    def parts(self) -> Iterator[tuple[Iterable[Part], bool | None]]:
        """All documents in a fixed order, in groups of (documents, whether they are held out).

        None in place of the latter: the hash of each document decides. A document is given as (its
        segments, True); a long one may be given as (a part, False) … (its last part, True).
        """

    @abc.abstractmethod
    def size(self) -> int:
        """Approximate number of bytes of all documents."""

    def load(self) -> Corpus:
        """Tokenize the documents, or read the tokens from the cache.

        Raises:
            ValueError: a split holds no document, or the splits share too many.
        """
        trained_here = self.tokenizer == "bpe"  # only where the cache has no tokens
        tokenizer = self.vocab_size if trained_here else self._given_tokenizer.state()
        key = [FORMAT, type(self).__name__, self.identity(), self.val_fraction, tokenizer]
        folder = self.cache_dir / token_cache.fingerprint(key)
        started = time.perf_counter()
        token_cache.build_once(folder, self._build)
        train, val, about = token_cache.read(folder)
        log.info(f"{about['summary']}; kept in {folder} ({time.perf_counter() - started:.1f} s)")
        if about["overlap"]:
            message = f"{about['overlap']:.1%} of the validation documents are also in training"
            if about["overlap"] > self.max_overlap:
                raise ValueError(f"{message}: more than data.max_overlap={self.max_overlap}")
            log.warning(message)
        if about["unknown"]:
            examples = ", ".join(f"{unit!r} ({n:,})" for unit, n in about["unknown"])
            log.warning(f"the tokenizer's vocabulary lacks {examples}; set another data.tokenizer")
        return Corpus(train, val, from_state(about["tokenizer"]))

    def chunks(self) -> Iterator[Chunk]:
        """All documents in chunks of about :data:`CHUNK_CHARACTERS`."""
        for parts, val in self.parts():
            documents: list[Segments] = []
            size, continues, long_val = 0, False, val
            for segments, complete in parts:
                is_long = continues or not complete
                if not is_long:
                    documents.append(segments)
                    size += len(segments[-1])
                if documents and (is_long or size >= CHUNK_CHARACTERS):
                    yield Chunk(documents, val=val)
                    documents, size = [], 0
                if is_long:  # each part is a chunk; the hash of the first decides on the split
                    if not continues:
                        (long_val,) = Chunk([segments], val=val).held_out(self.val_fraction)
                    yield Chunk([segments], continues, not complete, long_val)
                continues = not complete
            if documents:
                yield Chunk(documents, val=val)

    @functools.cached_property
    def _given_tokenizer(self) -> TextTokenizer:
        if not isinstance(self.tokenizer, str):
            return self.tokenizer
        if self.tokenizer == "bytes":
            return ByteTokenizer()
        return SubwordTokenizer.from_file(self.tokenizer, self.special_tokens)

    def _build(self, folder: Path) -> None:
        """Tokenize all documents into ``folder``."""
        tokenizer = self._train_bpe() if self.tokenizer == "bpe" else self._given_tokenizer
        state, size = tokenizer.state(), self.size()
        dtype = np.min_scalar_type(tokenizer.vocab_size - 1).name
        single = size < SINGLE_PROCESS_BYTES or isinstance(tokenizer, ByteTokenizer)
        tokenize = ChunkTokenizer(state, self.val_fraction, self.has_separate_val)
        self.skipped.clear()
        with tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
            chunks = tokenize_chunks(self.chunks(), tokenize, 1 if single else self.num_proc)
            observed = _Observer(bar)
            train, val = token_cache.write(folder, observed(chunks), dtype)
        summary = f"{train:,} documents for training, {val:,} for validation"
        summary += "".join(f"; skipped {n:,} {kind}" for kind, n in sorted(self.skipped.items()))
        if not train or not val:
            raise ValueError(
                f"{summary}: both splits need a document; set data.val_path, another "
                f"data.val_share, or a smaller data.unit (line, paragraph)"
            )
        about = {"tokenizer": state, "dtype": dtype, "summary": summary,
                 "overlap": len(observed.shared) / max(len(observed.val), 1),
                 "unknown": observed.unknown.most_common(EXAMPLES)}  # fmt: skip
        token_cache.write_about(folder, about)

    def _train_bpe(self) -> SubwordTokenizer:
        """A BPE of the training documents; of every k-th chunk where they are many."""
        fraction = min(1.0, BPE_TRAINING_BYTES / max(self.size(), 1))

        def texts() -> Iterator[list[str]]:
            for n, chunk in enumerate(self.chunks()):
                if int((n + 1) * fraction) > int(n * fraction):
                    held_out = chunk.held_out(self.val_fraction)
                    pairs = zip(chunk.documents, held_out, strict=True)
                    yield [text for document, out in pairs if not out for text in document]

        return SubwordTokenizer.train(texts(), self.vocab_size)


class _Observer:
    """Counts, while chunks go by, what both splits share and what the vocabulary lacks."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar
        self.val: set[bytes] = set()
        self.shared: set[bytes] = set()
        self.unknown: collections.Counter[str] = collections.Counter()

    def __call__(self, chunks: Iterable[TokenizedChunk]) -> Iterator[TokenizedChunk]:
        for chunk in chunks:
            self.bar.update(chunk.characters)
            self.unknown += chunk.unknown
            if chunk.val[0]:
                self.val.update(chunk.hashes)
            else:
                self.shared |= self.val.intersection(chunk.hashes)
            yield chunk
