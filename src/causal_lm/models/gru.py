"""A recurrent language model, which learns fast at small sizes."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from causal_lm.models.base import BaseCausalModel


class GRU(BaseCausalModel):
    """Embedding, ``nn.GRU``, linear head. ``position_ids`` are not used.

    A recurrent state cannot be masked, so each document of a packed row is run as a row of its own,
    from a zero state. (An explicit dense mask, as pitfalls use, has no effect.)

    d_model: width C of embedding and state; dropout: probability between layers.
    """

    def __init__(self, vocab_size: int, d_model: int, n_layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.gru = nn.GRU(d_model, d_model, n_layers, batch_first=True, dropout=dropout)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)

    def hidden_states(self, input_ids, position_ids, attention_mask=None, cache=None) -> Tensor:
        x = self.token_embedding(input_ids)  # (B, T, C)
        if cache is not None:
            x, cache["state"] = self.gru(x, cache.get("state"))
            return x
        if attention_mask is None or attention_mask.plain_causal:
            return self.gru(x)[0]
        real, lengths = attention_mask.document_ids >= 0, attention_mask.document_lengths
        documents = pad_sequence(x[real].split(lengths), batch_first=True)  # (D, L, C)
        states = self.gru(documents)[0]
        found = torch.cat([row[:n] for row, n in zip(states, lengths, strict=True)])
        return torch.zeros_like(x, dtype=found.dtype).masked_scatter(real[:, :, None], found)

    def make_cache(self) -> dict[str, Tensor]:
        return {}  # later {"state": the hidden state after the cached positions}
