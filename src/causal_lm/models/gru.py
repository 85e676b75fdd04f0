"""A recurrent language model: what came before transformers, and still learns fast when small."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from causal_lm.models.base import BaseCausalModel

Cache = dict[str, Tensor]
"""The hidden state after the positions seen so far, under ``state``; empty before the first."""


class GRU(BaseCausalModel):
    """Embedding, ``nn.GRU``, linear head. Positions play no part: order is in the recurrence.

    A mask cannot hide the past from a recurrent state. So what the mask says is read for where
    documents begin, and each document gets a row, and a fresh state, of its own.

    Args:
        vocab_size: V, the number of tokens, special ones included.
        d_model: width C of the embedding and of the hidden state.
        n_layers: recurrent layers.
        dropout: probability in [0, 1) between layers.
    """

    def __init__(self, vocab_size: int, d_model: int, n_layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.gru = nn.GRU(d_model, d_model, n_layers, batch_first=True, dropout=dropout)
        self.head = nn.Linear(d_model, vocab_size, bias=False)

    def body(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        may_attend: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """See :class:`BaseCausalModel`. Goes on from the state of a cache, and leaves the new one
        there; rows are then one document each, as they are without ``may_attend``."""
        x = self.tokens(input_ids)  # (B, T, C)
        if cache is not None:
            x, cache["state"] = self.gru(x, cache.get("state"))
            return x
        if may_attend is None:
            return self.gru(x)[0]
        lengths = document_lengths(may_attend)  # (D,)
        rows = pad_sequence(x.flatten(0, 1).split(lengths.tolist()), batch_first=True)  # (D, L, C)
        real = torch.arange(rows.shape[1], device=x.device) < lengths[:, None]  # (D, L)
        return self.gru(rows)[0][real].view_as(x)  # real slots in order: those of the batch

    @staticmethod
    def make_cache() -> Cache:
        """An empty cache, for generation."""
        return {}


def document_lengths(may_attend: Tensor) -> Tensor:
    """The lengths of the stretches of one document, row after row: bool (B, T, T) -> (D,).

    A document begins where a position may not look at the one before. (PAD is a stretch too.)

    >>> may = torch.block_diag(*[torch.ones(n, n) for n in (2, 3, 1)])[None].bool()
    >>> document_lengths(may)
    tensor([2, 3, 1])
    """
    begins = torch.ones(may_attend.shape[:2], dtype=torch.bool, device=may_attend.device)
    begins[:, 1:] = ~may_attend.diagonal(offset=-1, dim1=1, dim2=2)
    starts = begins.flatten().nonzero().flatten()  # row after row, so a row's first is one
    return torch.diff(starts, append=starts.new_tensor([begins.numel()]))
