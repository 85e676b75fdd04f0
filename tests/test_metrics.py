import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchmetrics.text import Perplexity

from causal_lm.metrics import TokenPerplexity
from causal_lm.objective import IGNORE, token_nll


def random_batches(seed, sizes, vocab=7):
    generator = torch.Generator().manual_seed(seed)
    for rows, length in sizes:
        logits = torch.randn(rows, length, vocab, generator=generator)
        labels = torch.randint(0, vocab, (rows, length), generator=generator)
        labels[torch.rand(rows, length, generator=generator) < 0.4] = IGNORE
        yield logits, labels


def test_agrees_with_torchmetrics_where_that_is_right():
    ours, theirs = TokenPerplexity(), Perplexity(ignore_index=IGNORE)
    for logits, labels in random_batches(0, [(3, 5), (1, 9), (4, 2)]):
        ours.update(token_nll(logits, labels), labels)
        theirs.update(logits, labels)
    assert float(ours.compute()["ppl"]) == pytest.approx(float(theirs.compute()), rel=1e-5)


def test_survives_what_the_stock_metric_does_not():
    logits = torch.tensor([[[0.0, 200.0]]])
    labels = torch.tensor([[0]])
    stock = Perplexity()
    stock.update(logits, labels)
    assert math.isinf(float(stock.compute()))
    ours = TokenPerplexity()
    ours.update(token_nll(logits, labels), labels)
    assert float(ours.compute()["loss"]) == pytest.approx(200)


@given(st.integers(0, 99), st.integers(1, 5))
def test_does_not_depend_on_how_rows_are_batched(seed, rows):
    """One metric over all, and any split, agree; a mean of means would not."""
    ((logits, labels),) = random_batches(seed, [(6, 4)])
    whole, split = TokenPerplexity(), TokenPerplexity()
    nll = token_nll(logits, labels)
    if not (labels != IGNORE).any():
        return
    whole.update(nll, labels)
    for part in range(0, 6, rows):
        split.update(nll[part : part + rows], labels[part : part + rows])
    assert float(split.compute()["loss"]) == pytest.approx(
        float(whole.compute()["loss"]), rel=1e-12
    )


def test_states_keep_their_dtype_in_a_low_precision_module():
    module = torch.nn.Module()
    module.metric = TokenPerplexity()
    module.to(torch.bfloat16)
    for _ in range(1001):
        module.metric.update(torch.ones(1, 100), torch.ones(1, 100, dtype=torch.int64))
    assert module.metric.nats.dtype == torch.float64
    assert int(module.metric.tokens) == 100_100
    module.metric.reset()
    assert module.metric.nats.dtype == torch.float64


def test_bits_per_byte_by_hand():
    """Two tokens of 1 and 3 bytes and EOS of none, ln 2 nats each: 3 bits over 4 bytes."""
    metric = TokenPerplexity(torch.tensor([0, 1, 3]))
    metric.update(torch.full((1, 4), math.log(2)), torch.tensor([[1, 2, 0, IGNORE]]))
    # The ignored slot's nats are 0 in use; here they show that bytes ignore it.
    assert float(metric.bytes) == 4
    assert float(metric.compute()["bpb"]) == pytest.approx(1.0)
