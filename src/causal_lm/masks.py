"""Which positions may attend to which, in one convention: **True = may attend**.

This is the convention of ``F.scaled_dot_product_attention``. torch's older attention layers
(``nn.MultiheadAttention``, ``nn.TransformerEncoder``) mean the opposite by a bool mask, and add a
float mask to the scores; :meth:`AttentionMask.to_masked_out` and :meth:`AttentionMask.to_additive`
convert.

A row of two documents ``a a b b`` and one PAD slot (x = may attend; rows are queries):

          a a b b .
        a x
        a x x
        b     x
        b     x x
        .         x

One rule, for padding on either side and packed rows: query t may attend to key s if s <= t and both
belong to the same document; PAD counts as one (id -1). The diagonal is True: no softmax is NaN.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


def same_document(document_ids: Tensor) -> Tensor:
    """(B, T) document ids -> bool (B, T, T): both positions belong to the same document."""
    return document_ids[:, :, None] == document_ids[:, None, :]


def causal_within_documents(document_ids: Tensor) -> Tensor:
    """(B, T) document ids -> bool (B, T, T): may query t (dim 1) attend to key s (dim 2)?"""
    return same_document(document_ids).tril()


@dataclass(frozen=True)
class AttentionMask:
    """The attention mask of a batch, as a value that converts to what a kernel needs.

    The collator makes it from ``document_ids`` on the CPU, so no forward pass synchronizes with
    the device to learn how rows are laid out. (The idea: ``AttentionMask`` of levanter.)
    """

    document_ids: Tensor  # (B, T) document of each slot within its row, -1 at PAD
    plain_causal: bool  # one document per row, PAD on the right: ``is_causal`` says the same
    document_lengths: tuple[int, ...]  # of each document, row by row, PAD left out
    boundaries: Tensor
    """int32 (R + 1,): the first of the B·T slots of each run of one document, or of PAD, and B·T;
    the cumulative lengths that variable-length kernels take."""
    dense: Tensor | None = None  # bool (B, T, T) that replaces the rule (used by pitfalls only)

    @classmethod
    def from_document_ids(cls, document_ids: Tensor) -> "AttentionMask":
        """The mask of (B, T) document ids. Synchronizes with the device unless they are on the CPU.

        >>> AttentionMask.from_document_ids(torch.tensor([[0, 0, 0], [0, 0, -1]])).plain_causal
        True
        >>> AttentionMask.from_document_ids(torch.tensor([[0, 0, 1], [0, -1, -1]])).document_lengths
        (2, 1, 1)
        """
        ids = document_ids.cpu()
        same = ids[:, 1:] == ids[:, :-1]
        starts = F.pad(~same, (1, 0), value=True).flatten().nonzero().flatten()
        boundaries = F.pad(starts, (0, 1), value=ids.numel())
        lengths = boundaries.diff()[ids.flatten()[starts] >= 0]
        plain = bool((same | (ids[:, 1:] < 0)).all())
        where = boundaries.to(document_ids.device, torch.int32)
        return cls(document_ids, plain, tuple(lengths.tolist()), where)

    def map(self, move: Callable[[Tensor], Tensor]) -> "AttentionMask":
        """The same mask with ``move`` applied to its tensors (to another device, say)."""
        dense = None if self.dense is None else move(self.dense)
        ids, boundaries = move(self.document_ids), move(self.boundaries)
        return replace(self, document_ids=ids, boundaries=boundaries, dense=dense)

    def with_dense(self, dense: Tensor) -> "AttentionMask":
        """This mask, with bool (B, T, T) ``dense`` used instead of the document rule."""
        return replace(self, plain_causal=False, dense=dense)

    def to_dense(self) -> Tensor:
        """bool (B, T, T), True = may attend."""
        return causal_within_documents(self.document_ids) if self.dense is None else self.dense

    def to_masked_out(self) -> Tensor:
        """bool (B, T, T), True = masked out, the convention of ``nn.MultiheadAttention``."""
        return ~self.to_dense()

    def to_additive(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Float (B, T, T) to add to attention scores: 0 where allowed, -inf where masked out."""
        masked_out = self.to_masked_out()
        return torch.zeros_like(masked_out, dtype=dtype).masked_fill_(masked_out, float("-inf"))
