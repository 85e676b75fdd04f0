"""Documents of uneven length to one rectangular batch. Never shifted: labels are objective.py's."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch of B rows and T slots, all int64.

    input_ids     (B, T) tokens, PAD where there is none
    position_ids  (B, T) 0, 1, 2 … within each document; they run on into PAD
    document_ids  (B, T) which document of its row a slot belongs to; -1 at PAD

    Whether a slot is PAD is said by ``document_ids``, from lengths; the token value says nothing
    (PAD may be EOS).
    """

    input_ids: Tensor
    position_ids: Tensor
    document_ids: Tensor

    @property
    def lengths(self) -> Tensor:
        """(B,) real tokens in each row."""
        return (self.document_ids >= 0).sum(dim=1)


class PaddedCollate:
    """One document per row, PAD on the right up to the longest.

    A document of no tokens (a sampler's filler) becomes a row of PAD, in which nothing counts.

    Args:
        pad_id: token written where there is none.
        vocab_size: ids must lie below it.
    """

    def __init__(self, pad_id: int, vocab_size: int) -> None:
        self.pad_id, self.vocab_size = pad_id, vocab_size

    def __call__(self, documents: Sequence[Tensor]) -> Batch:
        """Documents, each (n,) of any integer dtype -> Batch.

        Raises:
            ValueError: there is no document, or an id outside the vocabulary (the row is named).
        """
        if not documents:
            raise ValueError("a batch needs at least one document")
        lengths = torch.tensor([len(document) for document in documents])
        flat = torch.cat(list(documents)).long()
        self._check_range(flat, lengths)
        slots = torch.arange(max(int(lengths.max()), 1))  # (T,)
        real = slots < lengths[:, None]  # (B, T)
        input_ids = torch.full(real.shape, self.pad_id, dtype=torch.int64)
        input_ids[real] = flat
        return Batch(
            input_ids,
            position_ids=slots.repeat(len(documents), 1),
            document_ids=real.long() - 1,
        )

    def _check_range(self, flat: Tensor, lengths: Tensor) -> None:
        outside = (flat < 0) | (flat >= self.vocab_size)
        if outside.any():
            at = int(outside.nonzero()[0])
            row = int((lengths.cumsum(0) <= at).sum())
            raise ValueError(
                f"row {row} of the batch holds token id {int(flat[at])}, outside the vocabulary "
                f"of {self.vocab_size} (ids 0 to {self.vocab_size - 1}): "
                f"was this data tokenised with another tokenizer?"
            )
