"""Each head of a model is judged by its own offset, and by what it may see."""

import pytest
import torch

from audit_cases import RIGHT, Setup
from audit_cases.head_models import Beside, Deepseek, Medusa
from audit_cases.heads import HEADS, beside, multi, tags
from audit_cases.parts import padded
from audit_cases.registry import KNOWN
from causal_preflight import Report, preflight

torch.set_num_threads(1)
QUICK = ("medusa_on_pad",)


def audit(setup: Setup, seed: int) -> Report:
    model, batch, loss_fn, kw = setup
    return preflight(model, batch, loss_fn, seed=seed, **kw)


def right(name: str, seed: int) -> None:
    report = audit(HEADS.right[name](seed), seed)
    assert not report.faults, str(report)
    assert {"alignment", "future"} <= set(report.passed), str(report)


def wrong(name: str, seed: int) -> None:
    label, _, build = HEADS.faulty[name]
    report = audit(build(seed), seed)
    assert report.faults == {label}, str(report)


@pytest.mark.parametrize("name", QUICK)
def test_a_wrong_head_is_named(name: str) -> None:
    wrong(name, 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("name", HEADS.right)
def test_no_right_head_raises_an_alarm(name: str, seed: int) -> None:
    right(name, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0])
@pytest.mark.parametrize("name", HEADS.faulty)
def test_every_wrong_head_is_named(name: str, seed: int) -> None:
    wrong(name, seed)


def test_each_wrong_one_has_a_right_twin() -> None:
    assert {twin for _, twin, _ in HEADS.faulty.values()} <= set(HEADS.right)
    assert {label for label, _, _ in HEADS.faulty.values()} >= {"shift", "pad", "causal"}
    assert len(HEADS.right) >= 20 and len(HEADS.faulty) >= 30


def test_one_head_costs_no_run_more() -> None:
    report = audit(RIGHT["plain"](0), 0)
    assert report.forwards <= 66
    assert "further_heads" in report.skipped


@pytest.mark.slow
def test_the_wrong_head_is_told() -> None:
    report = preflight(Medusa(), padded(0), multi(1, 2, 4), **KNOWN)
    (finding,) = report.findings
    assert finding.probe == "further_heads" and finding.label == "shift"
    assert finding.seen.startswith("head 3: ")


@pytest.mark.slow
def test_the_page_shows_the_main_head_and_a_head_of_classes_is_noted() -> None:
    report = preflight(Beside(31), padded(0), beside(tags), **KNOWN)
    cells = [c for row in report.pictures["alignment"] for c in row if c["target"] is not None]
    assert cells and all(c["target"] == c["next"] for c in cells)
    assert sum(note.startswith("heads: 1 of 2") for note in report.remarks) == 1


@pytest.mark.slow
def test_a_head_of_training_only_leaves_the_mode_as_it_was() -> None:
    model = Deepseek().eval()
    report = preflight(model, padded(0), multi(1, 3), **KNOWN)
    assert report.faults == {"shift"} and not any(m.training for m in model.modules())
