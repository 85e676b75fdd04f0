"""The figures that the README states, from whole runs of the presets as a person starts them."""

import json

import pytest

from support import command

pytestmark = pytest.mark.slow


def summary_of(directory, *overrides):
    done = command("train.py", *overrides, f"hydra.run.dir={directory}", timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "verdict:" in done.stdout
    return json.loads((directory / "summary.json").read_text())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    presets = ["fix", "bug", "unshifted_labels", "pad_in_loss", "no_causal_mask"]
    done = command(
        "train.py", "-m", f"experiment={','.join(presets)}", f"hydra.sweep.dir={folder}",
        timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "over floor" in done.stdout
    return {
        preset: json.loads((folder / f"{i}_{preset}" / "summary.json").read_text())
        for i, preset in enumerate(presets)
    }


def test_fix(runs):
    s = runs["fix"]
    assert s["train/loss"] == pytest.approx(s["val/loss"], rel=0.05)
    assert 0.99 <= s["val/ppl_over_floor"] <= 1.02
    assert s["sample/legal_rate"] >= 0.98
    assert s["preflight/faults"] == []


@pytest.mark.parametrize("preset", ["bug", "unshifted_labels"])
def test_copying(runs, preset):
    s = runs[preset]
    assert s["train/loss"] <= 0.05
    assert s["val/ppl_over_floor"] >= 100
    assert s["sample/legal_rate"] <= 0.20
    assert "shift" in s["preflight/faults"]


def test_no_causal_mask(runs):
    s = runs["no_causal_mask"]
    assert s["train/loss"] <= 0.3 * s["floor/loss"]
    assert s["val/ppl_over_floor"] >= 5
    assert s["sample/legal_rate"] <= 0.30
    assert s["preflight/faults"] == ["causal"]


def test_pad_in_loss(runs):
    s = runs["pad_in_loss"]
    assert s["train/loss"] <= 0.6 * s["val/loss"]
    assert s["val/ppl_over_floor"] <= 1.05
    assert s["sample/pad_eos_share"] >= 3 * runs["fix"]["sample/pad_eos_share"]
    assert s["preflight/faults"] == ["pad"]


def test_docstrings(tmp_path):
    s = summary_of(tmp_path, "data=docstrings")
    assert s["val/bpb"] <= 2.7
    assert s["train/loss"] == pytest.approx(s["val/loss"], rel=0.15)
    text = (tmp_path / "samples.txt").read_text()
    words = {"the", "of", "a", "and", "to", "is", "return", "Return", "in", "for"}
    assert len(words & set(text.split())) >= 5


@pytest.mark.parametrize(
    ("preset", "steps", "flattery"),
    [
        ("bug", 400, 0.1),
        ("unshifted_labels", 400, 0.1),
        ("pad_in_loss", 400, 0.8),
        ("no_causal_mask", 1500, 0.3),  # the look-up takes longer to learn than the copy
    ],
)
def test_the_contrast_on_docstrings(preset, steps, flattery, tmp_path):
    s = summary_of(
        tmp_path, "data=docstrings", f"experiment={preset}", f"trainer.max_steps={steps}"
    )
    assert s["train/loss"] <= flattery * s["val/loss"]
    assert s["val/loss_as_trained"] <= flattery * s["val/loss"]
