"""Who may see whom, in ONE convention: **True = may attend**.

The convention is that of ``F.scaled_dot_product_attention``. torch's older attention layers
(``nn.MultiheadAttention``, ``nn.TransformerEncoder``) mean the opposite by a bool mask, and add a
float mask to the scores; the two converters below are the only place where that is dealt with.

A row of two documents ``a a b b`` and one PAD slot (x = may attend; rows ask, columns answer):

          a a b b .
        a x
        a x x
        b     x
        b     x x
        .         x

One rule draws it: not later than me, and of my document; PAD is a "document" of its own (id -1).
The diagonal is always True, so no row is empty and no softmax is NaN. Padding on the left or on
the right, and several documents in one row, are all the same rule.
"""

import torch
from torch import Tensor


def same_document(document_ids: Tensor) -> Tensor:
    """(B, T) document ids -> bool (B, T, T): both positions belong to the same document."""
    return document_ids[:, :, None] == document_ids[:, None, :]


def causal(document_ids: Tensor) -> Tensor:
    """(B, T) document ids -> bool (B, T, T): may query t (dim 1) attend to key s (dim 2)?

    >>> causal(torch.tensor([[0, 0, -1]]))[0].int()
    tensor([[1, 0, 0],
            [1, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    return same_document(document_ids).tril()


def visible(document_ids: Tensor) -> Tensor | None:
    """:func:`causal`, or None where plain causal says the same of every real token.

    That is where each row is one document with PAD, if any, on the right: all of it comes later.
    Plain causal has the fastest kernels.

    >>> visible(torch.tensor([[0, 0, 0], [0, 0, -1]])) is None
    True
    """
    one_document = (document_ids == document_ids[:, :1]) | (document_ids < 0)
    pad_comes_last = document_ids[:, 1:] <= document_ids[:, :-1]
    if bool(one_document.all() & pad_comes_last.all()):
        return None
    return causal(document_ids)


def to_masked_out(may_attend: Tensor) -> Tensor:
    """To the bool masks of ``nn.MultiheadAttention`` and friends, where True = masked out."""
    return ~may_attend


def to_additive(may_attend: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """To a float mask that is added to attention scores: 0 where visible, -inf where not."""
    return torch.zeros_like(may_attend, dtype=dtype).masked_fill_(~may_attend, float("-inf"))
