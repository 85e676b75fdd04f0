"""A modern decoder: RMSNorm, rotary positions, grouped-query attention, gated MLP, no biases.

By default it is Llama 2 (Touvron et al. 2023, https://arxiv.org/abs/2307.09288), whose weights
convert to and from ``transformers`` (see ``hf_conversion.py``). ``mlp``, ``qk_norm`` and
``token_smear`` make it learn faster at small sizes; with any of them it is no longer a Llama.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from causal_lm.masks import AttentionMask
from causal_lm.models import hf_conversion
from causal_lm.models.base import BaseCausalModel, Mask
from causal_lm.models.rms_norm import RMSNorm

EMBEDDING_STD = 0.3  # standard deviation of the embeddings (measured in docs/NOTES.md)
LOGIT_STD = 0.1  # of the first logits: above 0, so that they depend on the input
RESIDUAL_PROJECTIONS = ("out.weight", "down.weight")  # their output is added to the residual stream
MEAN_DOCUMENT = 32
"""Tokens of the mean document from which each is attended alone (measured in
docs/performance.md)."""
Rotary = tuple[Tensor, Tensor]  # cosine and sine of each position and pair of channels


class KVCache:
    """What is kept of the cached positions."""

    def __init__(self) -> None:
        self.embeddings: Tensor | None = None  # (B, n_previous, C), for TokenSmear
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}  # keys and values, (B, KV, S, D)

    def __len__(self) -> int:
        """Cached positions, S."""
        return self.layers[0][0].shape[2] if self.layers else 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append T new positions, (B, KV, T, D); returns all S + T of them."""
        if layer in self.layers:
            old_k, old_v = self.layers[layer]
            k, v = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
        self.layers[layer] = k, v
        return k, v


class TokenSmear(nn.Module):
    """Adds the embeddings of the few previous tokens of the document, weighted per channel: a
    causal depthwise convolution (one after queries, keys and values: So et al. 2021,
    https://arxiv.org/abs/2109.08668)."""

    def __init__(self, d_model: int, n_previous: int) -> None:
        super().__init__()
        self.n_previous = n_previous
        self.weight = nn.Parameter(torch.zeros(n_previous, 1, d_model))  # (n_previous, 1, C)

    def forward(self, x: Tensor, position_ids: Tensor, cache: KVCache | None) -> Tensor:
        """x (B, T, C), position_ids (B, T) -> (B, T, C)."""
        before = None if cache is None else cache.embeddings
        if before is None:
            before = x.new_zeros(len(x), self.n_previous, x.shape[2])
        slots = torch.cat([before, x], dim=1)  # (B, n_previous + T, C)
        if cache is not None:
            cache.embeddings = slots[:, -self.n_previous :]
        for back in range(1, self.n_previous + 1):
            inside = (position_ids >= back)[:, :, None]  # else the slot is of another document
            earlier = slots[:, self.n_previous - back : slots.shape[1] - back]
            x = x + self.weight[back - 1] * earlier.masked_fill(~inside, 0)
        return x


# Which keys a query may see: True in bool (B, 1, T, S); or all earlier ones of its document, of
# which one row of T positions holds those of these lengths, or all rows those between the
# boundaries, int32 (R + 1,); None: all earlier ones.
Visible = Tensor | tuple[int, ...] | None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channels i and i + D/2 of x (B, T, H, D), float32, by the angle of the position:
    attention scores depend on distances alone (RoFormer, https://arxiv.org/abs/2104.09864)."""
    # Without complex numbers, which ``torch.compile`` does not fuse.
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """``scaled_dot_product_attention`` of (B, heads, T, D) in the dtype of the values. On a CPU it
    runs in float32: the backward pass of bfloat16 takes 2.7 times as long there."""
    if v.device.type != "cpu":
        return F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, **options)
    with torch.autocast("cpu", enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **options)


def attend_between(boundaries: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of (B, H, T, D) within each document, by the ``boundaries`` of an AttentionMask."""
    length = q.shape[2]  # no document is longer; a constant, so that torch.compile compiles once
    q, k, v = (part.to(v.dtype).transpose(1, 2).flatten(0, 1) for part in (q, k, v))  # (B T, H, D)
    x: Any = varlen_attn(q, k, v, boundaries, boundaries, length, length, window_size=(-1, 0))
    return x.unflatten(0, (-1, length)).transpose(1, 2)


class Attention(nn.Module):
    """Causal self-attention in which groups of query heads share one key and value head (grouped
    queries; Ainslie et al. 2023, https://arxiv.org/abs/2305.13245)."""

    def __init__(self, sizes: hf_conversion.Sizes, layer: int) -> None:
        super().__init__()
        self.layer, self.qk_norm, width = layer, sizes["qk_norm"], sizes["d_model"]
        self.n_heads, self.n_kv_heads = sizes["n_heads"], sizes["n_kv_heads"]
        self.d_head = width // self.n_heads
        self.qkv = nn.Linear(width, (self.n_heads + 2 * self.n_kv_heads) * self.d_head, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, rotary: Rotary, visible: Visible, cache: KVCache | None) -> Tensor:
        """x (B, T, C), and which of the S positions each of the T may see -> (B, T, C)."""
        x = self.qkv(x).unflatten(-1, (-1, self.d_head))  # (B, T, H + 2 KV, D)
        qk, v = x.split([self.n_heads + self.n_kv_heads, self.n_kv_heads], dim=2)
        qk = qk.float()
        if self.qk_norm:
            qk = F.rms_norm(qk, (self.d_head,))
        q, k = rotate(qk, *rotary).split([self.n_heads, self.n_kv_heads], dim=2)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, KV, S, D)
        if isinstance(visible, Tensor):
            # With a mask, CUDA has no fast kernel that groups queries: repeat keys and values.
            k, v = (part.repeat_interleave(self.n_heads // self.n_kv_heads, 1) for part in (k, v))
            is_dense = visible.dtype == torch.bool
            x = attend(q, k, v, attn_mask=visible) if is_dense else attend_between(visible, q, k, v)
        else:  # plain causal, in the whole row or in each of its documents
            lengths, gqa = visible or q.shape[2], self.n_heads > self.n_kv_heads
            documents = zip(*(part.split(lengths, dim=2) for part in (q, k, v)), strict=True)
            parts = [attend(*qkv, is_causal=True, enable_gqa=gqa) for qkv in documents]
            x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return self.out(x.transpose(1, 2).flatten(2).to(self.out.weight.dtype))


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
    """Attention, then MLP; each reads a normalized copy of the residual stream and adds to it."""

    def __init__(self, sizes: hf_conversion.Sizes, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(sizes["d_model"], sizes["norm_eps"])
        self.attention = Attention(sizes, layer)
        self.mlp_norm = RMSNorm(sizes["d_model"], sizes["norm_eps"])
        self.mlp = MLPS[sizes["mlp"]](sizes["d_model"], sizes["d_ff"])

    def forward(self, x: Tensor, *context: Any) -> Tensor:
        """x (B, T, C) and the other arguments of :class:`Attention` -> (B, T, C)."""
        x = x + self.attention(self.attention_norm(x), *context)
        return x + self.mlp(self.mlp_norm(x))


def _by_document(mask: AttentionMask) -> bool:
    """Whether PAD is to be left out, and each document attended alone. On a GPU one kernel for all
    of them is faster, and ``torch.compile`` would compile anew for other lengths."""
    if mask.dense is not None or mask.document_ids.device.type != "cpu":
        return False
    lengths = mask.document_lengths
    return sum(lengths) > MEAN_DOCUMENT * len(lengths) and not torch.compiler.is_compiling()


def _has_varlen_kernel(weight: Tensor, d_head: int) -> bool:
    """Whether :func:`attend_between` can run: in half precision, on a GPU from NVIDIA's A100 on."""
    is_mixed = torch.is_autocast_enabled("cuda")
    dtype = torch.get_autocast_dtype("cuda") if is_mixed else weight.dtype
    fits = dtype in (torch.bfloat16, torch.float16) and d_head % 8 == 0 and d_head <= 256
    return fits and weight.is_cuda and torch.cuda.get_device_properties(weight.device).major >= 8


class Decoder(BaseCausalModel):
    """Embedding, blocks, final norm, linear head. Raises FileNotFoundError or ValueError where
    ``init_from`` cannot be read, or has other sizes."""

    def __init__(
        self,
        vocab_size: int,  # V, special tokens included
        d_model: int,  # width C
        n_heads: int,  # H query heads; d_model / n_heads must be a whole, even number
        n_kv_heads: int,  # KV key and value heads; divides n_heads
        n_layers: int,
        d_ff: int,  # F, width of the hidden layer of each block's MLP
        rope_theta: float = 10_000.0,  # base of the rotary angles
        norm_eps: float = 1e-5,  # added to the mean square in each norm
        tied: bool = False,  # head and embedding share one weight
        mlp: str = "swiglu",  # or "relu2"
        # Normalize queries and keys (https://arxiv.org/abs/2010.04245): allows high learning rates.
        qk_norm: bool = False,
        zero_init_residual: bool = False,  # blocks add zero at first, and an untied head is small
        token_smear: int = 0,  # previous tokens whose embeddings are added to each one
        checkpoint_activations: bool = False,  # less memory, a third more time, the same gradients
        init_from: str | None = None,  # folder with a Llama of transformers of the same sizes
    ) -> None:
        super().__init__()
        self.sizes: dict[str, Any] = {
            "vocab_size": vocab_size, "d_model": d_model, "n_heads": n_heads,
            "n_kv_heads": n_kv_heads, "n_layers": n_layers, "d_ff": d_ff,
            "rope_theta": rope_theta, "norm_eps": norm_eps, "tied": tied,
            "mlp": mlp, "qk_norm": qk_norm, "token_smear": token_smear,
        }  # fmt: skip
        self.checkpoint_activations = checkpoint_activations
        self.token_embedding = nn.Embedding(vocab_size, d_model)
        self.token_smear = TokenSmear(d_model, token_smear) if token_smear else None
        self.blocks = nn.ModuleList(Block(self.sizes, layer) for layer in range(n_layers))
        self.final_norm = RMSNorm(d_model, norm_eps)
        self.lm_head = nn.Linear(d_model, vocab_size, bias=False)
        if tied:
            self.lm_head.weight = self.token_embedding.weight
        self._initialize(self.lm_head, zero_init_residual)
        if init_from is not None:
            self.load_state_dict(hf_conversion.read_weights(init_from, self.sizes))

    def _initialize(self, head: nn.Linear, zero_init_residual: bool) -> None:
        for name, parameter in self.blocks.named_parameters():
            is_residual = name.endswith(RESIDUAL_PROJECTIONS)
            if is_residual and zero_init_residual:
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                # As GPT-2: the sum of two contributions per block keeps its size at any depth.
                scale = (2 * len(self.blocks)) ** -0.5 if is_residual else 1.0
                nn.init.normal_(parameter, std=scale * parameter.shape[1] ** -0.5)
        width = head.in_features
        if zero_init_residual and not self.sizes["tied"]:  # high learning rates need it
            nn.init.normal_(self.token_embedding.weight)
            nn.init.normal_(head.weight, std=LOGIT_STD * width**-0.5)
            return
        nn.init.normal_(self.token_embedding.weight, std=EMBEDDING_STD)
        nn.init.normal_(head.weight, std=EMBEDDING_STD)
        # Such a head (a tied one must be such) gives large logits: the final norm scales them down.
        nn.init.constant_(self.final_norm.weight, LOGIT_STD / (EMBEDDING_STD * width**0.5))

    def hidden_states(self, input_ids, position_ids, attention_mask=None, cache=None) -> Tensor:
        is_eager = self.blocks[0]._compiled_call_impl is None
        if is_eager and cache is None and attention_mask and _by_document(attention_mask):
            real = attention_mask.document_ids >= 0  # (B, T)
            inputs = input_ids[real][None], position_ids[real][None]  # (1, N): no slot is PAD
            found = self._blocks(*inputs, attention_mask.document_lengths, None)
            states = found.new_zeros(*real.shape, found.shape[2])
            states[real] = found[0]
            return states
        visible = self._visible(input_ids, attention_mask, 0 if cache is None else len(cache))
        return self._blocks(input_ids, position_ids, visible, cache)

    def _blocks(
        self, input_ids: Tensor, position_ids: Tensor, visible: Visible, cache: KVCache | None
    ) -> Tensor:
        """Ids and positions (B, T) -> hidden states (B, T, C)."""
        x = self.token_embedding(input_ids)  # (B, T, C)
        if self.token_smear is not None:
            x = self.token_smear(x, position_ids, cache)
        context = self._rotary(position_ids), visible, cache
        for block in self.blocks:
            if self.checkpoint_activations and cache is None and torch.is_grad_enabled():
                x = checkpoint(block, x, *context, use_reentrant=False)
            else:
                x = block(x, *context)
        return self.final_norm(x)

    def _visible(self, input_ids: Tensor, attention_mask: Mask, cached: int) -> Tensor | None:
        """bool (B or 1, 1, T, S), one for all heads; boundaries where a kernel takes them; None
        where ``is_causal`` says the same."""
        length, d_head = input_ids.shape[1], self.sizes["d_model"] // self.sizes["n_heads"]
        if attention_mask is not None and not attention_mask.plain_causal:
            is_rule = attention_mask.dense is None and not cached
            if is_rule and _has_varlen_kernel(self.lm_head.weight, d_head):
                return attention_mask.boundaries
            return attention_mask.to_dense()[:, None, -length:]
        if not cached:
            return None
        # is_causal is aligned to the upper left: the first new query could attend to key 0 only
        return input_ids.new_ones(1, 1, length, cached + length, dtype=torch.bool).tril(cached)

    def _rotary(self, position_ids: Tensor) -> Rotary:
        """Of the positions (B, T): (B, T, 1, D/2) each."""
        pairs = self.sizes["d_model"] // self.sizes["n_heads"] // 2
        # Float32 whatever the precision: bfloat16 cannot tell position 257 from 256.
        exponents = torch.arange(pairs, dtype=torch.float32, device=position_ids.device) / pairs
        angles = position_ids[:, :, None, None] * self.sizes["rope_theta"] ** -exponents
        return angles.cos(), angles.sin()

    def make_cache(self) -> KVCache:
        return KVCache()

    def standalone_config(self) -> dict[str, Any]:
        return {"init_from": None}
