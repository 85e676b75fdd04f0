"""Documents attended one by one, without PAD, and the fused norm: the same as plain PyTorch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from causal_lm.data.collate import Collate
from causal_lm.data.documents import Document
from causal_lm.models import decoder
from causal_lm.models.decoder import Decoder
from causal_lm.models.rms_norm import RMSNorm, _RMSNorm
from causal_lm.module import CausalLM

LAYOUTS = {"padded": {}, "left": {"padding_side": "left"}, "packed": {"row_length": 128}}


def documents(lengths: list[int]) -> list[Document]:
    return [Document(torch.randint(3, 50, (n,)), None) for n in lengths]


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_documents_alone_and_the_mask_give_the_same_gradients(options, monkeypatch):
    torch.manual_seed(0)
    model = Decoder(50, 32, 4, 2, 2, 48, tied=True, token_smear=2, qk_norm=True)
    module, batch = CausalLM(model), Collate(0, 50, **options)(documents([100, 7, 60, 28, 31]))
    assert (batch.document_ids < 0).any()
    attend, found = decoder.attend, []

    def counting(q, k, v, **more):
        calls.append(q.shape[2])
        return attend(q, k, v, **more)

    monkeypatch.setattr(decoder, "attend", counting)
    for mean in (decoder.MEAN_DOCUMENT, 10**9):
        monkeypatch.setattr(decoder, "MEAN_DOCUMENT", mean)
        calls: list[int] = []
        module.zero_grad()
        loss = module.accumulated_loss(batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in module.parameters())])
        assert calls == 2 * (
            list(batch.attention_mask.document_lengths) if mean < 50 else [batch.input_ids.shape[1]]
        )
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_pad_is_not_computed():
    """The states of PAD are zeros, and its embedding has no gradient."""
    torch.manual_seed(0)
    model = Decoder(50, 32, 4, 2, 2, 48)
    batch = Collate(0, 50)(documents([100, 40]))
    states = model.hidden_states(batch.input_ids, batch.position_ids, batch.attention_mask)
    assert torch.equal(states.abs().sum(2) == 0, batch.document_ids < 0)
    states.sum().backward()
    grad = model.token_embedding.weight.grad
    assert not grad[0].any() and grad[int(batch.input_ids[0, 0])].any()


@settings(max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 9))
def test_the_norm_is_that_of_torch(shape, width):
    torch.manual_seed(0)
    own, torchs = RMSNorm(width, 1e-5), nn.RMSNorm(width, 1e-5)
    nn.init.normal_(own.weight)
    torchs.load_state_dict(own.state_dict())
    x = torch.randn(*shape, width)
    torch.testing.assert_close(own(x), torchs(x))


def test_the_gradient_of_the_norm_by_differences():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-5), (x, weight))
