"""Every kind of model, small, and the same documents in two layouts."""

from typing import Any

import pytest
import torch
from torch import nn

from causal_lm.data.collate import Batch
from causal_lm.models.decoder import Decoder
from causal_lm.models.external import XTransformers, huggingface
from causal_lm.models.gru import GRU
from support import PAD, V, explicit_mask, make_batch

LENGTHS = (5, 2, 7, 4)
SIZES: dict[str, Any] = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "d_ff": 32}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
DECODER = {"rotary_pos_emb": True, "rotary_emb_dim": 8, "ff_glu": True}

FAST = {"mlp": "relu2", "qk_norm": True, "zero_init_residual": True, "token_smear": 2}

MAKE = {
    "llama": lambda: Decoder(V, **SIZES),
    "llama_tied": lambda: Decoder(V, **SIZES, tied=True),
    "llama_fast": lambda: Decoder(V, **SIZES, **FAST),
    "gru": lambda: GRU(V, 16, n_layers=2),
    "gpt2": lambda: huggingface(V, GPT2),
    "gpt2_eager": lambda: huggingface(V, GPT2 | {"attn_implementation": "eager"}),
    "hf_llama": lambda: huggingface(V, LLAMA),
    "x_transformers": lambda: XTransformers(V, 16, 2, 2, 24, DECODER),
    "x_transformers_flash": lambda: XTransformers(V, 16, 2, 2, 24, {"attn_flash": True}),
}
OURS = ("llama", "llama_tied", "llama_fast", "gru")
NAMES = [name if name in OURS else pytest.param(name, marks=pytest.mark.extras) for name in MAKE]
CACHED = [name for name in NAMES if not str(getattr(name, "values", "")).startswith("('x_")]
every_model = pytest.mark.parametrize("name", NAMES)


def close(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """To 1e-6 for our own models, 1e-5 for others'."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 if name in OURS else 1e-5)


def make(name: str, large_weights: bool = True) -> nn.Module:
    """The model, with weights so large that every input has an effect on every logit."""
    torch.manual_seed(0)
    model = MAKE[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if large_weights and parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


def padded() -> Batch:
    return make_batch(LENGTHS)


def packed() -> Batch:
    """The documents of :func:`padded` in two rows: 5 + 7 and two PAD, 2 + 4 and the rest PAD."""
    source = padded()
    rows = torch.full((2, 14), PAD), torch.arange(14).repeat(2, 1), torch.full((2, 14), -1)
    batch = Batch(*rows)
    for (row, start, document), source_row in zip(PLACES, (0, 2, 1, 3), strict=True):
        n = LENGTHS[source_row]
        where = slice(start, start + n)
        batch.input_ids[row, where] = source.input_ids[source_row, :n]
        batch.position_ids[row, where] = torch.arange(n)
        batch.document_ids[row, where] = document
    return batch


PLACES = ((0, 0, 0), (0, 5, 1), (1, 0, 0), (1, 2, 1))
"""Row, start and number in its row of documents 0, 2, 1, 3 of the padded batch."""


def logits_of(model: nn.Module, batch: Batch, dense: bool = True) -> torch.Tensor:
    """Under the explicit mask of the batch or, if not ``dense``, under plain causal."""
    mask = explicit_mask(batch) if dense else None
    return model(batch.input_ids, batch.position_ids, mask)


def by_document(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The logits of real tokens, documents in the order of the packed batch."""
    if len(logits) == 2:
        return logits[batch.document_ids >= 0]
    return torch.cat([logits[row, : LENGTHS[row]] for row in (0, 2, 1, 3)])


NANOGPT = '''
from types import SimpleNamespace as GPTConfig
from torch import nn
import torch.nn.functional as F


class GPT(nn.Module):
    """As large as nanoGPT's where it matters here: the sizes come from the configuration."""

    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict({
            "wte": nn.Embedding(config.vocab_size, config.n_embd),
            "wpe": nn.Embedding(config.block_size, config.n_embd),
        })
        self.heads, self.layers = config.n_head, config.n_layer

    def forward(self, ids, targets):
        table = self.transformer["wte"]
        logits = F.linear(table(ids), table.weight)
        return logits, F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=-1
        )
'''
"""In the place of nanoGPT's ``model.py``."""
