"""The experiment in which perplexity falls while the samples degenerate."""

import csv
import json

import pytest
import torch

from causal_lm import generation
from causal_lm.build import restore
from causal_lm.data.sources.synthetic import SyntheticLanguage
from causal_lm.data.tokenizers import BOS, EOS
from causal_lm.report.samples import sample_statistics
from support import command

STABLE = "stable"
SMALL = {"symbols": 10, "successors": 3, "mean": 30.0, "max_length": 17, "val_documents": 9}


def test_copies():
    """Of five symbols at most, three times each, after four documents that are written once."""
    corpus = SyntheticLanguage(**SMALL, train_documents=6, seed=0, copies=3, copies_after=4).load()
    assert (len(corpus.train), len(corpus.val), corpus.language) == (10, 9, None)
    for documents, first in ((corpus.train, 4), (corpus.val, 0)):
        for i in range(first, len(documents)):
            bos, *body, eos = documents[i].tokens.tolist()
            assert (bos, eos) == (BOS, EOS)
            assert 1 <= len(body) // 3 <= 5
            assert body == body[: len(body) // 3] * 3
    plain = SyntheticLanguage(**SMALL, train_documents=4, seed=0).load()
    assert torch.equal(corpus.train.tokens[: len(plain.train.tokens)], plain.train.tokens)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("duplicates")
    done = command("train.py", "experiment=duplicates", "trainer=cpu", f"hydra.run.dir={directory}")
    assert done.returncode == 0, done.stderr[-2000:]
    with (directory / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["val/ppl"] and row["train/loss"] == ""]
    return directory, json.loads((directory / "summary.json").read_text()), rows


@pytest.mark.slow
def test_a_falling_perplexity_does_not_hide_it(run):
    _, summary, rows = run
    assert summary["status"] == "stopped"
    assert summary["steps"] < 300
    # The reference evaluation and three worse ones.
    last = [row for row in rows if row["writing/repetition_4"]][-4:]
    ppl, repetition = ([float(r[k]) for r in last] for k in ("val/ppl", "writing/repetition_4"))
    assert ppl == sorted(ppl, reverse=True)
    assert repetition == sorted(repetition)
    for rate in repetition:
        assert f"{rate:.4f}" in summary["stopped_because"]
    assert summary["checkpoint/best"].startswith(f"step {summary['steps']}:")


@pytest.mark.slow
def test_the_stable_checkpoint_gives_better_samples(run):
    """Other samples than those it was chosen by; the language says which are legal."""
    directory, *_ = run
    language = SyntheticLanguage(
        symbols=40, successors=5, mean=30.0, max_length=64, train_documents=1, val_documents=1,
        seed=0,
    ).load().language  # fmt: skip
    figures = {}
    for name in ("best", STABLE):
        module, tokenizer, _ = restore(directory / "checkpoints" / f"{name}.ckpt")
        rows = generation.sample_in_batches(
            module, torch.full((200, 1), BOS), 33, seed=7, batch_size=100, temperature=0.8, top_k=50
        )
        figures[name] = sample_statistics(rows, tokenizer, language)
    best, stable = figures["best"], figures[STABLE]
    assert stable.repetition_4 < 0.2 * best.repetition_4
    assert stable.repetition_3 < 0.5 * best.repetition_3
    assert stable.distinct_1 > best.distinct_1
    assert stable.legal_rate > 0.95 > best.legal_rate
