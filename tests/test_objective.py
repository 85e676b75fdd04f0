import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from causal_lm import objective
from causal_lm.objective import IGNORE, LossConfig


def mean_nll(logits, labels, loss=LossConfig(), document_ids=None):  # noqa: B008
    documents = torch.zeros_like(labels) if document_ids is None else document_ids
    weights, over = objective.token_weights(labels, documents, loss)
    return objective.weighted_nll(logits, labels, weights) / over.clamp(min=1)


def test_worked_example_seven_tokens_count():
    # Targets [[1,5,4,2,PAD],[3,8,7,PAD,PAD]]: rows of 5 and 4 tokens, the first of each given.
    pad = 0
    ids = torch.tensor([[9, 1, 5, 4, 2, pad], [9, 3, 8, 7, pad, pad]])
    documents = torch.tensor([[0, 0, 0, 0, 0, -1], [0, 0, 0, 0, -1, -1]])
    labels = objective.make_labels(ids, documents)
    assert labels[:, :5].tolist() == [[1, 5, 4, 2, IGNORE], [3, 8, 7, IGNORE, IGNORE]]
    assert int((labels != IGNORE).sum()) == 7

    logits = torch.randn(2, 6, 10, generator=torch.Generator().manual_seed(0))
    by_hand = [
        -math.log(float(logits[r, t].softmax(-1)[y]))
        for r, t, y in [
            (0, 0, 1), (0, 1, 5), (0, 2, 4), (0, 3, 2), (1, 0, 3), (1, 1, 8), (1, 2, 7)
        ]
    ]  # fmt: skip
    loss = mean_nll(logits, labels)
    assert float(loss) == pytest.approx(sum(by_hand) / 7, rel=1e-6)

    moved = logits.clone()
    moved[labels == IGNORE] += 100 * torch.randn(int((labels == IGNORE).sum()), 10)
    assert not torch.equal(moved, logits)
    assert torch.equal(mean_nll(moved, labels), loss)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=5), st.integers(0, 3), st.integers(0, 3))
def test_labels_by_loop(lengths, left, right):
    """Against the definition, written as a loop, with PAD on both sides and packed documents."""
    documents = [-1] * left + [d for d, n in enumerate(lengths) for _ in range(n)] + [-1] * right
    ids = torch.arange(1, len(documents) + 1)
    labels = objective.make_labels(ids[None], torch.tensor([documents]))[0].tolist()
    for t, label in enumerate(labels):
        follows = t + 1 < len(documents) and documents[t] == documents[t + 1] >= 0
        assert label == (ids[t + 1] if follows else IGNORE)
    assert sum(label != IGNORE for label in labels) == sum(lengths) - len(lengths)


def test_pad_may_be_eos():
    """Token values play no part: EOS = PAD = 0 is still the last counted target."""
    ids = torch.tensor([[5, 6, 0, 0, 0]])
    documents = torch.tensor([[0, 0, 0, -1, -1]])
    labels = objective.make_labels(ids, documents)
    assert labels.tolist() == [[6, 0, IGNORE, IGNORE, IGNORE]]


def test_nothing_counted_is_zero_not_nan():
    logits = torch.randn(1, 3, 4, requires_grad=True)
    loss = mean_nll(logits, torch.full((1, 3), IGNORE))
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


# ---- reductions ----


@pytest.mark.parametrize(
    ("loss", "shares"),
    [
        (LossConfig("token"), [[1 / 4] * 3, [1 / 4]]),
        (LossConfig("sequence"), [[1 / 6] * 3, [1 / 2]]),
        (LossConfig("padded", 3), [[1 / 6] * 3, [1 / 6]]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_worked_example_of_three_weights_and_one(loss, shares, packed):
    """A row of three targets and a row of one; the same numbers where both share a row."""
    if packed:
        documents = torch.tensor([[0, 0, 0, 1, -1]])
        labels = torch.tensor([[1, 2, 3, 4, IGNORE]])
        expected = torch.tensor([[*shares[0], *shares[1], 0]])
    else:
        documents = torch.tensor([[0, 0, 0], [0, -1, -1]])
        labels = torch.tensor([[1, 2, 3], [4, IGNORE, IGNORE]])
        expected = torch.tensor([shares[0], [*shares[1], 0, 0]])
    weights, over = objective.token_weights(labels, documents, loss)
    torch.testing.assert_close(weights / over, expected)


@given(
    st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=3), min_size=1, max_size=4),
    st.sampled_from(objective.REDUCTIONS),
    st.integers(0, 2**20),
)
def test_weights_by_loop(rows, reduction, seed):
    """Against the definition in words, with some targets masked, on packed rows."""
    width = max(map(sum, rows))
    documents = torch.full((len(rows), width), -1)
    for row, lengths in enumerate(rows):
        ids = [d for d, n in enumerate(lengths) for _ in range(n)]
        documents[row, : len(ids)] = torch.tensor(ids)
    labels = torch.ones_like(documents)
    labels[documents < 0] = IGNORE
    labels[torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed)) < 0.3] = IGNORE
    weights, over = objective.token_weights(labels, documents, LossConfig(reduction, 7))

    groups = {}  # document -> its counted slots
    for row, slot in (labels != IGNORE).nonzero().tolist():
        groups.setdefault((row, int(documents[row, slot])), []).append((row, slot))
    expected, tokens = torch.zeros(labels.shape), sum(map(len, groups.values()))
    for slots in groups.values():
        for at in slots:
            expected[at] = {"token": 1, "sequence": 1 / len(slots), "padded": 1}[reduction]
    assert (
        int(over)
        == {"token": tokens, "sequence": len(groups), "padded": 7 * len(groups)}[reduction]
    )
    torch.testing.assert_close(weights, expected)


def test_a_loss_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"loss\.reduction must be one of token, .*not 'mean'"):
        LossConfig("mean")
    with pytest.raises(ValueError, match=r"padded needs loss\.length"):
        LossConfig("padded")


def test_a_loss_mask_speaks_of_targets():
    """Prompt a b, answer c EOS: b predicts c, and a is not asked for b."""
    documents = torch.tensor([[0, 0, 0, 0, -1]])
    loss_mask = torch.tensor([[False, False, True, True, False]])
    assert objective.has_target(documents, loss_mask).tolist() == [
        [False, True, True, False, False]
    ]


# ---- without the full logits ----


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
@pytest.mark.parametrize("ignored", [0.0, 0.5, 1.0])
def test_chunks_equal_the_whole_in_value_and_gradient(chunk, ignored):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 40, 16, generator=draw, dtype=torch.float64)
    head = torch.randn(50, 16, generator=draw, dtype=torch.float64)
    labels = torch.randint(0, 50, (3, 40), generator=draw)
    labels[torch.rand(3, 40, generator=draw) < ignored] = IGNORE
    weights = torch.rand(3, 40, generator=draw, dtype=torch.float64)
    results = []
    for chunked in (False, True):
        h, w = hidden.float().requires_grad_(), head.float().requires_grad_()
        if chunked:
            loss = objective.chunked_nll(h, w, labels, weights.float(), chunk)
        else:
            loss = objective.weighted_nll(h @ w.T, labels, weights.float())
        (3 * loss).backward()
        results.append([loss.detach(), h.grad, w.grad])
    assert (float(results[0][0]) > 0) == (ignored < 1)
    for whole, parts in zip(*results, strict=True):
        assert float((whole - parts).norm()) <= 1e-6 * float(whole.norm())


def test_chunks_for_evaluation_equal_the_whole():
    hidden, head = torch.randn(2, 9, 4), torch.randn(11, 4)
    labels = torch.randint(0, 11, (2, 9))
    labels[0, 3:] = IGNORE
    whole = objective.token_nll(hidden @ head.T, labels)
    torch.testing.assert_close(objective.chunked_token_nll(hidden, head, labels, 4), whole)


def test_bfloat16_chunks_report_the_float32_loss_of_their_logits():
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(4, 64, 32, generator=draw), torch.randn(3000, 32, generator=draw)
    labels = torch.randint(0, 3000, (4, 64), generator=draw)
    with torch.autocast("cpu", torch.bfloat16):
        logits = F.linear(hidden, head)
        chunked = objective.chunked_nll(hidden, head, labels, torch.ones(4, 64), 100)
    assert logits.dtype == torch.bfloat16
    exact = F.cross_entropy(logits.double().flatten(0, 1), labels.flatten(), reduction="sum")
    assert abs(float(chunked) / 256 - float(exact) / 256) < 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_sums_do_not_follow_the_default_dtype(dtype):
    """Lightning sets it under bf16-true and its like."""
    labels = torch.randint(0, 50, (2, 300))
    documents = torch.zeros_like(labels)
    torch.set_default_dtype(dtype)
    try:
        hidden, head = torch.randn(2, 300, 8), torch.randn(50, 8)
        weights, _ = objective.token_weights(labels, documents, LossConfig("sequence"))
        chunked = objective.chunked_nll(hidden, head, labels, weights, 64)
        for_evaluation = objective.chunked_token_nll(hidden, head, labels, 64)
        whole = objective.weighted_nll(F.linear(hidden, head), labels, weights)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {weights.dtype, chunked.dtype, for_evaluation.dtype} == {torch.float32}
    assert float(chunked) == pytest.approx(float(whole), abs=1e-4)
    assert float((for_evaluation * weights).sum()) == pytest.approx(float(whole), abs=1e-4)


def test_float16_chunks_keep_small_weights():
    """A weight of 1/2048 does not push the gradients of unlikely tokens below float16's least."""
    draw = torch.Generator().manual_seed(0)
    hidden, head = torch.randn(1, 64, 32, generator=draw), torch.randn(5000, 32, generator=draw) / 6
    labels = torch.randint(0, 2500, (1, 64), generator=draw)
    gradients = []
    for kind in (torch.float32, torch.float16):
        w = head.clone().requires_grad_()
        with torch.autocast("cpu", torch.float16, enabled=kind == torch.float16):
            loss = objective.chunked_nll(hidden, w, labels, torch.full((1, 64), 1 / 2048), 16)
        (loss * 1024).backward()
        gradients.append(w.grad[2500:])  # of tokens that are no label
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < 0.05


def test_any_ids_tell_documents_apart():
    documents = torch.tensor([[5, 5, 5, 900], [0, 0, -1, -1]])
    labels = torch.tensor([[1, 2, IGNORE, 3], [4, IGNORE, IGNORE, IGNORE]])
    weights, over = objective.token_weights(labels, documents, LossConfig("sequence"))
    assert int(over) == 3
    assert weights.tolist() == [[0.5, 0.5, 0, 1], [1, 0, 0, 0]]
