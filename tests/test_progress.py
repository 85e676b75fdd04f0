"""Progress where the output is no terminal: plain lines."""

import re

from causal_lm.callbacks import progress
from support.runs import short_run


def test_a_line_for_each_report(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    short_run(tmp_path, "trainer.enable_progress_bar=true", "preflight.on_fault=off")
    err = capfd.readouterr().err
    assert "\r" not in err
    steps = [int(n) for n in re.findall(r"^step (\d+) of 6\b.*$", err, re.MULTILINE)]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_few_lines_in_a_short_run(tmp_path, capfd):
    short_run(tmp_path, "trainer.enable_progress_bar=true", "preflight.on_fault=off")
    assert "step 1 of" not in capfd.readouterr().err
