"""Every faulty set-up is named, every right one is clean; right twins exist for all."""

import pytest
import torch

from audit_cases import FAULTY, RIGHT, Setup
from causal_preflight import Report, preflight

torch.set_num_threads(1)


def audit(setup: Setup, seed: int) -> Report:
    model, batch, loss_fn, kw = setup
    return preflight(model, batch, loss_fn, seed=seed, **kw)


def test_the_collection_is_not_small() -> None:
    labels = {label for label, _, _ in FAULTY.values()}
    assert labels == {"shift", "pad", "causal", "reduction", "eos", "position"}
    assert len(FAULTY) >= 40 and len(RIGHT) >= 20
    assert all(twin in RIGHT for _, twin, _ in FAULTY.values())


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", RIGHT)
def test_right_raises_no_alarm(name: str, seed: int) -> None:
    report = audit(RIGHT[name](seed), seed)
    assert not report.faults, str(report)
    assert "alignment" in report.passed, str(report)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("name", FAULTY)
def test_faulty_is_named(name: str, seed: int) -> None:
    label, _, build = FAULTY[name]
    report = audit(build(seed), seed)
    assert report.faults == {label}, str(report)
