"""Token documents of uneven length, stored flat."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from causal_lm.data.tokenizers import Tokenizer


class Document(NamedTuple):
    """The tokens of one document, (n,).

    loss_mask: bool (n,), False at tokens that are given and not to be learned; None: learn all.
    """

    tokens: Tensor
    loss_mask: Tensor | None = None


class Documents(Dataset[Document]):
    """A sized, map-style data set of documents over one flat array.

    Args:
        tokens: (N,) every token, documents end to end.
        starts, ends: (D,) where each document begins and (exclusively) ends; they may overlap.
        loss_mask: bool (N,), see :class:`Document`.
    """

    def __init__(
        self, tokens: Tensor, starts: Tensor, ends: Tensor, loss_mask: Tensor | None = None
    ) -> None:
        lengths = ends - starts
        if len(lengths) and int(lengths.min()) < 2:
            raise ValueError(
                f"document {int(lengths.argmin())} has {int(lengths.min())} token(s): "
                f"it needs two to have a target (BOS and EOS count)"
            )
        self.tokens, self.starts, self.ends = tokens, starts, ends
        self.loss_mask = loss_mask

    @classmethod
    def from_lists(cls, documents: Iterable[Sequence[int]]) -> "Documents":
        arrays = [np.asarray(document, dtype=np.int32) for document in documents]
        ends = torch.tensor([len(a) for a in arrays], dtype=torch.int64).cumsum(0)
        tokens = torch.from_numpy(np.concatenate(arrays) if arrays else np.empty(0, np.int32))
        return cls(tokens, torch.cat([ends.new_zeros(1), ends])[: len(arrays)], ends)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Document:
        """Index -1 (a sampler's filler) is a document of no tokens."""
        here = slice(0, 0) if index < 0 else slice(self.starts[index], self.ends[index])
        mask = None if self.loss_mask is None else self.loss_mask[here]
        return Document(self.tokens[here], mask)

    @property
    def lengths(self) -> Tensor:
        """(D,) tokens of each document."""
        return self.ends - self.starts

    def windows(self, max_length: int) -> "Documents":
        """Cut documents longer than ``max_length`` into windows that together keep every target.

        Neighbouring windows share one token: the last of one, which only is a target there, is
        the first of the next, where it only is an input. So the number of targets does not
        depend on ``max_length``; only the context that precedes them does.
        """
        stride = max_length - 1
        counts = (self.lengths - 2).div(stride, rounding_mode="floor") + 1
        owner = torch.repeat_interleave(torch.arange(len(self)), counts)
        rank = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
        starts = self.starts[owner] + rank * stride
        ends = torch.minimum(starts + max_length, self.ends[owner])
        return Documents(self.tokens, starts, ends, self.loss_mask)


class Language(Protocol):
    """A source that knows its own probabilities."""

    def nll(self, documents: Documents) -> tuple[float, int]:
        """Nats and number of the targets of ``documents`` under the true distribution."""

    def legal(self, previous: Tensor, following: Tensor) -> Tensor:
        """bool: may ``following`` come after ``previous``?"""


@dataclass(frozen=True)
class Corpus:
    """What a source gives: documents ``BOS … EOS`` of both splits, and how to read them."""

    train: Documents
    val: Documents
    tokenizer: Tokenizer
    language: Language | None = None


class Source(Protocol):
    """Anything with ``load() -> Corpus`` is a source."""

    def load(self) -> Corpus: ...
