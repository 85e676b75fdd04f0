import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from causal_lm import masks
from causal_lm.masks import AttentionMask


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=12))
def test_rule_by_loop_and_no_row_is_empty(documents):
    may = masks.causal_within_documents(torch.tensor([documents]))[0]
    for t, mine in enumerate(documents):
        for s, other in enumerate(documents):
            assert bool(may[t, s]) == (s <= t and mine == other)
    assert bool(may.any(dim=1).all())


@given(st.lists(st.lists(st.integers(-1, 1), min_size=5, max_size=5), min_size=1, max_size=3))
def test_plain_causal_is_said_only_where_it_is_the_same(rows):
    ids = torch.tensor(rows)
    may, real = masks.causal_within_documents(ids), ids >= 0
    plain = torch.ones(5, 5, dtype=torch.bool).tril().expand_as(may)
    same = torch.equal(may[real], plain[real])
    mask = AttentionMask.from_document_ids(ids)
    assert same or not mask.plain_causal
    assert torch.equal(mask.to_dense(), may)
    runs = [[len(list(run)) for i, run in itertools.groupby(row) if i >= 0] for row in rows]
    assert mask.document_lengths == tuple(itertools.chain(*runs))


def test_what_plain_causal_covers():
    for rows in ([[0, 0, 0]], [[0, 0, -1], [0, 0, 0]], [[-1, -1, -1], [1, -1, -1]]):
        assert AttentionMask.from_document_ids(torch.tensor(rows)).plain_causal
    for rows in ([[0, 0, 1]], [[-1, 0, 0]], [[0, -1, 0]], [[0, 0, 0], [0, 1, -1]]):
        assert not AttentionMask.from_document_ids(torch.tensor(rows)).plain_causal


def test_padding_on_either_side_hides_pad_from_real_tokens():
    for documents in ([0, 0, 0, -1, -1], [-1, -1, 0, 0, 0]):
        ids = torch.tensor([documents])
        may = masks.causal_within_documents(ids)[0]
        real = ids[0] >= 0
        assert not may[real][:, ~real].any()
        assert int(may[real][:, real].sum()) == 6  # three tokens: 1 + 2 + 3


@pytest.fixture
def attention():
    torch.manual_seed(0)
    return nn.MultiheadAttention(8, 2, batch_first=True).eval(), torch.randn(2, 5, 8)


def reference(attention, x, may):
    """Attention by its definition, in the convention of scaled_dot_product_attention."""
    q, k, v = (
        part.unflatten(-1, (2, 4)).transpose(1, 2)
        for part in (x @ attention.in_proj_weight.T + attention.in_proj_bias).chunk(3, dim=-1)
    )
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=may[:, None])
    return attention.out_proj(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("convention", ["bool", "float"])
def test_both_conventions_of_torch_layers(attention, convention):
    """True = masked out, or 0 / -inf added: each is right, and mixed up is not."""
    layer, x = attention
    attention_mask = AttentionMask.from_document_ids(
        ids := torch.tensor([[0, 0, 0, -1, -1], [0, 0, 1, 1, 1]])
    )
    may, additive = masks.causal_within_documents(ids), attention_mask.to_additive()
    mask = attention_mask.to_masked_out() if convention == "bool" else additive
    mask = mask.repeat_interleave(2, dim=0)
    expected = reference(layer, x, may)
    out = layer(x, x, x, attn_mask=mask, need_weights=False)[0]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert (~may).any()
    mistaken = may if convention == "bool" else additive.exp()  # 0 / 1 added
    wrong = layer(x, x, x, attn_mask=mistaken.repeat_interleave(2, dim=0), need_weights=False)[0]
    assert not torch.allclose(wrong.nan_to_num(), expected, atol=1e-3)


def test_boundaries_of_documents_and_of_pad():
    mask = AttentionMask.from_document_ids(torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, -1]]))
    assert mask.boundaries.tolist() == [0, 2, 5, 9, 10]
    assert mask.boundaries.dtype == torch.int32
    rows = torch.tensor([[-1, 0, 0], [0, 0, 0], [0, 0, 0]])  # the same id in another row
    assert AttentionMask.from_document_ids(rows).boundaries.tolist() == [0, 1, 3, 6, 9]
    assert (mask.map(lambda tensor: tensor + 1).boundaries == mask.boundaries + 1).all()


def test_an_explicit_mask_replaces_the_rule():
    everything = torch.ones(1, 3, 3, dtype=torch.bool)
    mask = AttentionMask.from_document_ids(torch.tensor([[0, 0, 0]])).with_dense(everything)
    assert not mask.plain_causal and torch.equal(mask.to_dense(), everything)
    assert torch.equal(mask.map(torch.clone).to_dense(), everything)
