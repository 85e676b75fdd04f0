"""Exhausted memory names what to lower; a worker that dies names its documents."""

import os
import re
import signal

import pytest
import torch

from causal_lm.data.documents import Document, Documents
from causal_lm.data.sources.synthetic import SyntheticLanguage
from causal_lm.module import CausalLM
from support.runs import short_run

BAD = 7  # index of the document that breaks a worker


class Breaking(Documents):
    """Documents of which one kills the process that reads it, or has an id out of range."""

    how = ""

    def __getitem__(self, index):
        document = super().__getitem__(index)
        if index != BAD:
            return document
        if self.how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return Document(document.tokens + 1000)


def exhausted(error):
    def step(self, batch, batch_idx):
        if error is not None:
            raise error
        torch.empty(10**15)  # 4 PB

    return step


@pytest.mark.parametrize(
    "error", [None, MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")]
)
def test_exhausted_memory_names_what_to_lower(error, monkeypatch, tmp_path):
    monkeypatch.setattr(CausalLM, "training_step", exhausted(error))
    with pytest.raises(MemoryError, match=r"data\.batch_size=4.*data\.max_length=20") as found:
        short_run(tmp_path, "preflight.on_fault=off")
    assert len(str(found.value).splitlines()) == 1


@pytest.mark.parametrize("how", ["kill", "range"])
def test_a_worker_that_fails_names_its_documents(how, monkeypatch, tmp_path):
    load = SyntheticLanguage.load

    def breaking(self):
        corpus = load(self)
        corpus.train.__class__ = Breaking
        return corpus

    monkeypatch.setattr(SyntheticLanguage, "load", breaking)
    monkeypatch.setattr(Breaking, "how", how)
    words = ["data.num_workers=1", "data.shuffle=false", "preflight.on_fault=off"]
    with pytest.raises(ValueError, match="data-loader worker") as found:
        short_run(tmp_path, *words)
    message = str(found.value)
    assert len(message.splitlines()) == 1
    assert "1003" in message or "token id" in message or how == "kill"
    windows = [int(n) for n in re.findall(r"\d+", re.search(r"windows ([\d, ]+)", message)[1])]
    assert windows[0] <= BAD < windows[0] + 3 * 4  # a worker is at most two batches ahead
    if how == "range":
        assert BAD in windows
