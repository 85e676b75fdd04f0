"""The benchmark page is what its script makes of the stored figures, counted as the page says."""

import importlib.util
import json
from pathlib import Path
from typing import Any

SCRIPT = Path(__file__).parents[1] / "scripts/benchmark.py"
spec = importlib.util.spec_from_file_location("preflight_benchmark", SCRIPT)
assert spec and spec.loader
benchmark: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(benchmark)


def test_the_page_is_made_of_the_stored_figures() -> None:
    text = benchmark.DATA.read_text(encoding="utf-8")
    data = json.loads(text)
    assert benchmark.dump(data) == text
    assert benchmark.PAGE.read_text(encoding="utf-8") == benchmark.page(data)
    runs = data["causal-preflight"]["runs"]
    assert len(runs) > 100 and all(len(run["found"]) == len(benchmark.SEEDS) for run in runs)


def test_runs_are_counted_by_hand() -> None:
    runs = [
        {"case": "a", "label": None, "twin": None, "found": [[], ["x"]]},
        {"case": "b", "label": "shift", "twin": "a", "found": [["shift"], ["x"]]},
        {"case": "c", "label": "pad", "twin": "a", "found": [["pad", "shift"], ["x", "y"]]},
    ]
    counted = benchmark.summarize(runs)
    assert counted["told"] == [True, False, True, True]
    assert counted["shift"] == [True, False] and counted["pad"] == [True, True]
    assert counted["named"] == [True, False, False, False]
    assert counted["alarms"] == [False, True]
    assert benchmark.of(counted["told"]) == "3 of 4"
