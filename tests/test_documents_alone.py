"""Documents attended one by one, without PAD, and the fused norm: the same as plain PyTorch."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
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


def varlen_by_loop(q, k, v, boundaries, same, longest, longest_too, *, window_size):
    """What the kernel of a GPU computes, (N, H, D): causal attention between the boundaries."""
    assert boundaries is same and longest == longest_too >= int(boundaries.diff().max())
    assert window_size == (-1, 0) and boundaries[-1] == len(q)
    parts = zip(*(x.split(boundaries.diff().tolist()) for x in (q, k, v)), strict=True)
    heads_first = ([x.transpose(0, 1) for x in part] for part in parts)
    rows = [F.scaled_dot_product_attention(*part, is_causal=True) for part in heads_first]
    return torch.cat(rows, dim=1).transpose(0, 1)


@pytest.mark.parametrize("options", LAYOUTS.values(), ids=LAYOUTS)
def test_the_kernel_by_boundaries_and_the_mask_give_the_same_gradients(options, monkeypatch):
    torch.manual_seed(0)
    model = Decoder(50, 32, 4, 2, 2, 48, tied=True, token_smear=2, qk_norm=True)
    module, batch = CausalLM(model), Collate(0, 50, **options)(documents([20, 7, 9, 8, 30, 100]))
    calls, found = [], []
    monkeypatch.setattr(decoder, "MEAN_DOCUMENT", 10**9)  # else a CPU splits the documents
    monkeypatch.setattr(
        decoder, "varlen_attn", lambda *a, **b: calls.append(1) or varlen_by_loop(*a, **b)
    )
    for has_kernel in (False, True):
        monkeypatch.setattr(decoder, "_has_varlen_kernel", lambda *_, has=has_kernel: has)
        module.zero_grad()
        loss = module.accumulated_loss(batch)
        loss.backward()
        found.append([loss.detach(), *(p.grad.clone() for p in module.parameters())])
    assert len(calls) == (0 if batch.attention_mask.plain_causal else 2)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.fixture
def on_meta(monkeypatch):
    """A decoder in bfloat16 and batches on the meta device, where the kernel of a GPU is checked
    for its arguments, forward and backward, without computing."""
    monkeypatch.setattr(decoder, "_has_varlen_kernel", lambda *_: True)
    with torch.device("meta"):
        model = Decoder(50, 32, 4, 2, 2, 48, tied=True, qk_norm=True).bfloat16()

    def run(forward, lengths):
        batch = Collate(0, 50, row_length=32)(documents(lengths)).to("meta")
        return forward(batch.input_ids, batch.position_ids, batch.attention_mask)

    return model, run


def test_the_kernel_of_a_gpu_takes_what_it_is_given(on_meta, monkeypatch):
    model, run = on_meta
    monkeypatch.setattr(decoder, "attend", None)  # no other kernel is called
    logits = run(model, [20, 7, 9, 8, 30])
    assert logits.shape == (3, 30, 50) and logits.dtype == torch.bfloat16
    logits.float().sum().backward()
    assert model.blocks[0].attention.qkv.weight.grad.shape == (64, 32)


@pytest.mark.slow
def test_other_numbers_of_documents_are_compiled_once_more_at_most(on_meta):
    from torch._dynamo.testing import CompileCounter  # slow to load

    (model, run), counter = on_meta, CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for lengths in ([32, 20, 12], [16, 16, 30, 2], [8] * 8, [25, 7, 20, 10, 2]):
        assert run(compiled, lengths).shape == (2, 32, 50)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    ("device", "dtype", "autocast", "d_head", "capability", "expected"),
    [
        ("cuda", torch.bfloat16, False, 64, 9, True),
        ("cuda", torch.float16, False, 64, 8, True),
        ("cuda", torch.float32, True, 64, 8, True),
        ("cuda", torch.float32, False, 64, 9, False),
        ("cuda", torch.bfloat16, False, 64, 7, False),
        ("cuda", torch.bfloat16, False, 60, 9, False),
        ("cuda", torch.bfloat16, False, 512, 9, False),
        ("cpu", torch.bfloat16, False, 64, 9, False),
    ],
)  # fmt: skip
def test_when_the_kernel_can_run(
    device, dtype, autocast, d_head, capability, expected, monkeypatch
):
    found = SimpleNamespace(major=capability)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: found)
    weight = SimpleNamespace(is_cuda=device == "cuda", device=device, dtype=dtype)
    before = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", autocast)
    try:
        assert decoder._has_varlen_kernel(weight, d_head) is expected
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", before)


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
