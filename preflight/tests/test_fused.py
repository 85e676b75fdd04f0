"""Losses that hand out no logits: the preflight rebuilds them, and audits them like any other."""

import pytest
import torch

from audit_cases.fused import FUSED
from causal_preflight import Report, preflight

torch.set_num_threads(1)
QUICK = {"chunked unlabeled: shift"}


def names(cases: dict) -> list:
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in cases]


def audit(name: str, build) -> Report:
    model, batch, loss_fn, known = build(0)
    report = preflight(model, batch, loss_fn, **known)
    assert report.audited, str(report)
    return report


@pytest.mark.parametrize("name", names(FUSED.right))
def test_a_right_fused_loss_is_examined_and_clean(name: str) -> None:
    report = audit(name, FUSED.right[name])
    assert report.clean, str(report)
    assert {"alignment", "future", "context"} <= set(report.passed), str(report)
    # Where no module puts out the last hidden states, the weights are known nearly.
    is_near = name.startswith("Bare") and "nearly" in report.skipped.get("reduction", "")
    assert is_near or "reduction" in report.passed, str(report)


@pytest.mark.parametrize("name", names(FUSED.faulty))
def test_a_fault_in_front_of_a_fused_loss_is_named(name: str) -> None:
    label, _, build = FUSED.faulty[name]
    assert audit(name, build).faults == {label}
