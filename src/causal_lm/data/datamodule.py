"""From a source to batches."""

import logging
from collections.abc import Callable
from typing import Any

import lightning as L
from torch.utils.data import DataLoader

from causal_lm.data.collate import Batch, Collate
from causal_lm.data.documents import Corpus, Documents, Source
from causal_lm.data.sampler import DocumentSampler

log = logging.getLogger(__name__)


class DataModule(L.LightningDataModule):
    """Cuts, orders, pads and collates the documents of a source.

    Args:
        source: where documents come from (see :class:`causal_lm.data.documents.Source`), or what
            makes it from ``settings``.
        batch_size: documents per micro-batch and rank.
        max_length: tokens per row, BOS and EOS counted; longer documents are cut into windows
            (see :meth:`causal_lm.data.documents.Documents.windows`).
        layout: ``padded``, one document per row; ``bucketed``, likewise, with documents of like
            length in a batch; ``packed``, several in a row of up to ``max_length`` slots. Each
            holds ``batch_size`` documents.
        padding_side: ``right`` or ``left``.
        pad_is_eos: write EOS where there is no token, as models without a PAD of their own do.
        shuffle: draw the training order anew each epoch.
        num_workers: processes that collate; 0 does it in this one, which is fastest here.
        seed: of the order.
        settings: of the source; the data group's own keys, such as ``data.path``.
    """

    def __init__(
        self,
        source: Source | Callable[..., Source],
        *,
        batch_size: int,
        max_length: int,
        layout: str = "padded",
        padding_side: str = "right",
        pad_is_eos: bool = False,
        shuffle: bool = True,
        num_workers: int = 0,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.source: Source = source(**settings) if callable(source) else source
        self.batch_size, self.max_length = batch_size, max_length
        self.layout, self.shuffle, self.num_workers, self.seed = layout, shuffle, num_workers, seed
        self.padding_side, self.pad_is_eos = padding_side, pad_is_eos
        self.corpus: Corpus | None = None

    def load(self) -> Corpus:
        """The corpus, read once; Lightning's hooks need not have run.

        Raises:
            ValueError: a split holds no document.
        """
        if self.corpus is None:
            self.corpus = self.source.load()
            if self.pad_is_eos:
                self.corpus.tokenizer.pad_id = self.corpus.tokenizer.eos_id
            self.train_rows = self._rows("train", self.corpus.train)
            self.val_rows = self._rows("val", self.corpus.val)
        return self.corpus

    def setup(self, stage: str | None = None) -> None:
        self.load()

    def _rows(self, split: str, documents: Documents) -> Documents:
        if not len(documents):
            raise ValueError(f"the {split} split of the corpus is empty: it holds no document")
        rows = documents.windows(self.max_length)
        long = int((documents.lengths > self.max_length).sum())
        log.info(
            f"{split}: {len(documents):,} documents, {len(documents.tokens):,} tokens; {long:,} "
            f"longer than data.max_length={self.max_length} were cut, making {len(rows):,} rows"
        )
        return rows

    def train_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.train_rows, shuffle=self.shuffle, done=self._done)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._loader(self.val_rows, shuffle=False)

    def _done(self) -> int:
        """Micro-batches trained on, over all epochs. Lightning's number of the epoch would not do:
        it counts one that the run ended in the middle of."""
        return self.trainer.fit_loop.total_batch_idx + 1 if self.trainer else 0

    def _loader(self, rows: Documents, **order: Any) -> DataLoader[Batch]:
        tokenizer = self.load().tokenizer
        return DataLoader(
            rows,  # type: ignore[arg-type]  # collate turns documents into a Batch
            batch_size=self.batch_size,
            sampler=DocumentSampler(
                len(rows),
                seed=self.seed,
                rank=self.trainer.global_rank if self.trainer else 0,
                world_size=self.trainer.world_size if self.trainer else 1,
                lengths=rows.lengths.numpy() if self.layout == "bucketed" else None,
                batch_size=self.batch_size,
                **order,
            ),
            collate_fn=Collate(
                tokenizer.pad_id,
                tokenizer.vocab_size,
                padding_side=self.padding_side,
                packed=self.max_length if self.layout == "packed" else None,
            ),
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
        )
