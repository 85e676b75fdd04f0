"""The smallest model here: a pre-norm ``nn.TransformerEncoder`` made causal by its mask."""

import torch
from torch import Tensor, nn

from causal_lm.models.base import BaseCausalModel, check_length


class Tiny(BaseCausalModel):
    """Token and learned position embeddings, pre-norm transformer blocks, linear head."""

    def __init__(
        self,
        vocab_size: int,  # V, special tokens included
        d_model: int,  # width C
        n_heads: int,  # divides d_model
        n_layers: int,
        d_ff: int,  # width of the hidden layer of each block's MLP
        max_positions: int,  # longest row
        dropout: float = 0.0,  # probability, applied as nn.TransformerEncoderLayer does
    ) -> None:
        super().__init__()
        self.n_heads, self.max_positions = n_heads, max_positions
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.position_embedding = nn.Embedding(max_positions, d_model)
        # On docstrings std 0.3 gives 2.68 bits per byte, N(0, 1) 2.98 (docs/NOTES.md).
        for table in self.embeddings():
            nn.init.normal_(table.weight, std=0.3)
        layer = nn.TransformerEncoderLayer(
            d_model, n_heads, d_ff, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        # Nested tensors would drop padded rows in eval mode only; without them both modes agree.
        self.blocks = nn.TransformerEncoder(
            layer, n_layers, norm=nn.LayerNorm(d_model), enable_nested_tensor=False
        )
        for parameter in self.blocks.parameters():  # the layers start as copies of one
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        nn.init.normal_(self.lm_head.weight, std=0.02)

    def hidden_states(self, input_ids, position_ids, attention_mask=None, cache=None) -> Tensor:
        length = input_ids.shape[1]
        check_length(length, self.max_positions)
        x = self.token_embedding(input_ids) + self.position_embedding(position_ids)  # (B, T, C)
        # nn.TransformerEncoder takes True = masked out, as (T, T) or (B * heads, T, T).
        if attention_mask is None or attention_mask.plain_causal:
            later = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
            return self.blocks(x, mask=later, is_causal=True)
        mask = attention_mask.to_masked_out().repeat_interleave(self.n_heads, dim=0)
        return self.blocks(x, mask=mask, is_causal=False)  # (B, T, C)
