"""A held-out collection in the style of practice of 2024 to 2026: what is found, named, alarmed."""

import pytest
import torch

from audit_cases.practice import ATTENTION
from audit_cases.practice_batches import BATCHES
from audit_cases.practice_losses import LOSSES
from audit_cases.practice_mixing import MIXING
from causal_preflight import Report, preflight

torch.set_num_threads(1)
COLLECTIONS = (ATTENTION, MIXING, LOSSES, BATCHES)
RIGHT = {name: build for c in COLLECTIONS for name, build in c.right.items()}
FAULTY = {name: case for c in COLLECTIONS for name, case in c.faulty.items()}
SLOW = pytest.mark.slow
NOTED = ("token weights", "token weights over a count", "advantages", "focal", "class weights",
         "weights of rows", "ratio and advantage")  # fmt: skip


def audit(build, seed: int) -> Report:
    model, batch, loss_fn, known = build(seed)
    return preflight(model, batch, loss_fn, seed=seed, **known)


def test_the_collection_is_not_small() -> None:
    assert len(RIGHT) == sum(len(c.right) for c in COLLECTIONS) >= 40
    assert len(FAULTY) == sum(len(c.faulty) for c in COLLECTIONS) >= 60


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("name", RIGHT)
def test_right_practice_raises_no_alarm(name: str, seed: int) -> None:
    report = audit(RIGHT[name], seed)
    assert report.clean, str(report)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("name", FAULTY)
def test_faulty_practice_is_named_exactly(name: str, seed: int) -> None:
    label, _, build = FAULTY[name]
    report = audit(build, seed)
    assert report.faults == {label}, str(report)


@pytest.mark.parametrize("name", [NOTED[0], *(pytest.param(n, marks=SLOW) for n in NOTED[1:])])
def test_weights_of_targets_are_noted_not_called_faults(name: str) -> None:
    report = audit(RIGHT[name], 0)
    assert report.clean and "reduction" in report.passed
    (note,) = [note for note in report.remarks if note.startswith("reduction: ")]
    assert name not in ("token weights", "advantages") or name.replace(" ", "_") in note
