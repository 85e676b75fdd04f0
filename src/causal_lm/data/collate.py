"""Documents of different lengths -> one rectangular batch, not shifted.

Three documents ``a``, ``b`` and ``c`` (· = PAD), one per row, and packed into rows of eight slots:

    padded   a a a a a a        packed   a a a a a a b b
             b b · · · ·                 c c c · · · · ·
             c c c · · ·

Positions start anew in each document. ``document_ids`` say which document of its row a slot belongs
to: ``masks.py`` uses them to hide documents from each other, ``objective.py`` to keep one document
from predicting the next. So loss and gradient do not depend on the layout.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from causal_lm import objective
from causal_lm.data.documents import Document
from causal_lm.masks import AttentionMask


@dataclass(eq=False)
class Batch:
    """One micro-batch of B rows and T slots; ids are int64. Make changed copies with ``replace``.

    Whether a slot is PAD is told by ``document_ids``, which come from lengths, never by the token
    value (PAD may be EOS).
    """

    input_ids: Tensor  # (B, T) tokens, the PAD id where there is none
    position_ids: (
        Tensor  # (B, T) 0, 1, 2 … within each document; they continue into PAD on the right
    )
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
    """Puts one document into each row, or several with ``packed``, and pads to the longest row.

    A document of no tokens (a filler of the sampler) becomes a row of PAD without targets.
    """

    def __init__(
        self,
        pad_id: int,
        vocab_size: int,  # ids must lie below it
        *,
        padding_side: str = "right",  # or "left"
        packed: int | None = None,  # slots per row; None: each document has its own row
    ) -> None:
        self.pad_id, self.vocab_size = pad_id, vocab_size
        self.left, self.packed = padding_side == "left", packed

    def __call__(self, documents: Sequence[Document]) -> Batch:
        """Documents, of any integer dtype -> Batch.

        Raises:
            ValueError: no documents, an id outside the vocabulary (named), or a document longer
                than a packed row.
        """
        if not documents:
            raise ValueError("a batch needs at least one document")
        lengths = torch.tensor([len(document.tokens) for document in documents])
        tokens = torch.cat([document.tokens for document in documents]).long()
        self._check_range(tokens, lengths)

        # Of each document: its row, its number in the row, and its first slot.
        if self.packed is None:
            rows = torch.arange(len(lengths))
            numbers = firsts = torch.zeros_like(rows)
        else:
            rows, numbers, firsts = first_fit(lengths.tolist(), self.packed)
        n_rows = int(rows.max()) + 1
        filled = torch.zeros(n_rows, dtype=torch.int64).scatter_add_(0, rows, lengths)
        width = max(int(filled.max()), 1)
        if self.left:
            firsts = firsts + (width - filled)[rows]

        # Of each token: its row, its position in the document, and its slot.
        starts = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)  # of its document
        position = torch.arange(len(tokens)) - starts
        row, slot = rows.repeat_interleave(lengths), firsts.repeat_interleave(lengths) + position

        last = torch.zeros(n_rows, dtype=torch.int64).scatter_reduce_(0, rows, firsts, "amax")
        position_ids = (torch.arange(width) - last[:, None]).clamp(min=0)
        position_ids[row, slot] = position
        shape, at = (n_rows, width), (row, slot)
        batch = Batch(
            torch.full(shape, self.pad_id).index_put_(at, tokens),
            position_ids,
            torch.full(shape, -1).index_put_(at, numbers.repeat_interleave(lengths)),
            self._loss_mask(documents, at, shape),
        )
        _ = batch.attention_mask  # evaluated here, while the ids are on the CPU
        return batch

    @staticmethod
    def _loss_mask(documents, at: tuple[Tensor, Tensor], shape: tuple[int, int]) -> Tensor | None:
        if all(document.loss_mask is None for document in documents):
            return None
        flat = [
            torch.ones(len(d.tokens), dtype=torch.bool) if d.loss_mask is None else d.loss_mask
            for d in documents
        ]
        return torch.zeros(shape, dtype=torch.bool).index_put_(at, torch.cat(flat))

    def _check_range(self, flat: Tensor, lengths: Tensor) -> None:
        outside = (flat < 0) | (flat >= self.vocab_size)
        if outside.any():
            at = int(outside.nonzero()[0])
            number = int((lengths.cumsum(0) <= at).sum())
            raise ValueError(
                f"document {number} of the batch holds token id {int(flat[at])}, outside the "
                f"vocabulary of {self.vocab_size} (ids 0 to {self.vocab_size - 1}): "
                f"was this data tokenized with another tokenizer?"
            )


def first_fit(lengths: Sequence[int], capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pack documents into rows: row, number in the row and first slot of each document, (D,) each.

    First-fit decreasing: longest first, each into the first row with room. It needs at most 11/9 of
    the fewest rows possible, plus a constant (Johnson 1973). Documents of no tokens go to row 0.

    >>> first_fit([3, 6, 2], 8)
    (tensor([1, 0, 0]), tensor([0, 0, 1]), tensor([0, 0, 6]))
    """
    used, held = [0], [0]  # of each row: slots and documents
    placed = torch.zeros(3, len(lengths), dtype=torch.int64)
    for document in sorted(range(len(lengths)), key=lambda d: -lengths[d]):
        length = lengths[document]
        if length > capacity:
            raise ValueError(f"a document of {length} tokens does not fit a row of {capacity}")
        row = next((r for r, n in enumerate(used) if n + length <= capacity), len(used))
        if row == len(used):
            used.append(0)
            held.append(0)
        placed[:, document] = torch.tensor([row, held[row], used[row]])
        used[row] += length
        held[row] += 1
    return placed[0], placed[1], placed[2]
