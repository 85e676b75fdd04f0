"""Tokenizing in several processes: the order of the chunks, and processes that end early."""

import os
from concurrent.futures.process import BrokenProcessPool

import pytest

from causal_lm.data import tokenize_corpus
from causal_lm.data.tokenize_corpus import Chunk, tokenize_chunks
from causal_lm.data.tokenizers import ByteTokenizer

CHUNKS = [Chunk([(f"text {i}",) for i in range(n)], False, (0.3, 0.2), None) for n in range(1, 30)]
STATE = ByteTokenizer().state()


def test_processes_give_the_chunks_of_one_process_in_their_order():
    alone, shared = ([*tokenize_chunks(iter(CHUNKS), STATE, n)] for n in (1, 2))
    assert [len(chunk.lengths) for chunk in alone] == [*range(1, 30)]
    for a, b in zip(alone, shared, strict=True):
        assert a.ids.tolist() == b.ids.tolist() and a.splits.tolist() == b.splits.tolist()
    assert {split for chunk in alone for split in chunk.splits.tolist()} == {0, 1, 2}


def test_a_process_that_ends_early_is_an_error(monkeypatch):
    monkeypatch.setattr(tokenize_corpus, "tokenize", lambda *_: os._exit(9))  # as if killed
    with pytest.raises(BrokenProcessPool):
        list(tokenize_chunks(iter(CHUNKS), STATE, 2))
