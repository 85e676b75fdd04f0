"""The preflight of this project: the command, and the callback of a configured run."""

import json

import pytest

from causal_lm import config
from causal_lm.callbacks.preflight import WHERE_TO_LOOK, make_preflight
from causal_lm.data.tokenizers import SymbolTokenizer
from causal_preflight import Finding, Report
from causal_preflight.report import LABELS
from support import ROOT, command

THEIRS = """
import torch
import torch.nn.functional as F
from torch import nn

class Net(nn.Module):
    def __init__(self, both):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(12, 16)
        self.rnn = nn.GRU(16, 16, batch_first=True, bidirectional=both)
        self.head = nn.Linear(32 if both else 16, 12)

    def forward(self, ids):
        print("a model that talks")
        return self.head(self.rnn(self.embed(ids))[0])

def loss(model, batch):
    ids = batch["input_ids"]
    logits, targets = model(ids[:, :-1]), ids[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=0)

def make(both):
    ids = torch.tensor([[1, 3, 4, 5, 6, 2], [1, 7, 8, 2, 0, 0], [1, 9, 2, 0, 0, 0]])
    return Net(both), {"input_ids": ids, "attention_mask": (ids != 0).long()}, loss

def right():
    return make(False)

def wrong():
    return make(True)

def number():
    return 3

def nothing():
    model, batch, _ = make(False)
    return model, batch, lambda model, batch: model.head.weight.sum()

def breaks():
    raise RuntimeError("no such file of weights")
"""


@pytest.fixture
def theirs(tmp_path):
    path = tmp_path / "theirs.py"
    path.write_text(THEIRS)
    return path


def preflight(*args):
    return command(str(ROOT / "scripts" / "preflight.py"), *args)


def test_command_on_a_file(theirs, tmp_path):
    ids = ["--pad-id", "0", "--eos-id", "2"]
    clean = preflight(f"{theirs}:right", *ids)
    assert (clean.returncode, clean.stderr.count("error")) == (0, 0)
    assert "no fault found" in clean.stdout
    verbose = preflight(f"{theirs}:right", *ids, "--verbose").stdout
    assert "no fault found" in verbose and verbose.count("\n") > clean.stdout.count("\n")
    faulty = preflight(f"{theirs}:wrong", *ids, "--json", "--html", str(tmp_path / "page.html"))
    assert faulty.returncode == 1
    assert json.loads(faulty.stdout)["faults"] == ["causal"]
    page = (tmp_path / "page.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "http" not in page  # self-contained


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("number", "number must return (model, batch) or (model, batch, loss_fn)"),
        ("breaks", "no such file of weights"),
        ("absent", "has no function 'absent'"),
    ],
)
def test_command_that_cannot_run(theirs, function, words):
    done = preflight(f"{theirs}:{function}")
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr


def test_command_on_a_configured_run():
    clean = preflight("experiment=fix", "--json")
    assert clean.returncode == 0
    assert json.loads(clean.stdout)["faults"] == []
    faulty = preflight("experiment=bug", "--json")
    assert faulty.returncode == 1
    assert json.loads(faulty.stdout)["faults"] == ["shift", "pad", "causal"]
    assert preflight("experiment=fux").returncode == 2


def test_command_where_nothing_could_be_examined(theirs):
    done = preflight(f"{theirs}:nothing", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["audited"] is False


def test_the_example_shows_a_correct_and_a_faulty_loss():
    example = str(ROOT / "examples" / "audit_me.py")
    for function, code in (("correct", 0), ("unshifted", 1)):
        done = preflight(f"{example}:{function}", "--pad-id", "0", "--eos-id", "2", "--json")
        assert done.returncode == code, done.stderr
        assert json.loads(done.stdout)["faults"] == ["shift"] * code


def test_every_label_has_a_place_to_look():
    assert set(WHERE_TO_LOOK) == set(LABELS)


def test_the_callback_of_a_configured_run(tmp_path):
    tokenizer = SymbolTokenizer(5)
    right = make_preflight(config.load(["experiment=fix"]), tokenizer, tmp_path)
    ids = right.options["pad_id"], right.options["eos_id"]
    assert ids == (tokenizer.pad_id, tokenizer.eos_id)
    assert right.figures() == {}
    wrong = make_preflight(config.load(["pitfalls.unshifted_labels=true"]), tokenizer, None)
    wrong.report = Report([Finding("shift", "seen", "mend"), Finding("causal", "seen", "mend")])
    assert wrong.figures()["preflight/faults"] == ["causal", "shift"]
    assert wrong.figures()["preflight/audited"] is True
    right.report = Report()  # no probe has passed: it is unknown what the loss trains
    assert right.figures()["preflight/audited"] is False
    message = wrong.message(wrong.report)
    assert "pitfalls.unshifted_labels" in message  # asked for: its key
    assert WHERE_TO_LOOK["causal"] in message  # not asked for: where to look
    assert "preflight.on_fault=warn" in message
