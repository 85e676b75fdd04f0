"""The verdict of a run, its tables, and files that are written whole."""

import json

import pytest

from causal_lm.report import files
from causal_lm.report.table import number, sweep_table, table, verdict
from support import load_script

CORRECT = {
    "train/loss": 1.80, "val/loss_as_trained": 1.79, "val/loss": 1.79,
    "val/ppl_over_floor": 1.01, "preflight/faults": [],
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "kind", "figures"),
    [
        ({}, "at_floor", ["1.010"]),
        ({"val/ppl_over_floor": 1.5}, "correct", ["1.800", "1.790", "1.5"]),
        ({"val/ppl_over_floor": None}, "correct", ["1.800", "1.790"]),
        ({"val/ppl_over_floor": 0.9}, "leaking", ["0.900"]),
        ({"train/loss": None}, "untrained", ["1.790"]),
        (
            {"val/loss_as_trained": 0.0, "val/loss": 9.0, "preflight/faults": ["shift"]},
            "worthless",
            ["0.000", "9.000", "shift"],
        ),
        ({"train/loss": 0.5}, "overfitted", ["0.500", "1.790"]),
        ({"val/loss_as_trained": 0.5}, "misleading", ["0.500", "1.790"]),
        ({"val/loss_as_trained": 0.5, "loss/reduction": "sequence"}, "at_floor", ["1.010"]),
    ],
)
def test_verdicts(changes, kind, figures):
    found = verdict(CORRECT | changes)
    assert found.kind == kind
    assert [figure for figure in figures if figure not in found.sentence] == []


def test_columns_line_up():
    lines = table([["run", "loss"], ["a", "1.5"], ["longer", "12.25"]]).splitlines()
    assert lines == ["run      loss", "-------------", "a         1.5", "longer  12.25"]
    assert [number(v) for v in (None, 0.0, 1.5, 22947676.2)] == ["–", "0.000", "1.500", "2.295e+07"]


def test_a_failed_job_has_a_row():
    assert "failed" in sweep_table([{"name": "1_bug", "status": "failed", "val/loss": None}])


@pytest.mark.parametrize("make_table", [sweep_table, load_script("compare").markdown_table])
def test_only_an_audited_run_is_clean(make_table):
    keys = ("sample/legal_rate", "sample/pad_eos_share")
    run = {"name": "a", "experiment": "fix", "seconds/total": 1.0} | CORRECT | dict.fromkeys(keys)
    for audited, cell in ((True, "clean"), (False, "not audited"), (None, "not audited")):
        (*_, row) = make_table([run | {"preflight/audited": audited}]).splitlines()
        assert ("not audited" if "not audited" in row else "clean") == cell
        assert cell in row


def test_files_are_whole_or_absent(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    files.write_json(path, {"a": float("nan"), "b": 1.5})
    assert json.loads(path.read_text()) == {"a": None, "b": 1.5}

    def full_disk(self, *args, **kwargs):
        self.touch()
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(type(path), "open", full_disk)
        with pytest.raises(OSError, match="no space"):
            files.write_json(path, {"b": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]
    assert json.loads(path.read_text())["b"] == 1.5
