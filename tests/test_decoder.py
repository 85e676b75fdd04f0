"""What is Llama's own: its start, its memory, its cache with rows of different lengths."""

import itertools
import math

import pytest
import torch

from causal_lm import config, generation
from causal_lm.build import instantiate
from causal_lm.data.tokenizers import BOS
from causal_lm.masks import AttentionMask
from causal_lm.models import decoder
from causal_lm.models.decoder import Decoder
from causal_lm.module import CausalLM
from support import V, explicit_mask
from support.models import SIZES, make, packed, padded

PRESETS = ["llama", "llama_1m", "llama_10m", "llama_124m"]


@pytest.mark.parametrize(
    ("preset", "tied"),
    [
        *itertools.product(["llama", "llama_1m"], [True, False]),
        ("llama_fast", False),  # a tied head would begin by naming the token it was given
    ],
)
@pytest.mark.parametrize("vocab_size", [43, 259, 5000])
def test_the_first_loss_is_that_of_a_uniform_guess(preset, vocab_size, tied):
    cfg = config.load([f"model={preset}", f"model.tied={tied}"])
    torch.manual_seed(0)
    module = CausalLM(instantiate(cfg.model, vocab_size=vocab_size))
    loss = float(module.accumulated_loss(padded()).detach())
    assert loss == pytest.approx(math.log(vocab_size), rel=0.02)
    assert loss != pytest.approx(math.log(vocab_size), rel=1e-6)  # and not by being deaf


@pytest.mark.parametrize(
    ("preset", "vocab_size", "millions"),
    [
        ("llama", 259, 0.105),
        ("llama_1m", 259, 0.96),
        ("llama_fast", 259, 0.272),
        ("llama_10m", 259, 9.5),
        ("llama_124m", 50257, 121),
    ],
)
def test_sizes(preset, vocab_size, millions):
    with torch.device("meta"):
        model = instantiate(config.load([f"model={preset}"]).model, vocab_size=vocab_size)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(millions * 1e6, rel=0.02)


def test_llama_is_no_larger_than_tiny():
    count = {
        name: sum(
            p.numel()
            for p in instantiate(
                config.load(["data=docstrings", f"model={name}"]).model, vocab_size=259
            ).parameters()
        )
        for name in ("tiny", "llama")
    }
    assert count["llama"] <= count["tiny"]


@pytest.mark.parametrize("layout", [padded, packed])
def test_checkpointed_activations_change_no_gradient(layout):
    gradients = []
    for on in (False, True):
        model = make("llama")
        model.checkpoint_activations = on
        calls = count_calls(model.blocks[0])
        CausalLM(model).accumulated_loss(layout()).backward()
        assert len(calls) == (2 if on else 1)  # once more, in the backward pass
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(checkpointed, plain, rtol=1e-6, atol=1e-6)


def count_calls(block: torch.nn.Module) -> list[int]:
    calls: list[int] = []
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_the_cache_with_rows_of_different_lengths():
    """Prompts of 5 and 3 padded on the left: each row has its own positions and its own mask."""
    model, pad, total = make("llama"), torch.tensor([0, 2]), 8
    ids = torch.randint(3, V, (2, total), generator=torch.Generator().manual_seed(2))
    slots = torch.arange(total)
    real = slots >= pad[:, None]  # (2, 8)
    positions = (slots - pad[:, None]).clamp(min=0)
    cache, parts = model.make_cache(), []
    for start, end in ((0, 5), (5, 6), (6, 8)):
        seen = AttentionMask.from_document_ids(real[:, :end].long() - 1)
        parts.append(model(ids[:, start:end], positions[:, start:end], seen, cache))
    cached = torch.cat(parts, dim=1)
    for row, begin in enumerate(pad.tolist()):
        alone = model(ids[row : row + 1, begin:], slots[None, : total - begin])
        torch.testing.assert_close(cached[row : row + 1, begin:], alone, rtol=1e-5, atol=1e-5)


def test_only_distances_count():
    model, batch = make("llama"), padded()
    mask = explicit_mask(batch)
    here = model(batch.input_ids, batch.position_ids, mask)
    there = model(batch.input_ids, batch.position_ids + 100, mask)
    torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)
    stretched = model(batch.input_ids, 2 * batch.position_ids, mask)
    assert (stretched - here).abs().max() > 0.01


def test_generation_computes_each_token_once_and_draws_the_same():
    module = CausalLM(make("llama"))
    seen = []
    module.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    start = torch.full((3, 2), BOS)

    def draw(of):
        return generation.sample(of, start, 9, generator=torch.Generator().manual_seed(3))

    cached = draw(module)
    assert seen == [2, 1, 1, 1, 1, 1, 1]
    seen.clear()
    plain = draw(lambda batch: module(batch))
    assert seen == [2, 3, 4, 5, 6, 7, 8]
    assert torch.equal(cached, plain)


def test_bfloat16_and_compiled():
    """Real cos and sin: nothing that autocast or torch.compile stumbles over."""
    model, batch = make("llama"), packed()
    args = batch.input_ids, batch.position_ids, batch.attention_mask
    with torch.autocast("cpu", torch.bfloat16):
        half = model(*args)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), model(*args), rtol=0.05, atol=0.1)
    traced = torch.compile(model, backend="eager", fullgraph=True)  # raises at a graph break
    torch.testing.assert_close(traced(*args), model(*args))


def test_positions_are_exact_under_a_half_precision_default():
    model, positions = make("llama"), torch.tensor([[256, 257]])
    expected = model._rotary(positions)
    torch.set_default_dtype(torch.bfloat16)  # as Lightning does for bf16-true
    try:
        found = model._rotary(positions)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_blocks_that_begin_at_nothing_leave_the_stream_as_it_is():
    for zero in (False, True):
        model = Decoder(V, **SIZES, zero_init_residual=zero)
        batch = padded()
        x = model.token_embedding(batch.input_ids)
        out = model.hidden_states(batch.input_ids, batch.position_ids)
        assert torch.equal(out, model.final_norm(x)) == zero


def test_normed_queries_and_keys_bound_every_score():
    """However loud the weights: no score is above sqrt(D), and none is without the norm."""
    largest = {}
    for on in (False, True):
        attention = Decoder(V, **SIZES, qk_norm=on).blocks[0].attention
        attention.qkv.weight.data.normal_(std=10.0)
        scores = []

        def spy(q, k, v, scores=scores, **_):
            scores.append(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5)
            return v

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder, "attend", spy)
            rotary = Decoder(V, **SIZES)._rotary(torch.arange(6)[None])
            attention(torch.randn(1, 6, 16), rotary, torch.ones(1, 1, 6, 6, dtype=torch.bool), None)
        largest[on] = float(scores[0].abs().max())
    assert largest[True] <= 4**0.5 + 1e-5 < largest[False]


def test_what_is_mixed_in_is_of_the_same_document():
    mix = decoder.TokenSmear(1, 2)
    mix.weight.data = torch.tensor([[[10.0]], [[100.0]]])
    x = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])[None, :, None]
    positions = torch.tensor([[0, 1, 2, 0, 1]])  # two documents
    expected = [1.0, 2 + 10 * 1.0, 3 + 10 * 2 + 100 * 1.0, 4.0, 5 + 10 * 4.0]
    assert mix(x, positions, None).flatten().tolist() == expected


def test_the_squared_relu_by_hand():
    mlp = decoder.ReLU2(1, 2)
    mlp.up.weight.data = torch.tensor([[2.0], [-1.0]])
    mlp.down.weight.data = torch.tensor([[1.0, 10.0]])
    assert mlp(torch.tensor([[3.0], [-3.0]])).tolist() == [[36.0], [90.0]]


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(
        config.ConfigError, match=r"model\.n_heads=4 must be .* model\.n_kv_heads=3"
    ):
        config.load(["model=llama", "model.n_heads=4", "model.n_kv_heads=3"])
    with pytest.raises(config.ConfigError, match=r"odd width"):
        config.load(["model=llama", "model.d_model=6"])
    assert Decoder(V, 8, 2, 1, 1, 8)
