"""What every model must do, on padded and on packed rows, with and without a mask."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from causal_lm.module import CausalLM
from causal_preflight.lightning import audit_batch
from support import PAD, V, explicit_mask
from support.models import CACHED, by_document, close, every_model, logits_of, make, packed, padded


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
    other = replace(batch, input_ids=batch.input_ids.where(batch.document_ids >= 0, 7))
    assert not torch.equal(other.input_ids, batch.input_ids)
    expected = by_document(logits_of(model, batch), batch)
    close(by_document(logits_of(model, other), other), expected, name)


@every_model
def test_logits_are_the_head_of_the_hidden_states(name):
    model, batch = make(name), padded()
    assert isinstance(model.lm_head, nn.Linear) and model.lm_head.bias is None
    hidden = model.hidden_states(batch.input_ids, batch.position_ids, explicit_mask(batch))
    torch.testing.assert_close(model.lm_head(hidden), logits_of(model, batch), rtol=0, atol=0)


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
    module = CausalLM(make(name, large_weights=False))
    report = audit_batch(module, layout(), module.accumulated_loss, pad_id=PAD)
    assert report.faults == set(), str(report)
    assert {"alignment", "future", "context"} <= set(report.passed)
    assert ("decoding" in report.passed) == (module.make_cache() is not None), str(report)


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
    loss = CausalLM(model).accumulated_loss(batch)
    loss.backward()
    logits = by_document(logits_of(model, batch), batch).detach().double()
    gradient = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    found = (float(logits.sum()), float(logits.norm()), gradient)
    assert found == pytest.approx(REGRESSION[name], rel=1e-4), found
