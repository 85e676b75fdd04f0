"""The objective: which token is the target of position t, and which targets count.

Both questions are answered here and nowhere else. A batch arrives *not shifted*; the labels are
made once, from where documents begin and end, and never by comparing token values with PAD. That
is why PAD may equal EOS:

    input_ids      BOS  the  cat  EOS  PAD  PAD
    document_ids     0    0    0    0   -1   -1
    labels         the  cat  EOS    ·    ·    ·      (· = IGNORE)

Units: losses are in nats; counts are in tokens.
"""

import torch.nn.functional as F
from torch import Tensor

IGNORE = -100
"""The label of a position that does not count (the default ``ignore_index`` of torch)."""


def next_tokens(input_ids: Tensor) -> Tensor:
    """The token after each position: (B, T) -> (B, T). Nothing follows the last: IGNORE."""
    return F.pad(input_ids[:, 1:], (0, 1), value=IGNORE)


def has_next(document_ids: Tensor) -> Tensor:
    """True where the next position holds the same document: (B, T) -> bool (B, T).

    Document ids are >= 0, and -1 at PAD. The last token of a document (its EOS) predicts nothing,
    and neither does PAD; so each document of n tokens has n - 1 targets, the last of them EOS.
    """
    following = F.pad(document_ids[:, 1:], (0, 1), value=-1)
    return (document_ids >= 0) & (document_ids == following)


def make_labels(targets: Tensor, counted: Tensor) -> Tensor:
    """Targets (B, T) where they count, IGNORE elsewhere."""
    return targets.masked_fill(~counted, IGNORE)


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of each label, in nats, float32; 0 where the label is IGNORE.

    logits (B, T, V), labels (B, T) -> (B, T). Computed in float32 whatever the logits' dtype.
    """
    return F.cross_entropy(
        logits.flatten(0, -2).float(), labels.flatten(), ignore_index=IGNORE, reduction="none"
    ).view_as(labels)


def count(labels: Tensor) -> Tensor:
    """How many labels count, a scalar."""
    return (labels != IGNORE).sum()


def mean_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labels that count, in nats per token.

    A batch in which nothing counts gives 0 with a gradient of 0, not NaN.

    >>> import torch
    >>> logits = torch.zeros(1, 3, 4)  # uniform over four tokens
    >>> mean_nll(logits, torch.tensor([[1, 2, IGNORE]]))  # ln 4
    tensor(1.3863)
    """
    return token_nll(logits, labels).sum() / count(labels).clamp(min=1)
