import itertools
import math

import pytest
import torch

from causal_lm.data.documents import Documents
from causal_lm.data.sources.synthetic import MarkovLanguage, SyntheticLanguage
from causal_lm.data.tokenizers import BOS, EOS


def language(**changes):
    return MarkovLanguage(
        **({"symbols": 6, "successors": 2, "mean": 4.0, "max_symbols": 9, "seed": 3} | changes)
    )


def test_floor_by_hand():
    transitions = language().transitions
    a = 3
    b = int(transitions[a].argmax())
    document = Documents.from_lists([[BOS, a, b, EOS]])
    by_hand = -math.log(1 / 6) - math.log(0.75 * float(transitions[a, b])) - math.log(0.25)
    nats, targets = language().nll(document)
    assert targets == 3
    assert nats == pytest.approx(by_hand, rel=1e-12)


def test_the_longest_document_ends_for_certain():
    made = language(mean=1000.0)
    documents = made.sample(200, torch.Generator().manual_seed(0))
    assert int(documents.lengths.max()) == 11
    longest = [documents[i].tokens.tolist() for i in range(200) if len(documents[i].tokens) == 11]
    body = longest[0][:-1]
    transitions = made.transitions
    nats = -math.log(1 / 6) - sum(
        math.log(0.999 * float(transitions[p, q])) for p, q in itertools.pairwise(body[1:])
    )
    assert made.nll(Documents.from_lists(longest[:1]))[0] == pytest.approx(nats, rel=1e-12)


def test_samples_follow_the_stated_probabilities():
    """Frequencies of transitions and of endings, against the true ones, within 5 sigma."""
    made = language(max_symbols=60)
    documents = made.sample(20_000, torch.Generator().manual_seed(1))
    flat = documents.tokens.long()
    inside = torch.ones(len(flat), dtype=torch.bool)
    inside[documents.offsets[:-1]] = False
    previous, following = flat[:-1][inside[1:]], flat[1:][inside[1:]]
    after_symbol = previous != BOS
    ends = (following[after_symbol] == EOS).double().mean()
    n = int(after_symbol.sum())
    assert abs(float(ends) - 0.25) < 5 * math.sqrt(0.25 * 0.75 / n)
    for symbol in range(3, 9):
        nexts = following[(previous == symbol) & (following != EOS)]
        seen = torch.bincount(nexts, minlength=9).double() / len(nexts)
        error = float((seen - made.transitions[symbol]).abs().max())
        assert error < 5 * 0.5 / math.sqrt(len(nexts))


def test_legal_is_what_the_language_can_say():
    made = language()
    documents = made.sample(50, torch.Generator().manual_seed(2))
    for i in range(50):
        d = documents[i].tokens.long()
        assert bool(made.legal(d[:-1], d[1:]).all())
    a = torch.tensor([3, BOS, EOS, 3, 3])
    b = torch.tensor([3, EOS, 4, BOS, 0])  # itself, empty, after the end, BOS, PAD
    assert not made.legal(a, b).any()


def test_the_same_seed_gives_the_same_corpus_and_splits_differ():
    def load():
        return SyntheticLanguage(
            symbols=6, successors=2, mean=4.0, max_length=11,
            train_documents=50, val_documents=50, seed=0,
        ).load()  # fmt: skip

    one, two = load(), load()
    assert torch.equal(one.train.tokens, two.train.tokens)
    assert not torch.equal(one.train.tokens[:100], one.val.tokens[:100])
