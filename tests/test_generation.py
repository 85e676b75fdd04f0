import pytest
import torch

from causal_lm import generation
from causal_lm.data.sources.synthetic import MarkovLanguage
from causal_lm.data.tokenizers import BOS, EOS, PAD, SymbolTokenizer
from causal_lm.report.samples import format_samples, sample_statistics
from support import V, make_module


def scripted(batch):
    """A model of the rule: the next token is (last + 1) % V."""
    return torch.nn.functional.one_hot((batch.input_ids + 1) % V, V).float() * 100


def test_follows_the_model_and_keeps_the_prompt():
    out = generation.sample(scripted, torch.tensor([[1, 2], [7, 5]]), 6)
    assert out.tolist() == [[1, 2, 3, 4, 5, 6], [7, 5, 6, 7, 8, 9]]


def test_seed_temperature_and_top_k():
    module = make_module().eval()
    start = torch.full((8, 1), BOS)

    def draw(seed=0, **options):
        generator = torch.Generator().manual_seed(seed)
        return generation.sample(module, start, 12, generator=generator, **options)

    assert torch.equal(draw(), draw())
    assert not torch.equal(draw(), draw(seed=1))
    greedy = draw(temperature=0)
    assert torch.equal(greedy, draw(seed=1, temperature=0))
    assert torch.equal(greedy, draw(top_k=1))
    assert torch.equal(greedy[0], greedy[1])


def test_top_k_keeps_k():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    kept = generation.filter_top_k(logits, 2)
    assert kept.isfinite().tolist() == [[False, True, False, True]]


def test_a_wrong_temperature_or_length_is_named():
    start = torch.full((1, 3), BOS)
    with pytest.raises(ValueError, match="temperature"):
        generation.sample(scripted, start, 5, temperature=-1)
    with pytest.raises(ValueError, match="3 tokens"):
        generation.sample(scripted, start, 2)


def test_statistics_by_hand():
    language = MarkovLanguage(symbols=4, successors=1, mean=4.0, max_symbols=9, seed=0)
    a = 3
    b = int(language.transitions[a].argmax())
    rows = torch.tensor([
        [BOS, a, b, EOS, a, a],  # legal: BOS a, a b, b EOS; later ones do not count
        [BOS, a, a, PAD, PAD, EOS],  # legal: BOS a; not a a, a PAD, PAD PAD, PAD EOS
    ])  # fmt: skip
    figures = sample_statistics(rows, SymbolTokenizer(4), language)
    assert figures.legal_rate == pytest.approx((3 + 1 + 0) / (3 + 5))
    assert figures.pad_eos_share == pytest.approx((1 + 3) / 10)
    assert figures.repeat_share == pytest.approx((1 + 2) / 10)
    text = format_samples(rows, SymbolTokenizer(4), figures)
    assert "after <eos>: a a …" in text
