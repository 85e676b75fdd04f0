"""A modern decoder, written to be read: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

The architecture is that of Llama 2 (Touvron et al. 2023, https://arxiv.org/abs/2307.09288), so its
weights go to and from ``transformers`` (see ``hf_conversion.py``). No biases anywhere. Four options
let it learn faster; with ``mlp``, ``qk_norm`` or ``token_smear`` it is no plain Llama any more.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from causal_lm.models import hf_conversion
from causal_lm.models.base import BaseCausalModel

EMBEDDING_STD = 0.3
"""As in the seed model; docs/NOTES.md has what other values gave."""

RESIDUAL_PROJECTIONS = ("out.weight", "down.weight")
"""The matrices of a block whose products are added to the stream."""

LOGIT_STD = 0.1
"""Spread of the first logits: above 0 so that they answer to their input, small enough for a first
loss of ln V + LOGIT_STD² / 2."""


class KVCache:
    """The keys and values of every position seen so far, (B, KV, S, D) for each layer; and the
    last few embeddings, for :class:`TokenSmear`."""

    def __init__(self) -> None:
        self.embeddings: Tensor | None = None
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def __len__(self) -> int:
        """Positions seen so far, S."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append those of T new positions, (B, KV, T, D); returns all S + T of them."""
        if layer in self.layers:
            seen_k, seen_v = self.layers[layer]
            k, v = torch.cat([seen_k, k], dim=2), torch.cat([seen_v, v], dim=2)
        self.layers[layer] = k, v
        return k, v


class TokenSmear(nn.Module):
    """Adds to each embedding the few before it in its document, each channel by a learned weight.

    Short contexts are most of what a small model learns; this gives them without attention (So et
    al. 2021, https://arxiv.org/abs/2109.08668, do the like to queries, keys and values).
    """

    def __init__(self, d_model: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        # (reach, 1, C): nothing at first. Of three dimensions, as it is no matrix for Muon.
        self.weight = nn.Parameter(torch.zeros(reach, 1, d_model))

    def forward(self, x: Tensor, position_ids: Tensor, cache: KVCache | None) -> Tensor:
        """x (B, T, C), position_ids (B, T) -> (B, T, C)."""
        before = None if cache is None else cache.embeddings
        if before is None:
            before = x.new_zeros(len(x), self.reach, x.shape[2])
        slots = torch.cat([before, x], dim=1)  # (B, reach + T, C)
        if cache is not None:
            cache.embeddings = slots[:, -self.reach :]
        for back in range(1, self.reach + 1):
            inside = (position_ids >= back)[:, :, None]  # else it is of another document, or PAD
            earlier = slots[:, self.reach - back : slots.shape[1] - back]
            x = x + self.weight[back - 1] * earlier.masked_fill(~inside, 0)
        return x


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + D/2) of the last dimension by its position's angle.

    x (B, T, H, D), cos and sin (B, T, 1, D/2), all float32. Scores then depend on distances alone
    (RoFormer, https://arxiv.org/abs/2104.09864). Complex numbers would defeat ``torch.compile``.
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """torch's attention of (B, heads, T, D) in the precision of the values, but on a CPU float32:
    there the backward pass of bfloat16 takes 2.7 times as long."""
    if v.device.type != "cpu":
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, **options)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share one key and value head.

    Grouped queries: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245.
    """

    def __init__(
        self, d_model: int, n_heads: int, n_kv_heads: int, layer: int, qk_norm: bool
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.layer = n_heads, n_kv_heads, layer
        self.qk_norm = qk_norm
        self.d_head = d_model // n_heads
        self.qkv = nn.Linear(d_model, (n_heads + 2 * n_kv_heads) * self.d_head, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        may_attend: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        """x (B, T, C), may_attend bool (B, 1, T, S) or None for plain causal -> (B, T, C)."""
        x = self.qkv(x).unflatten(-1, (-1, self.d_head))  # (B, T, H + 2 KV, D)
        qk, v = x.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=2)
        qk = qk.float()
        if self.qk_norm:
            qk = F.rms_norm(qk, (self.d_head,))
        q, k = rotate(qk, *rotary).split([self.n_heads, self.n_kv_heads], dim=2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, KV, S, D)
        if may_attend is None:
            x = attend(q, k, v, is_causal=True, enable_gqa=self.n_heads > self.n_kv_heads)
        else:  # repeated by hand: with a mask, CUDA has no fast kernel that groups the queries
            k, v = (part.repeat_interleave(self.n_heads // self.n_kv_heads, 1) for part in (k, v))
            x = attend(q, k, v, attn_mask=may_attend)
        return self.out(x.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """A gated MLP (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down(F.silu(gate) * up)


class ReLU2(nn.Module):
    """Squared ReLU, ungated (So et al. 2021, https://arxiv.org/abs/2109.08668)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, d_ff, bias=False)
        self.down = nn.Linear(d_ff, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())


MLPS = {"swiglu": SwiGLU, "relu2": ReLU2}


class Block(nn.Module):
    """Attention, then MLP, each on a normed copy of the stream and added to it."""

    def __init__(self, sizes: hf_conversion.Sizes, layer: int) -> None:
        super().__init__()
        d_model, heads = sizes["d_model"], (sizes["n_heads"], sizes["n_kv_heads"])
        self.attention_norm = nn.RMSNorm(d_model, sizes["norm_eps"])
        self.attention = Attention(d_model, *heads, layer, sizes["qk_norm"])
        self.mlp_norm = nn.RMSNorm(d_model, sizes["norm_eps"])
        self.mlp = MLPS[sizes["mlp"]](d_model, sizes["d_ff"])

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        may_attend: Tensor | None,
        cache: KVCache | None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, may_attend, cache)
        return x + self.mlp(self.mlp_norm(x))


class Llama(BaseCausalModel):
    """Embedding, blocks, a last norm, linear head.

    Args:
        vocab_size: V, the number of tokens, special ones included.
        d_model: width C.
        n_heads: H, query heads; divides ``d_model`` into an even width per head.
        n_kv_heads: KV, key and value heads; divides ``n_heads``.
        n_layers: blocks.
        d_ff: width of the hidden layer of each block's MLP.
        rope_theta: the slowest pair of a head turns about once in ``2 pi rope_theta`` positions.
        norm_eps: added to the mean square in each norm.
        tied: the head's weight is that of the embedding.
        mlp: ``swiglu``, or ``relu2``.
        qk_norm: norm each query and key before it is turned, without weights (Henry et al. 2020,
            https://arxiv.org/abs/2010.04245): no score is above sqrt(D), so rates can be high.
        zero_init_residual: blocks begin by adding nothing to the stream, and a head of its own by
            saying next to nothing.
        token_smear: tokens before each one whose embeddings are added to its own.
        checkpoint_activations: forget what is inside each block and compute it again in the
            backward pass: less memory, a third more time, the same gradients.
        init_from: a folder with a Llama of ``transformers`` to start from, or None. The sizes above
            must be its sizes.

    Raises:
        FileNotFoundError, ValueError: ``init_from`` cannot be read, or has other sizes.
    """

    def __init__(
        self,
        vocab_size: int,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        n_layers: int,
        d_ff: int,
        rope_theta: float = 10_000.0,
        norm_eps: float = 1e-5,
        tied: bool = False,
        mlp: str = "swiglu",
        qk_norm: bool = False,
        zero_init_residual: bool = False,
        token_smear: int = 0,
        checkpoint_activations: bool = False,
        init_from: str | None = None,
    ) -> None:
        super().__init__()
        self.sizes: dict[str, Any] = {
            "vocab_size": vocab_size, "d_model": d_model, "n_heads": n_heads,
            "n_kv_heads": n_kv_heads, "n_layers": n_layers, "d_ff": d_ff,
            "rope_theta": rope_theta, "norm_eps": norm_eps, "tied": tied,
            "mlp": mlp, "qk_norm": qk_norm, "token_smear": token_smear,
        }  # fmt: skip
        self.self_contained = {"init_from": None}  # the sizes and a checkpoint's weights suffice
        self.checkpoint_activations = checkpoint_activations
        self.tokens = nn.Embedding(vocab_size, d_model)
        self.previous = TokenSmear(d_model, token_smear) if token_smear else None
        self.blocks = nn.ModuleList(Block(self.sizes, layer) for layer in range(n_layers))
        self.norm = nn.RMSNorm(d_model, norm_eps)
        self.head = nn.Linear(d_model, vocab_size, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self._initialize(n_layers)
        if zero_init_residual:
            self._begin_at_nothing()
        if init_from is not None:
            self.load_state_dict(hf_conversion.read_weights(init_from, self.sizes))

    def _initialize(self, n_layers: int) -> None:
        for name, parameter in self.blocks.named_parameters():
            if parameter.dim() > 1:
                # As GPT-2: the sum of 2 n_layers contributions keeps its size, whatever the depth.
                scale = (2 * n_layers) ** -0.5 if name.endswith(RESIDUAL_PROJECTIONS) else 1.0
                nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
        nn.init.normal_(self.tokens.weight, std=EMBEDDING_STD)
        nn.init.normal_(self.head.weight, std=EMBEDDING_STD)
        # A head of that size is loud (a tied one must be): the last norm turns it down.
        width = self.head.in_features
        nn.init.constant_(self.norm.weight, LOGIT_STD / (EMBEDDING_STD * width**0.5))

    def _begin_at_nothing(self) -> None:
        for name, parameter in self.blocks.named_parameters():
            if name.endswith(RESIDUAL_PROJECTIONS):
                nn.init.zeros_(parameter)
        if not self.sizes["tied"]:  # a loud head would be in the way of high rates
            nn.init.normal_(self.tokens.weight)
            nn.init.normal_(self.head.weight, std=LOGIT_STD * self.sizes["d_model"] ** -0.5)
            nn.init.ones_(self.norm.weight)

    def body(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        may_attend: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """See :class:`BaseCausalModel`. With a cache, the T new positions see the
        S before: may_attend is then (B, T, S + T). None, plain causal, has the fastest kernel."""
        rotary = self._rotary(position_ids)
        seen = 0 if cache is None else len(cache)
        if may_attend is None and seen:  # is_causal would let the first query see key 0 alone
            shape = (1, input_ids.shape[1], seen + input_ids.shape[1])
            may_attend = input_ids.new_ones(shape, dtype=torch.bool).tril(seen)
        mask = None if may_attend is None else may_attend[:, None]  # one for all heads
        x = self.tokens(input_ids)  # (B, T, C)
        if self.previous is not None:
            x = self.previous(x, position_ids, cache)
        for block in self.blocks:
            if self.checkpoint_activations and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, rotary, mask, cache, use_reentrant=False)
            else:
                x = block(x, rotary, mask, cache)
        return self.norm(x)

    def _rotary(self, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T) -> cos and sin of the angles, (B, T, 1, D/2) each, float32."""
        pairs = self.sizes["d_model"] // self.sizes["n_heads"] // 2
        # Float32 whatever the precision: bfloat16 cannot tell position 257 from 256.
        exponents = torch.arange(pairs, dtype=torch.float32, device=position_ids.device) / pairs
        angles = position_ids[:, :, None, None] * self.sizes["rope_theta"] ** -exponents
        return angles.cos(), angles.sin()

    @staticmethod
    def make_cache() -> KVCache:
        """An empty cache, for generation."""
        return KVCache()
