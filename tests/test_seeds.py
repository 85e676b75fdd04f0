"""Runs of several seeds: mean and interval by hand, grouped by what tells configurations apart."""

import math
from collections import defaultdict

import pytest

from causal_lm.report.seeds import group, interval, seed_table


def runs(losses, preset="fix", seeds=None, **settings):
    """One run for each loss, of seeds 0, 1, ... unless others are given."""
    seeds = range(len(losses)) if seeds is None else seeds
    return [
        defaultdict(lambda: None, {
            "experiment": preset, "val/loss": loss, "seed": seed, "status": "finished",
            "settings": {"experiment": preset, "seed": seed, "data": {"seed": seed}} | settings,
        })
        for loss, seed in zip(losses, seeds, strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("n", "t"), [(2, 12.706), (3, 4.303), (11, 2.228), (31, 2.042), (41, 2.021), (121, 1.980)]
)
def test_the_interval_is_student_t(n, t):
    """Values 0, 1, 0, 1, ... of a known standard deviation."""
    values = [i % 2 for i in range(n)]
    mean, half = interval(values)
    deviation = math.sqrt(n * mean * (1 - mean) / (n - 1))
    assert half == pytest.approx(t * deviation / math.sqrt(n), rel=2e-3)


def test_one_seed_has_no_interval():
    assert interval([1.5])[0] == 1.5 and math.isnan(interval([1.5])[1])
    assert all(map(math.isnan, interval([])))
    assert seed_table(runs([1.0]) + runs([2.0], "bug")) == ""


def test_better_only_where_the_intervals_part():
    def grouped(*losses):
        (found,) = group(runs(losses))
        return found

    low, high, wide = grouped(1.0, 1.01), grouped(2.0, 2.01), grouped(1.0, 3.0)
    assert low.is_better(high) and not high.is_better(low)
    assert not low.is_better(wide)
    assert not grouped(1.0).is_better(high)


def test_configurations_of_one_preset_are_told_apart_by_what_differs():
    groups = group(runs([1.0, 2.0]) + runs([3.0], optimizer={"lr": 0.1}))
    assert [len(g.runs) for g in groups] == [2, 1]
    assert groups[0].name != groups[1].name and "optimizer.lr=0.1" in groups[1].name


def test_a_run_that_is_repeated_is_not_a_second_seed():
    """As before and after a change of the code: the later one stays."""
    (found,) = group(runs([5.0, 2.0, 1.0], seeds=[0, 1, 0]))
    assert [(run["seed"], run["val/loss"]) for run in found.runs] == [(0, 1.0), (1, 2.0)]
    assert math.isnan(group(runs([1.0, 1.0], seeds=[0, 0]))[0].interval()[1])


def test_the_seed_of_the_language_is_no_seed_of_the_run():
    given = [run for n in (0, 1) for run in runs([1.0], data={"source": {"seed": n}})]
    assert len(group(given)) == 2


def test_the_seed_of_the_order_alone_makes_runs_of_one_configuration():
    given = [run for n in (0, 1) for run in runs([1.0 + n], seeds=[0], data={"seed": n})]
    (found,) = group(given)
    assert [run["val/loss"] for run in found.runs] == [1.0, 2.0]


def test_a_failed_run_counts_for_nothing():
    failed = runs([1.0, 9.0])
    failed[1]["status"] = "failed"
    (found,) = group(failed)
    assert [run["val/loss"] for run in found.runs] == [1.0]


def test_the_table_has_a_row_for_each_configuration():
    table = seed_table(runs([1.0, 1.1, 1.2]) + runs([5.0, 5.1, 5.2], "bug") + runs([None], "off"))
    head, _, fix, bug = table.splitlines()
    assert "seeds" in head and fix.split()[:2] == ["fix", "3"] and bug.split()[:2] == ["bug", "3"]
    half = 4.303 * 0.1 / math.sqrt(3)
    assert f"1.1000 ± {half:.4f}" in fix and fix.split()[-1] == "bug" and bug.split()[-1] == "–"
