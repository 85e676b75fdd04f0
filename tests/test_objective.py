import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from causal_lm import objective
from causal_lm.objective import IGNORE


def test_worked_example_seven_tokens_count():
    # Targets [[1,5,4,2,PAD],[3,8,7,PAD,PAD]]: rows of 5 and 4 tokens, the first of each given.
    pad = 0
    ids = torch.tensor([[9, 1, 5, 4, 2, pad], [9, 3, 8, 7, pad, pad]])
    documents = torch.tensor([[0, 0, 0, 0, 0, -1], [0, 0, 0, 0, -1, -1]])
    labels = objective.make_labels(objective.next_tokens(ids), objective.has_next(documents))
    assert labels[:, :5].tolist() == [[1, 5, 4, 2, IGNORE], [3, 8, 7, IGNORE, IGNORE]]
    assert int((labels != IGNORE).sum()) == 7

    logits = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0))
    by_hand = [
        -math.log(float(logits[r, t].softmax(-1)[y]))
        for r, t, y in [
            (0, 0, 1), (0, 1, 5), (0, 2, 4), (0, 3, 2), (1, 0, 3), (1, 1, 8), (1, 2, 7)
        ]
    ]  # fmt: skip
    loss = objective.mean_nll(logits, labels)
    assert float(loss) == pytest.approx(sum(by_hand) / 7, rel=1e-6)

    moved = logits.clone()
    moved[labels == IGNORE] += 100 * torch.randn(int((labels == IGNORE).sum()), 10)
    assert not torch.equal(moved, logits)
    assert torch.equal(objective.mean_nll(moved, labels), loss)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 3))
def test_labels_by_loop(lengths, left, right):
    """Against the definition, written as a loop, with PAD on both sides and packed documents."""
    documents = [-1] * left + [d for d, n in enumerate(lengths) for _ in range(n)] + [-1] * right
    ids = torch.arange(1, len(documents) + 1)
    labels = objective.make_labels(
        objective.next_tokens(ids[None]), objective.has_next(torch.tensor([documents]))
    )[0].tolist()
    for t, label in enumerate(labels):
        follows = t + 1 < len(documents) and documents[t] == documents[t + 1] >= 0
        assert label == (ids[t + 1] if follows else IGNORE)
    assert sum(label != IGNORE for label in labels) == sum(lengths) - len(lengths)


def test_pad_may_be_eos():
    """Token values play no part: EOS = PAD = 0 is still the last counted target."""
    ids = torch.tensor([[5, 6, 0, 0, 0]])
    documents = torch.tensor([[0, 0, 0, -1, -1]])
    labels = objective.make_labels(objective.next_tokens(ids), objective.has_next(documents))
    assert labels.tolist() == [[6, 0, IGNORE, IGNORE, IGNORE]]


def test_nothing_counted_is_zero_not_nan():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    loss = objective.mean_nll(logits, torch.full((1, 3), IGNORE))
    loss.backward()
    assert float(loss) == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))


def test_low_precision_logits_are_read_in_float32():
    logits = (10 * torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(1))).bfloat16()
    labels = torch.randint(0, 50, (2, 4))
    nll = objective.token_nll(logits, labels)
    assert nll.dtype == torch.float32
    exact = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="none")
    torch.testing.assert_close(nll.flatten().double(), exact, rtol=1e-6, atol=1e-6)
