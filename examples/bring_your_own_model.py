"""A model of your own, outside the package: gated causal convolutions over the last few tokens.

Train it with `python train.py --config-dir examples/configs model=conv`, and test it with
`pytest examples/bring_your_own_model.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from causal_lm.models.base import BaseCausalModel, Mask
from causal_lm.testing import ModelContract


class ConvLayer(nn.Module):
    """Mixes the last ``reach`` tokens of the document, channel by channel, then the channels."""

    def __init__(self, width: int, reach: int) -> None:
        super().__init__()
        self.taps = nn.Parameter(0.3 * torch.randn(reach, 1, width))
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, 2 * width)

    def forward(self, x: Tensor, position_ids: Tensor) -> Tensor:
        mixed, normed = x, self.norm(x)  # (B, T, C)
        for back, tap in enumerate(self.taps):
            earlier = F.pad(normed, (0, 0, back, 0))[:, : x.shape[1]]
            # Positions restart in each document: mask what reaches before its first token.
            mixed = mixed + tap * earlier * (position_ids >= back)[..., None]
        value, gate = self.mix(mixed).chunk(2, dim=-1)
        return x + value * gate.sigmoid()


class ConvLM(BaseCausalModel):
    """Embedding, ``layers`` convolutions of ``reach`` tokens each, linear head."""

    def __init__(self, vocab_size: int, width: int = 64, layers: int = 4, reach: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(ConvLayer(width, reach) for _ in range(layers))
        self.lm_head = nn.Linear(width, vocab_size, bias=False)

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, attention_mask: Mask = None, cache=None
    ) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x, position_ids)
        return x


class TestConvLM(ModelContract):
    def make_model(self) -> ConvLM:
        return ConvLM(self.vocab_size, width=32)
