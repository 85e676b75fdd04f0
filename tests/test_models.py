"""What every model must do, on padded and on packed rows, with and without a mask."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from causal_lm import masks
from causal_lm.callbacks.preflight import audit_batch
from causal_lm.data.collate import Batch
from causal_lm.models.external import XTransformers, huggingface
from causal_lm.models.gru import GRU
from causal_lm.models.llama import Llama
from causal_lm.module import CausalLM
from conftest import PAD, V, make_batch

LENGTHS = (5, 2, 7, 4)
SIZES: dict[str, Any] = {"d_model": 16, "n_heads": 4, "n_kv_heads": 2, "n_layers": 2, "d_ff": 32}
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 24,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
        "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
LLAMA = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
DECODER = {"rotary_pos_emb": True, "rotary_emb_dim": 8, "ff_glu": True}

FAST = {"mlp": "relu2", "qk_norm": True, "zero_init_out": True, "mix_previous": 2}

MAKE = {
    "llama": lambda: Llama(V, **SIZES),
    "llama_tied": lambda: Llama(V, **SIZES, tied=True),
    "llama_fast": lambda: Llama(V, **SIZES, **FAST),
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


def make(name: str, loud: bool = True) -> nn.Module:
    """The model, its weights large enough that every input is heard in every logit."""
    torch.manual_seed(0)
    model = MAKE[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if loud and parameter.dim() > 1:
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
    may_attend = masks.causal(batch.document_ids) if dense else None
    return model(batch.input_ids, batch.position_ids, may_attend)


def by_document(logits: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The logits of real tokens, documents in the order of the packed batch."""
    if len(logits) == 2:
        return logits[batch.document_ids >= 0]
    return torch.cat([logits[row, : LENGTHS[row]] for row in (0, 2, 1, 3)])


@every_model
def test_packed_rows_and_padded_rows_agree(name):
    model, one, other = make(name), padded(), packed()
    expected = by_document(logits_of(model, one), one)
    close(by_document(logits_of(model, other), other), expected, name)
    # As one document a row. (Restarting positions alone tell transformers of several.)
    slots = torch.arange(14).expand(2, -1)
    mixed = by_document(model(other.input_ids, slots, None), other)
    assert (mixed - expected).abs().max() > 0.01  # the mask had something to do
    close(mixed[:5], expected[:5], name)


@every_model
def test_without_a_mask_rows_are_causal_documents(name):
    model, batch = make(name), padded()
    found = by_document(logits_of(model, batch, dense=False), batch)
    close(found, by_document(logits_of(model, batch), batch), name)


@every_model
@pytest.mark.parametrize("layout", [padded, packed])
def test_what_stands_in_pad_is_never_seen(name, layout):
    model, batch = make(name), layout()
    other = batch._replace(input_ids=batch.input_ids.where(batch.document_ids >= 0, 7))
    assert not torch.equal(other.input_ids, batch.input_ids)
    expected = by_document(logits_of(model, batch), batch)
    close(by_document(logits_of(model, other), other), expected, name)


@every_model
def test_body_and_head_are_the_model(name):
    model, batch = make(name), padded()
    may_attend = masks.causal(batch.document_ids)
    assert isinstance(model.head, nn.Linear) and model.head.bias is None
    body = model.body(batch.input_ids, batch.position_ids, may_attend)
    torch.testing.assert_close(model.head(body), logits_of(model, batch), rtol=0, atol=0)


@pytest.mark.parametrize("name", CACHED)
def test_with_and_without_a_cache(name):
    """A prompt of three, then token by token, then two at once."""
    model = make(name)
    ids = torch.randint(3, V, (3, 9), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(9).expand_as(ids)
    cache, parts = model.make_cache(), []
    for start, end in ((0, 3), (3, 4), (4, 5), (5, 6), (6, 7), (7, 9)):
        parts.append(model(ids[:, start:end], positions[:, start:end], None, cache))
    torch.testing.assert_close(torch.cat(parts, 1), model(ids, positions), rtol=1e-5, atol=1e-5)


@every_model
@pytest.mark.parametrize("layout", [padded, packed])
def test_the_preflight_finds_nothing(name, layout):
    module = CausalLM(make(name, loud=False))
    report = audit_batch(module, layout(), module.window_loss, pad_id=PAD)
    assert report.faults == set(), str(report)
    assert {"alignment", "future", "past"} <= set(report.passed)


REGRESSION = {
    "llama": (-0.0907345, 1.726185, 1.910478),
    "llama_tied": (0.193184, 1.796200, 3.148743),
    "llama_fast": (-3.902260, 10.54954, 2.238882),
    "gru": (-2.563136, 44.65142, 1.583807),
    "gpt2": (-3.88077, 122.7292, 43.53631),
    "gpt2_eager": (-3.88077, 122.7292, 43.53631),
    "hf_llama": (-7.695972, 13.47410, 3.517327),
    "x_transformers": (-2.478251, 22.21993, 8.446872),
    "x_transformers_flash": (-13.33776, 20.41776, 25.02576),
}
"""Sum and norm of the logits, norm of the gradient."""


@every_model
def test_regression(name):
    """Stored when the tests above had passed; any change of the arithmetic shows."""
    model, batch = make(name), packed()
    with torch.no_grad():  # whatever random numbers torch draws, these stay
        for i, parameter in enumerate(p for p in model.parameters() if p.dim() > 1):
            parameter.copy_(
                torch.linspace(1, 40, parameter.numel()).add(i).sin().view_as(parameter)
            )
    loss = CausalLM(model).window_loss(batch)
    loss.backward()
    logits = by_document(logits_of(model, batch), batch).detach().double()
    gradient = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    found = (float(logits.sum()), float(logits.norm()), gradient)
    assert found == pytest.approx(REGRESSION[name], rel=1e-4), found
