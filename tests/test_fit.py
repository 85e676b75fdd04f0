"""Whole runs, short ones: the files and figures of a run, faults, precision, batching."""

import csv
import json
import math
import re

import pytest
import torch
from omegaconf import OmegaConf

from causal_lm import config
from causal_lm.build import instantiate, restore
from causal_lm.fit import SUMMARY_KEYS
from causal_lm.module import CausalLM
from causal_lm.report.files import MARKER
from support import command
from support.runs import FILES, SHORT, short_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    return directory, short_run(directory)


def test_the_contract(finished):
    directory, summary = finished
    assert {p.name for p in directory.iterdir()} == FILES | {MARKER, "checkpoints", "samples"}
    on_disk = json.loads((directory / "summary.json").read_text())
    assert on_disk == summary
    assert set(SUMMARY_KEYS) <= set(on_disk)
    assert {k for k, v in on_disk.items() if v is None} == {
        "error", "stopped_because", "val/bpb", "checkpoint/stable",
        "writing/repetition_spread", "writing/consistency_sentences",
        "test/loss", "test/ppl", "test/bpb", "test/step",
    }  # fmt: skip
    assert [p.name for p in sorted((directory / "samples").iterdir())] == [
        "step_00000003.txt", "step_00000006.txt",
    ]  # fmt: skip
    assert on_disk["steps"] == 6
    assert on_disk["status"] == "finished"
    assert on_disk["preflight/audited"] is True
    assert on_disk["checkpoint/last"].startswith("step 6: ")
    assert re.fullmatch(rf"step 6: .* {on_disk['val/loss']:.4f}", on_disk["checkpoint/best"])
    assert on_disk["val/loss"] == on_disk["val/loss_as_trained"]
    assert on_disk["val/ppl_over_floor"] == pytest.approx(on_disk["val/ppl"] / on_disk["floor/ppl"])
    assert OmegaConf.load(directory / "config.yaml").data.max_length == 20  # resolved
    with (directory / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if row["train/loss"]]) == 6
    assert len([row for row in rows if row["val/loss"]]) >= 2
    assert len([row for row in rows if row["writing/repetition_4"]]) == 2
    assert "--- 3" in (directory / "samples.txt").read_text()
    assert json.loads((directory / "preflight.json").read_text())["faults"] == []


@pytest.mark.parametrize(
    "words",
    [
        ["+trainer.callbacks=[{_target_: support.outside.Figure, value: 0.25}]"],
        ["+callbacks.mine._target_=support.outside.Figure", "+callbacks.mine.value=0.25"],
    ],
    ids=["trainer.callbacks", "callbacks"],
)
def test_whatever_was_logged_is_in_the_summary(words, tmp_path):
    short_run(tmp_path, *words, "trainer.max_steps=2")
    on_disk = json.loads((tmp_path / "summary.json").read_text())
    assert on_disk["own/figure"] == 0.25
    assert set(SUMMARY_KEYS) | {"train/grad_norm", "train/lr"} <= set(on_disk)


def test_any_argument_of_the_trainer_can_be_set(tmp_path):
    summary = short_run(tmp_path / "fast", "+trainer.fast_dev_run=true")
    assert (summary["status"], summary["steps"]) == ("finished", 1)
    summary = short_run(tmp_path / "epoch", "trainer.max_epochs=1", "trainer.max_steps=100")
    assert summary["steps"] == 10  # 40 documents in batches of 4
    for words in (["+trainer.fast_dev_runn=true"], ["++optimizer._target_=torch.optim.Nope"]):
        with pytest.raises(config.ConfigError, match=r"trainer\.fast_dev_runn|optimizer\._target_"):
            short_run(tmp_path / "wrong", *words)


def test_tokens_are_counted_by_hand(finished, tmp_path):
    """One epoch of 40 documents: n - 1 targets each."""

    summary = short_run(tmp_path, "trainer.max_steps=10")
    data = instantiate(config.load(SHORT).data)
    data.setup()
    assert summary["train/tokens"] == int((data.corpus.train.lengths - 1).sum())
    assert 0 < summary["train/pad_share"] < 1


@pytest.mark.slow
def test_the_checkpoint_is_all_that_sampling_needs(finished):
    directory, _ = finished
    path = directory / "checkpoints" / "last.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == 6
    assert torch.load(directory / "checkpoints" / "best.ckpt", weights_only=True)
    module, tokenizer, _ = restore(path)
    assert not module.training
    assert tokenizer.vocab_size == 43
    once, again = (
        command("scripts/generate.py", str(path), "--prompt", "ab", "--seed", "3") for _ in range(2)
    )
    assert once.returncode == 0, once.stderr
    assert once.stdout == again.stdout
    assert once.stdout.count("\nab") == 4
    bad = command("scripts/generate.py", str(path), "--prompt", "é")
    assert bad.returncode == 1
    assert bad.stderr.startswith("error: 'é' is not a symbol")


def test_a_fault_that_nobody_asked_for_stops_the_run(tmp_path):
    with pytest.raises(ValueError, match=r"shift: .*pitfalls\.unshifted_labels"):
        short_run(tmp_path, "pitfalls.unshifted_labels=true")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["preflight/faults"] == ["shift"]
    assert not (tmp_path / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(("on_fault", "faults"), [("warn", ["shift"]), ("off", [])])
def test_a_fault_that_is_wanted(on_fault, faults, tmp_path):
    summary = short_run(
        tmp_path, "pitfalls.unshifted_labels=true", f"preflight.on_fault={on_fault}"
    )
    assert summary["preflight/faults"] == faults
    assert (summary["seconds/preflight"] is None) == (on_fault == "off")


def test_a_fault_in_the_numbers_stops_the_run(tmp_path, monkeypatch):
    def break_weights(self, *_):
        torch._foreach_mul_([p.data for p in self.parameters()], 1e30)

    monkeypatch.setattr(CausalLM, "on_train_batch_end", break_weights)
    with pytest.raises(FloatingPointError, match=r"indices \d+, .* step 1"):
        short_run(tmp_path, "trainer.val_check_interval=1")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["status"] == "failed" and "not finite" in summary["error"]
    assert not (tmp_path / "checkpoints").exists()  # no evaluation was finite


@pytest.mark.parametrize(("every", "steps"), [(1, 6), (3, 4)])
def test_the_last_good_checkpoint_is_kept(every, steps, tmp_path, monkeypatch):
    """Step 4 breaks the weights (they stay finite): before an evaluation, or as the last step."""
    good = {}

    def break_weights(self, *_):
        if self.trainer.global_step == 3:
            good.update({name: w.clone() for name, w in self.state_dict().items()})
        if self.trainer.global_step == 4:
            torch._foreach_mul_([p.data for p in self.parameters()], 1e30)

    monkeypatch.setattr(CausalLM, "on_train_batch_end", break_weights)
    with pytest.raises(FloatingPointError, match="not finite"):
        short_run(tmp_path, f"trainer.val_check_interval={every}", f"trainer.max_steps={steps}")
    for name in ("last", "best"):
        kept = torch.load(tmp_path / f"checkpoints/{name}.ckpt", weights_only=True)
        assert kept["global_step"] == 3
        assert all(torch.equal(kept["state_dict"][key], weight) for key, weight in good.items())


def test_before_any_evaluation_the_weights_in_hand_are_kept(tmp_path, monkeypatch):
    def break_gradients(self, *_):
        if self.trainer.global_step == 2:
            next(p for p in self.parameters() if p.grad is not None).grad.fill_(math.nan)

    monkeypatch.setattr(CausalLM, "on_after_backward", break_gradients)
    with pytest.raises(FloatingPointError, match=r"gradient of batch 2 .*indices \d+, .* step 2"):
        short_run(tmp_path, "trainer.val_check_interval=100", "trainer.max_steps=5")
    kept = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert kept["global_step"] == 2
    assert all(weight.isfinite().all() for weight in kept["state_dict"].values())
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["steps"], summary["train/skipped"]) == (2, 0)


@pytest.mark.parametrize(
    "reduction",
    ["token", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sequence", "padded"))],
)
def test_however_documents_are_batched_the_weights_are_the_same(tmp_path, reduction):
    """Three steps of 4 documents, whole, one at a time, packed, and in another order of rows."""
    same = ("data.shuffle=false", "trainer.max_steps=3", "optimizer=sgd", "optimizer.lr=0.5",
            f"loss.reduction={reduction}", "loss.length=20")  # fmt: skip
    ways = {
        "whole": ["data.batch_size=4"],
        "parts": ["data.batch_size=1", "trainer.accumulate_grad_batches=4",
                  "trainer.val_check_interval=8"],
        "packed": ["data.batch_size=4", "data.layout=packed"],
        "left": ["data.batch_size=4", "data.padding_side=left"],
        "chunked": ["data.batch_size=4", "loss.chunk_tokens=5"],
    }  # fmt: skip
    states, summaries = {}, {}
    for name, extra in ways.items():
        summaries[name] = short_run(tmp_path / name, *same, *extra)
        path = tmp_path / name / "checkpoints/last.ckpt"
        states[name] = torch.load(path, weights_only=True)["state_dict"]
    for name in ways:
        for key, value in states["whole"].items():
            distance = float((states[name][key] - value).norm())
            assert distance <= 1e-6 * float(value.norm()) + 1e-7, (name, key)
        for figure in ("train/loss", "val/loss", "train/tokens"):
            assert summaries[name][figure] == pytest.approx(summaries["whole"][figure], rel=1e-6)
    assert summaries["packed"]["train/pad_share"] < summaries["whole"]["train/pad_share"]
    assert summaries["parts"]["train/pad_share"] == 0


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("reduction", ["token", "sequence"])
def test_low_precision_trains_and_is_audited(tmp_path, precision, reduction):
    summary = short_run(
        tmp_path, f"trainer.precision={precision}", f"loss.reduction={reduction}",
        "loss.chunk_tokens=16",
    )  # fmt: skip
    assert summary["status"] == "finished" and summary["preflight/faults"] == []
    assert summary["val/loss"] == pytest.approx(summary["val/loss_as_trained"], rel=0.05)


def test_bucketed_validates_the_same(tmp_path):
    losses = [
        short_run(tmp_path / name, "trainer.max_steps=1", "optimizer.lr=1e-12",
                  "data.source.val_documents=37", f"data.layout={name}", f"data.batch_size={size}")
        for name, size in (("padded", 4), ("bucketed", 5), ("packed", 7))
    ]  # fmt: skip
    for other in losses[1:]:
        assert other["val/loss"] == pytest.approx(losses[0]["val/loss"], rel=1e-9)


def test_accumulation_reports_its_own_loss(tmp_path):
    summary = short_run(tmp_path, "trainer.accumulate_grad_batches=2")
    assert summary["train/loss"] == pytest.approx(summary["val/loss"], rel=0.15)


def test_the_best_checkpoint_is_the_best(tmp_path):
    """Steps 3 and 6 are validated in the fit, the last weights after it: the best is the last."""
    short_run(tmp_path, "trainer.max_steps=8")
    best = torch.load(tmp_path / "checkpoints" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 8


@pytest.mark.slow
def test_compiled_blocks_train_the_same_model(tmp_path):
    """In packed rows, of which the compiled blocks get a dense mask; samples are not compiled."""
    words = ["model=llama", "model.d_model=32", "model.n_heads=2", "model.n_kv_heads=1",
             "model.d_ff=48", "data.layout=packed", "trainer.max_steps=6"]  # fmt: skip
    plain = short_run(tmp_path / "plain", *words)
    torch._dynamo.utils.counters.clear()
    compiled = short_run(tmp_path / "compiled", *words, "compile=true")
    assert 0 < torch._dynamo.utils.counters["stats"]["unique_graphs"] < 20
    assert compiled["preflight/faults"] == [] and compiled["preflight/audited"]
    for key in ("train/loss", "val/loss"):
        assert compiled[key] == pytest.approx(plain[key], rel=1e-4) and plain[key] > 1
