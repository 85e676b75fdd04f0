"""Leaks at few places of long rows are found, within a fixed number of runs of the loss."""

from collections.abc import Callable

import pytest
import torch

from audit_cases.long_rows import (
    Long,
    Opened,
    chunks,
    long_full,
    long_packed,
    long_padded,
    nothing,
    pair,
    sinks,
)
from audit_cases.parts import Batch, token_mean
from audit_cases.registry import KNOWN
from causal_preflight import Report, preflight
from causal_preflight.visibility import _cut_order

torch.set_num_threads(1)
BATCHES = (long_padded, long_full, long_packed)
LEAKS = {pair: 11, sinks: 12, chunks: 12}  # how many of twelve must be found
_MAX_RUNS = 80


def audit(opened: Opened, batch: Batch, seed: int) -> Report:
    torch.manual_seed(seed)
    return preflight(Long(opened), batch, token_mean, seed=seed, **KNOWN)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("leak", LEAKS)
def test_leaks_of_rows_of_128(leak: Callable[[int, int], Opened], batch: Callable) -> None:
    report = audit(leak(3, 128), batch(0, 128), 0)
    assert report.faults == {"causal"}, str(report)
    assert report.forwards <= _MAX_RUNS


@pytest.mark.parametrize("batch", BATCHES)
def test_long_rows_without_a_leak(batch: Callable) -> None:
    report = audit(nothing, batch(0, 256), 0)
    assert report.clean and {"future", "length", "context"} <= set(report.passed), str(report)
    assert report.forwards <= _MAX_RUNS


@pytest.mark.slow
@pytest.mark.parametrize("width", [128, 512])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("leak", LEAKS)
def test_twelve_leaks_of_each_kind(leak: Callable, batch: Callable, width: int) -> None:
    reports = [audit(leak(seed, width), batch(seed, width), seed) for seed in range(12)]
    found = [r.faults == {"causal"} for r in reports]
    assert sum(found) >= LEAKS[leak], found
    assert max(r.forwards for r in reports) <= _MAX_RUNS


@pytest.mark.parametrize("width", [2, 14, 128, 512])
def test_the_cuts_of_a_row_are_all_there_once(width: int) -> None:
    for b in range(4):
        assert sorted(_cut_order(width - 1, width, b, 4)) == list(range(1, width))


def test_the_first_cuts_leave_no_gap_wider_than_twice_the_mean() -> None:
    tried = {c for b in range(4) for c in _cut_order(511, 512, b, 4)[:24]}
    gaps = [b - a for a, b in zip(sorted(tried), sorted(tried)[1:], strict=False)]
    assert len(tried) > 85 and max(gaps) <= 2 * 512 / len(tried)
    assert {1, 2, 3, 4, 63, 64, 65, 128, 192, 256, 320, 511} <= tried
