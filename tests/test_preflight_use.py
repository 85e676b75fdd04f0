"""The preflight as people meet it: a callback for any LightningModule, and a command."""

import json

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from causal_preflight.lightning import Preflight, PreflightError
from support import ROOT, command

V = 12

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

def breaks():
    raise RuntimeError("no such file of weights")
"""


class Theirs(L.LightningModule):
    """Somebody's module: dict batches, its own loss, its own logging."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Embedding(V, 16), nn.Linear(16, V))
        self.shift = shift

    def training_step(self, batch, batch_idx):
        ids = batch["input_ids"]
        logits = self.net(ids)[:, : ids.shape[1] - self.shift]
        loss = F.cross_entropy(logits.flatten(0, 1), ids[:, self.shift :].flatten(), ignore_index=0)
        self.log("loss", loss)
        return {"loss": loss}

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(module, callback, tmp_path, **options):
    ids = torch.tensor([[1, 3, 4, 5, 6, 2], [1, 7, 8, 2, 0, 0], [1, 9, 5, 4, 2, 0]])
    data = [{"input_ids": ids, "attention_mask": (ids != 0).long()}] * 3
    trainer = L.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[callback],
        default_root_dir=tmp_path, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=None))
    return trainer


def test_a_right_module_of_somebody_else_trains(tmp_path):
    callback = Preflight(pad_id=0, eos_id=2, directory=tmp_path)
    trainer = fit(Theirs(shift=1), callback, tmp_path)
    assert trainer.global_step == 2
    assert callback.report.faults == set()
    assert "loss" in trainer.callback_metrics  # logging works again afterwards
    assert "<html" in (tmp_path / "preflight.html").read_text()
    assert json.loads((tmp_path / "preflight.json").read_text())["faults"] == []


def test_a_faulty_one_is_stopped_warned_of_or_let_be(tmp_path):
    with pytest.raises(PreflightError, match="shift"):
        fit(Theirs(shift=2), Preflight(pad_id=0, eos_id=2), tmp_path)
    warned = Preflight("warn", pad_id=0, eos_id=2)
    assert fit(Theirs(shift=2), warned, tmp_path).global_step == 2
    assert "shift" in warned.report.faults
    off = Preflight("off")
    assert fit(Theirs(shift=2), off, tmp_path).global_step == 2
    assert off.report is None


def test_a_mean_under_accumulation_is_a_mean_of_means(tmp_path):
    """A right loss by itself; with Lightning's average over micro-batches it is not."""
    callback = Preflight(pad_id=0, eos_id=2)
    with pytest.raises(PreflightError, match=r"norm: .*differ"):
        fit(Theirs(shift=1), callback, tmp_path, accumulate_grad_batches=2)
    assert callback.report.faults == {"norm"}


def test_the_audit_does_not_change_the_training(tmp_path):
    """Same weights after two steps, to the bit, with and without the audit (dropout included)."""
    states = []
    for on_fault in ("error", "off"):
        module = Theirs(shift=1)
        module.net.insert(1, nn.Dropout(0.3))
        torch.manual_seed(7)
        fit(module, Preflight(on_fault, pad_id=0, eos_id=2), tmp_path)
        states.append(module.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])


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
