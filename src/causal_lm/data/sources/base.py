"""What all sources of text share: the split, the tokenizer, and what is kept of both."""

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
from causal_lm.data.subwords import Subwords
from causal_lm.data.tokenize_corpus import Chunk, Segments, TokenizeChunk, tokenize_chunks
from causal_lm.data.tokenizers import Bytes, TextTokenizer, from_state

log = logging.getLogger(__name__)

CHUNK = 1 << 20
"""Characters that are tokenized at a time."""
LEARN_FROM = 16 << 20
"""Characters, spread evenly over the training part, that a BPE is trained on."""
SINGLE_PROCESS_BYTES = 16 << 20
"""Bytes of a corpus up to which this process tokenizes alone: others take a second to start. Where
tokens are bytes it always does, because handing text over costs more than making tokens of it."""
FORMAT = 1
"""Of the files and of how text is cut; a new number leaves older caches aside."""


class TextSource(abc.ABC):
    """A source of text documents, tokenized once and kept on disk.

    A document's split is drawn from a hash of its text: it depends neither on the order nor on
    other documents, and equal documents are on the same side.

    Args:
        tokenizer: ``bytes``; ``bpe``, trained on the training part; the path of a
            ``tokenizer.json``; or a tokenizer.
        vocab_size: ids of a ``bpe``, PAD, BOS and EOS counted.
        special_tokens: the names of ``pad``, ``bos`` and ``eos`` in a ``tokenizer.json``; null:
            the usual ones (see :meth:`causal_lm.data.subwords.Subwords.resolve`).
        val_share: share of the documents held out, where the source has no validation part.
        cache_dir: where tokens are kept; null: see :func:`token_cache.default_cache`.
        num_proc: processes that tokenize; null: one per core.
    """

    def __init__(
        self,
        *,
        tokenizer: str | TextTokenizer = "bytes",
        vocab_size: int = 2048,
        special_tokens: Mapping[str, str | None] | None = None,
        val_share: float = 0.05,
        cache_dir: str | None = None,
        num_proc: int | None = None,
    ) -> None:
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        self.special_tokens = dict(special_tokens or {})
        self.val_share, self.num_proc = val_share, num_proc or os.cpu_count() or 1
        self.cache_dir = Path(cache_dir).expanduser() if cache_dir else token_cache.default_cache()
        self.left_out: collections.Counter[str] = collections.Counter()
        """What :meth:`read` passed over, by kind."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Plain data that changes whenever the texts do, or what is made of them."""

    @abc.abstractmethod
    def read(self) -> Iterator[Chunk]:
        """All documents, in a fixed order."""

    @abc.abstractmethod
    def size(self) -> int:
        """About how many bytes there are to read."""

    def load(self) -> Corpus:
        """TokenizeChunk, or take what was tokenized before.

        Raises:
            ValueError: a split holds no document.
        """
        folder = self.cache_dir / token_cache.fingerprint(
            [FORMAT, type(self).__name__, self.identity(), self.val_share, self._recipe()]
        )
        started = time.perf_counter()
        token_cache.cached(folder, self._build)
        train, val, about = token_cache.read(folder)
        log.info(f"{about['summary']}; kept in {folder} ({time.perf_counter() - started:.1f} s)")
        return Corpus(train, val, from_state(about["tokenizer"]))

    def _recipe(self) -> list:
        """What the tokenizer depends on, before there is one."""
        if self.tokenizer == "bpe":
            return ["bpe", self.vocab_size]
        return ["is", self._given().state()]

    @functools.lru_cache  # noqa: B019  # sources are few
    def _given(self) -> TextTokenizer:
        if not isinstance(self.tokenizer, str):
            return self.tokenizer
        if self.tokenizer == "bytes":
            return Bytes()
        return Subwords.from_file(self.tokenizer, self.special_tokens)

    def chunks(
        self, parts: Iterable[tuple[Segments, bool]], val: bool | None = None
    ) -> Iterator[Chunk]:
        """Gather documents, each given as (its text, True).

        A long one is given as (a part, False) … (the last part, True); the hash of its first part
        decides on its split.
        """
        documents: list[Segments] = []
        size, begins, side = 0, True, val
        for segments, ends in parts:
            if begins and ends:
                documents.append(segments)
                size += len(segments[-1])
            if documents and (size >= CHUNK or not ends):
                yield Chunk(documents, val=val)
                documents, size = [], 0
            if not (begins and ends):
                if begins and val is None:
                    side = Chunk([segments]).held_out(self.val_share)[0]
                yield Chunk([segments], begins, ends, side)
            begins = ends
        if documents:
            yield Chunk(documents, val=val)

    def _build(self, folder: Path) -> None:
        tokenizer = self._trained() if self.tokenizer == "bpe" else self._given()
        state, size = tokenizer.state(), self.size()
        self.left_out.clear()
        with tqdm(total=size, unit="B", unit_scale=True, desc="tokenizing", disable=None) as bar:
            alone = size < SINGLE_PROCESS_BYTES or isinstance(tokenizer, Bytes)
            processes = 1 if alone else self.num_proc
            parts = tokenize_chunks(
                self.read(), TokenizeChunk(state, self.val_share), processes, bar.update
            )
            dtype = np.min_scalar_type(tokenizer.vocab_size - 1).name
            train, val = token_cache.write(folder, parts, dtype)
        left_out = "".join(f"; {n:,} {kind}" for kind, n in sorted(self.left_out.items()))
        summary = f"{train:,} documents for training, {val:,} for validation{left_out}"
        if not train or not val:
            raise ValueError(
                f"{summary}: a run needs both; cut finer (data.unit=line), or give data.val_path, "
                f"or another data.val_share"
            )
        token_cache.describe(folder, {"tokenizer": state, "dtype": dtype, "summary": summary})

    def _trained(self) -> Subwords:
        """A BPE of the training part, or of a share of it spread evenly, where it is large."""
        share = min(1.0, LEARN_FROM / max(self.size(), 1))

        def texts() -> Iterator[list[str]]:
            for n, chunk in enumerate(self.read()):
                if int((n + 1) * share) > int(n * share):
                    held = chunk.held_out(self.val_share)
                    training = [d for d, out in zip(chunk.documents, held, strict=True) if not out]
                    yield [text for document in training for text in document]

        return Subwords.train(texts(), self.vocab_size)
