"""Samples at each evaluation: statistics worked by hand, and no effect on training."""

import pytest
import torch

from causal_lm import generation
from causal_lm.data.tokenizers import BOS, EOS, PAD, SymbolTokenizer
from causal_lm.report.samples import (
    continuations,
    distinct,
    n_grams,
    repetition,
    sample_statistics,
)
from support import make_module
from support.runs import short_run

A, B, C = 3, 4, 5
ROWS = torch.tensor([
    [BOS, A, B, A, B, A, B, A],  # no end
    [BOS, A, B, C, A, EOS, A, A],
    [BOS, EOS, PAD, PAD, PAD, PAD, PAD, PAD],  # a text of no tokens
])  # fmt: skip


def test_continuations_end_before_eos():
    assert continuations(ROWS, EOS) == [[A, B, A, B, A, B, A], [A, B, C, A], []]
    assert continuations(ROWS[:2], EOS, prompt_length=3) == [[A, B, A, B, A], [C, A]]
    assert continuations(torch.tensor([[EOS, A, B, EOS]]), EOS) == [[A, B]]  # BOS may be EOS


def test_statistics_by_hand():
    """Of 3-grams, ABA BAB ABA BAB ABA | ABC BCA: three of seven came before. Of 4-grams, ABAB BABA
    ABAB BABA | ABCA: two of five. Different tokens: 3 of 11; pairs AB BA BC CA: 4 of 9."""
    figures = sample_statistics(ROWS, SymbolTokenizer(4), None)
    assert figures.repetition_3 == pytest.approx(3 / 7)
    assert figures.repetition_4 == pytest.approx(2 / 5)
    assert figures.repetition_error == pytest.approx(
        (0.4**2 + 0.4**2) ** 0.5 / 5
    )  # 2 - 1.6, 0 - 0.4
    assert figures.distinct_1 == pytest.approx(3 / 11)
    assert figures.distinct_2 == pytest.approx(4 / 9)
    assert figures.unfinished_share == pytest.approx(1 / 3)
    assert figures.pad_eos_share == pytest.approx((0 + 1 + 7) / 21)
    assert figures.legal_rate is None


def test_a_fraction_of_nothing_is_none():
    assert n_grams([A, B], 3) == []
    assert repetition([[A, B], []], 3) == repetition([], 3) == (None, None)
    assert distinct([[]], 1) is None


def test_samples_are_batched_seeded_and_leave_the_random_state_alone():
    module = make_module().eval()
    prompts, options = torch.full((5, 1), BOS), {"temperature": 0.8, "top_k": 5, "seed": 3}
    before = torch.get_rng_state()
    rows = generation.sample_in_batches(module, prompts, 12, batch_size=2, **options)
    assert rows.shape == (5, 12)
    assert len({tuple(row) for row in rows.tolist()}) == 5  # one stream over all batches
    assert torch.equal(
        rows, generation.sample_in_batches(module, prompts, 12, batch_size=2, **options)
    )
    assert torch.equal(before, torch.get_rng_state())


def test_training_is_not_affected(tmp_path):
    """With dropout, which draws from the global state: the same weights, and the same loss."""
    states, summaries = [], []
    for count in (0, 7):
        directory = tmp_path / str(count)
        summaries.append(short_run(directory, f"samples.count={count}", "model.dropout=0.3"))
        path = directory / "checkpoints" / "last.ckpt"
        states.append(torch.load(path, weights_only=True)["state_dict"])
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    without, with_ = summaries
    assert without["train/loss"] == with_["train/loss"]
    assert without["sample/legal_rate"] == with_["sample/legal_rate"]
    assert {v for k, v in without.items() if k.startswith("writing/")} == {None}
    assert with_["writing/distinct_1"] > 0
    assert 0 < with_["seconds/writing"] < with_["seconds/fit"]
    assert not (tmp_path / "0" / "samples").exists()


def test_the_samples_of_each_evaluation_are_kept(tmp_path):
    """Steps 3 and 6 are evaluated in the fit, the last weights, of step 8, after it."""
    summary = short_run(tmp_path, "trainer.max_steps=8")
    files = sorted((tmp_path / "samples").iterdir())
    assert [f.name for f in files] == [f"step_0000000{n}.txt" for n in (3, 6, 8)]
    assert files[2].read_text().count("\n--- ") == 4
    assert f"\ndistinct_1 {summary['writing/distinct_1']}\n" in files[2].read_text()
