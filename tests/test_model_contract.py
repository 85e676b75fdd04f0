"""Our own models through the contract that a fork's models go through, and proofs that it bites."""

import itertools

import pytest
from examples.bring_your_own_model import TestConvLM  # noqa: F401  # the contract on it

from causal_lm.models.decoder import Decoder
from causal_lm.models.gru import GRU
from causal_lm.models.tiny import Tiny
from causal_lm.testing import ModelContract
from support import make_model
from support.models import FAST, SIZES


class TestTiny(ModelContract):
    def make_model(self):
        return Tiny(self.vocab_size, d_model=32, n_heads=2, n_layers=2, d_ff=64, max_positions=16)


class TestDecoder(ModelContract):
    def make_model(self):
        return Decoder(self.vocab_size, **SIZES)


class TestTiedDecoder(ModelContract):
    def make_model(self):
        return Decoder(self.vocab_size, **SIZES, tied=True)


class TestFastDecoder(ModelContract):
    def make_model(self):
        return Decoder(self.vocab_size, **SIZES, **FAST)


class TestGRU(ModelContract):
    def make_model(self):
        return GRU(self.vocab_size, 32, n_layers=2)


@pytest.mark.extras
class TestGPT2(ModelContract):
    def make_model(self):
        from support.models import GPT2, huggingface

        return huggingface(self.vocab_size, GPT2)


@pytest.mark.extras
class TestXTransformers(ModelContract):
    def make_model(self):
        from causal_lm.models.external import XTransformers

        return XTransformers(self.vocab_size, 16, 2, 2, 24)


# ---- a broken model fails the test that is about its fault ----


class Broken(ModelContract):
    vocab_size = 11

    def __init__(self, spoil):
        self.spoil = spoil

    def make_model(self):
        model = make_model()
        self.spoil(model)
        return model


def ignore_mask(model):
    hidden_states = model.hidden_states
    model.hidden_states = lambda ids, positions, mask=None, cache=None: hidden_states(
        ids, positions
    )


def scale_logits(model):
    model.forward = lambda *args: 2 * model.lm_head(model.hidden_states(*args))


def look_ahead(model):
    hidden_states = model.hidden_states

    def leaky(*args):
        x = hidden_states(*args)
        return x + x.roll(-1, dims=1)

    model.hidden_states = leaky


def forget(model, built=itertools.count(1)):  # noqa: B008  # counts the models that were built
    hidden_states, state = model.hidden_states, next(built)  # which is in no state dict
    model.hidden_states = lambda *args: state * hidden_states(*args)


@pytest.mark.parametrize(
    ("spoil", "test"),
    [
        (ignore_mask, "test_packed_rows_give_the_logits_of_padded_rows"),
        (scale_logits, "test_the_chunked_loss_is_the_whole_loss"),
        (look_ahead, "test_preflight_finds_no_fault"),
        (forget, "test_a_checkpoint_round_trip_keeps_the_logits"),
    ],
)
def test_the_contract_catches(spoil, test):
    with pytest.raises(AssertionError):
        getattr(Broken(spoil), test)()


def test_the_contract_catches_a_model_that_does_not_learn():
    def freeze(model):
        for parameter in model.blocks.parameters():
            parameter.requires_grad_(False)
        model.token_embedding.requires_grad_(False)

    contract = Broken(freeze)
    contract.overfit_steps = 50
    with pytest.raises(AssertionError):
        contract.test_overfits_ten_documents()


class ForgetsCache(Decoder):
    """Takes no notice of how many positions the cache holds."""

    def hidden_states(self, input_ids, position_ids, attention_mask=None, cache=None):
        positions = position_ids if cache is None else position_ids - position_ids[:, :1]
        return super().hidden_states(input_ids, positions, attention_mask, cache)


def test_the_contract_catches_a_cache_whose_positions_restart():
    contract = ModelContract()
    contract.make_model = lambda: ForgetsCache(contract.vocab_size, **SIZES)
    with pytest.raises(AssertionError, match="decoding"):
        contract.test_preflight_finds_no_fault()
