"""Documents of different lengths -> one rectangular batch, not shifted.

Three documents ``a``, ``b`` and ``c`` (· = PAD), one per row, and packed into rows of eight slots:

    padded   a a a a a a        packed   a a a a a a b b
             b b · · · ·                 c c c · · · · ·
             c c c · · ·

Positions restart in each document. ``document_ids`` say which document of its row a slot belongs
to: ``masks.py`` uses them to mask documents from each other, ``objective.py`` to keep one document
from predicting the next. So loss and gradient do not depend on the layout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causal_lm import objective
from causal_lm.data.documents import Document
from causal_lm.data.packing import longest_first
from causal_lm.masks import AttentionMask


@dataclass(eq=False)
class Batch:
    """B rows of T slots; ids are int64. Make changed copies with ``replace``. Whether a slot is PAD
    is told by ``document_ids``, which come from lengths, never by the token (PAD may be EOS)."""

    input_ids: Tensor  # (B, T) tokens, the PAD id where there is none
    position_ids: Tensor  # (B, T) 0, 1, 2 … within each document, and on through PAD after it
    document_ids: Tensor  # (B, T) document of each slot within its row, -1 at PAD
    loss_mask: Tensor | None = None  # (B, T) bool, False at context (a prompt); None: all True

    @cached_property
    def labels(self) -> Tensor:
        """(B, T): the next token of the same document, ``objective.IGNORE`` where there is none."""
        return objective.make_labels(self.input_ids, self.document_ids, self.loss_mask)

    @cached_property
    def attention_mask(self) -> AttentionMask:
        """Causal, within documents. :class:`Collate` evaluates it while the ids are on the CPU."""
        return AttentionMask.from_document_ids(self.document_ids)

    @property
    def lengths(self) -> Tensor:
        """(B,) real tokens in each row."""
        return (self.document_ids >= 0).sum(dim=1)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on ``device``, with the attention mask it already has."""
        return self._map(lambda x: x.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory, from where a GPU copies it in the background."""
        return self._map(torch.Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        mask = self.attention_mask.map(move)
        ids = move(self.input_ids), move(self.position_ids), mask.document_ids
        moved = Batch(*ids, None if self.loss_mask is None else move(self.loss_mask))
        moved.__dict__["attention_mask"] = mask
        return moved


class Collate:
    """Collates documents into a :class:`Batch`, one per row or packed in rows of ``row_length``
    slots. An empty document (index -1 of the sampler) becomes a row of PAD without targets."""

    def __init__(
        self, pad_id: int, vocab_size: int, *, padding_side: str = "right",  # or "left"
        row_length: int | None = None,  # None: one document per row
    ) -> None:  # fmt: skip
        self.pad_id, self.vocab_size = pad_id, vocab_size
        self.pad_left, self.row_length = padding_side == "left", row_length

    def __call__(self, documents: Sequence[Document]) -> Batch:
        """Documents, of any integer dtype -> Batch. Raises ValueError for no documents, an id
        outside the vocabulary (named), or a document longer than a packed row."""
        if not documents:
            raise ValueError("a batch needs at least one document")
        lengths = torch.tensor([len(document.tokens) for document in documents])
        tokens = torch.cat([document.tokens for document in documents]).long()
        self._check_range(tokens, lengths)

        # Row, number within the row, and first slot of each document.
        if self.row_length is None:
            row = torch.arange(len(lengths))
            number = first_slot = torch.zeros_like(row)
        else:
            row, number, first_slot = pack(lengths.tolist(), self.row_length)
        n_rows = int(row.max()) + 1
        slots_used = torch.zeros(n_rows, dtype=torch.int64).scatter_add_(0, row, lengths)
        width = max(int(slots_used.max()), 1)
        if self.pad_left:
            first_slot = first_slot + (width - slots_used)[row]

        # Position in its document, row and slot of each token.
        document_starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
        position = torch.arange(len(tokens)) - document_starts
        token_slot = first_slot.repeat_interleave(lengths) + position
        indices, shape = (row.repeat_interleave(lengths), token_slot), (n_rows, width)

        last = torch.zeros(n_rows, dtype=torch.int64).scatter_reduce_(0, row, first_slot, "amax")
        position_ids = (torch.arange(width) - last[:, None]).clamp(min=0)
        batch = Batch(
            torch.full(shape, self.pad_id).index_put_(indices, tokens),
            position_ids.index_put_(indices, position),
            torch.full(shape, -1).index_put_(indices, number.repeat_interleave(lengths)),
            self._loss_mask(documents, indices, shape),
        )
        _ = batch.attention_mask  # evaluated here, while the ids are on the CPU
        return batch

    @staticmethod
    def _loss_mask(documents, indices: Any, shape: tuple[int, int]) -> Tensor | None:
        if all(document.loss_mask is None for document in documents):
            return None
        masks = [torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
                 for tokens, mask in documents]  # fmt: skip
        return torch.zeros(shape, dtype=torch.bool).index_put_(indices, torch.cat(masks))

    def _check_range(self, tokens: Tensor, lengths: Tensor) -> None:
        outside = (tokens < 0) | (tokens >= self.vocab_size)
        if outside.any():
            first = int(outside.nonzero()[0])
            number = int((lengths.cumsum(0) <= first).sum())
            problem = f"document {number} of the batch holds token id {int(tokens[first])}"
            limit = f"outside the vocabulary of {self.vocab_size} (ids 0 to {self.vocab_size - 1})"
            raise ValueError(f"{problem}, {limit}: is this data tokenized by another tokenizer?")


def pack(lengths: Sequence[int], row_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pack documents into rows: row, number in the row and first slot of each document, (D,) each.

    Documents of no tokens go to row 0.

    >>> pack([3, 6, 2], 8)
    (tensor([1, 0, 0]), tensor([0, 0, 1]), tensor([0, 0, 6]))
    """
    placed = [(0, 0, 0)] * len(lengths)
    if (longest := max(lengths)) > row_length:
        raise ValueError(f"a document of {longest} tokens does not fit a row of {row_length}")
    for row, documents in enumerate(longest_first(np.array(lengths), row_length)):
        first_slot = 0
        for number, document in enumerate(documents.tolist()):
            if lengths[document]:
                placed[document] = row, number, first_slot
                first_slot += lengths[document]
    rows, numbers, first_slots = torch.tensor(placed).T.contiguous()
    return rows, numbers, first_slots
