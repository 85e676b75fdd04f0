"""DataModule: from a source to batches."""

import logging
import zlib
from collections.abc import Callable
from typing import Any

import lightning as L
import numpy as np
from torch import Generator
from torch.utils.data import DataLoader

from causal_lm.config import ConfigError
from causal_lm.data.collate import Batch, Collate
from causal_lm.data.documents import Corpus, Documents, Source
from causal_lm.data.sampler import DocumentSampler, Start
from causal_lm.data.streaming import StreamSampler, TextStream
from causal_lm.signals import held_back, leave_to_parent

log = logging.getLogger(__name__)

CRC_CHUNKS, CRC_TOKENS = 16, 2**16  # what a fingerprint reads, however many tokens there are
TEST_KEYS = "data.test_share=0.05, data.test_path, or data.source.test_documents=1000"
CHECKED_WINDOWS = 10_000  # most windows of a split with prompts that are checked for targets


class DataModule(L.LightningDataModule):
    """LightningDataModule that cuts, orders and batches the documents of a source.

    ``source`` is a :class:`causal_lm.data.documents.Source`, or a callable that makes one from
    ``source_options``, such as ``path``; ``shuffle`` draws a new training order each epoch, from
    ``seed``, of a stream within each ``shuffle_buffer`` windows. ``configs/data/_base.yaml``
    explains the other arguments.

    Raises TypeError where ``source_options`` are given and ``source`` is not a callable.
    """

    def __init__(
        self, source: Source | Callable[..., Source], *, batch_size: int, max_length: int,
        layout: str = "padded", padding_side: str = "right", pad_is_eos: bool = False,
        shuffle: bool = True, num_workers: int = 0, seed: int = 0,
        shuffle_buffer: int = 10_000, **source_options: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        if source_options and not callable(source):
            keys, kind = ", ".join(source_options), type(source).__name__
            raise TypeError(f"data has keys that {kind} does not take: {keys}; use data.source")
        self.source: Source = source(**source_options) if callable(source) else source
        self.batch_size, self.max_length = batch_size, max_length
        self.layout, self.shuffle, self.num_workers, self.seed = layout, shuffle, num_workers, seed
        self.padding_side, self.pad_is_eos = padding_side, pad_is_eos
        self.shuffle_buffer, self.start = shuffle_buffer, Start()
        self.corpus: Corpus | None = None
        self._stream_sampler: StreamSampler | None = None

    def load(self) -> Corpus:
        """Load the corpus once and cut it into windows. Raises ValueError for an empty split."""
        if self.corpus is None:
            self.corpus = self.source.load()
            if self.pad_is_eos:
                self.corpus.tokenizer.pad_id = self.corpus.tokenizer.eos_id
            self.train_windows = self._windows("train", self.corpus.train)
            self.val_windows = self._windows("val", self.corpus.val)
            test = self.corpus.test  # None or empty: there is no such split
            self.test_windows = self._windows("test", test) if test else None
            self.order = [self.seed, self.shuffle, *document_fingerprint(self.train_windows)]
        return self.corpus

    def setup(self, stage: str | None = None) -> None:
        self.load()
        self.start = Start() if stage == "fit" else self.start  # of a run that does not resume

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader()

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.val_windows)

    def test_dataloader(self) -> DataLoader[Batch]:
        """Raises ConfigError where the corpus has no test split."""
        if self.test_windows is None:
            raise ConfigError(f"there is no document to test on: set {TEST_KEYS}")
        return self._loader(self.test_windows)

    def save_position(self, unfinished: int) -> dict[str, Any]:
        """Where training is in its documents, without the last micro-batches that are unfinished,
        as plain data for a checkpoint."""
        sampler = self._sampler()
        start = sampler.position(self._batches_done() - unfinished)
        fields = [*start] if isinstance(sampler, StreamSampler) else [*start[:3]]
        return {"start": fields, "group_size": sampler.group_size, "order": self.order}

    def resume(self, saved: dict[str, Any], progress: dict[str, Any]) -> None:
        """Go on from a saved position, or with a new epoch if documents or seed are others.

        Changes Lightning's count of the epoch's micro-batches in ``progress`` where other settings
        leave another number of them; the first step may then sum fewer than the others.
        """
        self.start, is_same = Start(*saved["start"]), saved["order"] == self.order
        if not is_same:
            log.warning("the training documents or their order have changed: a new epoch begins")
            self.start = Start(self.start.batches, self.start.epoch + 1)
        sampler = self._sampler()
        if isinstance(sampler, StreamSampler):  # whose batches Lightning does not know
            return
        if not is_same or sampler.group_size != saved["group_size"]:
            left = 0 if progress["is_last_batch"] else sampler.n_batches(self.start.segments)
            change = sampler.n_batches() - left - progress["current"]["ready"]
            progress["current"] = {name: n + change for name, n in progress["current"].items()}

    def _windows(self, split: str, documents: Any) -> Any:
        windows = documents.windows(self.max_length)
        known = windows.first if isinstance(windows, TextStream) else windows
        if not len(known):
            raise ValueError(f"the {split} split of the corpus holds no document")
        if known is windows:
            n_long = int((documents.lengths > self.max_length).sum())
            sizes = f"{len(documents):,} documents, {len(documents.tokens):,} tokens"
            cut = f"{n_long:,} were longer than data.max_length={self.max_length}"
            log.info(f"{split}: {sizes}, {len(windows):,} windows ({cut})")
        if known.loss_mask is not None:
            step = -(-len(known) // CHECKED_WINDOWS)
            masks = [known[i].loss_mask for i in range(0, len(known), step)]
            empty = sum(not mask[1:].any() for mask in masks if mask is not None) / len(masks)
            if empty:
                todo = f"raise data.max_length={self.max_length}, or shorten the prompts"
                looked_at = f"{empty:.1%} of {len(masks):,} windows looked at"
                log.warning(f"{split}: {looked_at} have no target: {todo}")
        return windows

    def _batches_done(self) -> int:
        """Micro-batches trained on, over all epochs. Lightning's ``current_epoch`` cannot be used,
        because it also counts an epoch in which the run was stopped."""
        loop: Any = self.trainer.fit_loop.epoch_loop if self.trainer else None
        return loop.batch_progress.total.started if loop else 0  # not one that was only fetched

    def _sampler(self, held_out: Documents | None = None) -> DocumentSampler | StreamSampler:
        """Of the training windows, or of those of another split, in their order."""
        train, windows = held_out is None, held_out or self.train_windows
        options: Any = {"batches_done": self._batches_done, "start": self.start} if train else {}
        options |= {
            "shuffle": train and self.shuffle, "seed": self.seed, "batch_size": self.batch_size,
            "by_length": self.layout == "bucketed",
            "row_length": self.max_length if self.layout == "packed" else None,
            "rank": self.trainer.global_rank if self.trainer else 0,
            "world_size": self.trainer.world_size if self.trainer else 1,
        }  # fmt: skip
        if not isinstance(windows, TextStream):
            size = len(windows)
            return DocumentSampler(size, lengths=lambda: windows.lengths.numpy(), **options)
        if self._stream_sampler is None or self._stream_sampler.start is not self.start:
            self._stream_sampler = StreamSampler(windows, self.shuffle_buffer, **options)
        return self._stream_sampler  # the only one, as it knows the places of what it has read

    def _loader(self, held_out: Documents | None = None) -> DataLoader[Batch]:
        tokenizer = self.load().tokenizer
        collate = Collate(
            tokenizer.pad_id, tokenizer.vocab_size, padding_side=self.padding_side,
            row_length=self.max_length if self.layout == "packed" else None,
        )  # fmt: skip
        sampler = self._sampler(held_out)
        return Loader(
            held_out or self.train_windows,  # the collator turns documents into a Batch
            batch_size=None if isinstance(sampler, StreamSampler) else self.batch_size,
            sampler=sampler,
            collate_fn=collate,
            num_workers=self.num_workers,
            worker_init_fn=leave_to_parent,
            persistent_workers=self.num_workers > 0,
            generator=Generator(),  # otherwise a resumed run draws one seed of workers more
        )


class Loader(DataLoader):
    """A DataLoader whose workers leave signals to this process from their first moment on."""

    def _get_iterator(self) -> Any:
        with held_back():
            return super()._get_iterator()


def document_fingerprint(documents: Documents | TextStream) -> list[int]:
    """Number of documents, number of tokens, and a CRC of chunks spread evenly over the tokens; of
    a stream, of its beginning."""
    documents = documents.first if isinstance(documents, TextStream) else documents
    tokens, crc = documents.tokens, 0
    step = max(-(-len(tokens) // CRC_CHUNKS), CRC_TOKENS)
    for start in range(0, len(tokens), step):
        chunk = np.asarray(tokens[start : start + CRC_TOKENS], dtype="<i4")
        crc = zlib.crc32(chunk.tobytes(), crc)
    return [len(documents), len(tokens), crc]
