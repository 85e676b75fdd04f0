"""The page of compared runs: its statistics by hand, and what a browser shows of it."""

import json
import math
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from support import ROOT, command, load_script
from support.runs import short_run

compare_runs = sys.modules["compare_runs"] = load_script("compare_runs")  # compare_page imports it
compare_page = load_script("compare_page")


def runs(losses, preset="fix", **settings):
    summaries = [defaultdict(lambda: None, {"experiment": preset, "val/loss": x}) for x in losses]
    return [compare_runs.Run(Path("x"), s, {"model": "tiny"} | settings) for s in summaries]


def test_mean_and_interval_over_seeds_by_hand():
    (group,) = compare_runs.group(runs([1.0, 2.0, 3.0]))
    mean, half = group.interval("val/loss")
    assert mean == 2.0 and half == pytest.approx(4.303 / math.sqrt(3))  # t for 2 degrees of freedom
    (alone,) = compare_runs.group(runs([1.0]))
    assert alone.interval("val/loss")[0] == 1.0 and math.isnan(alone.interval("val/loss")[1])


def test_better_only_where_the_intervals_part():
    def grouped(*losses):
        return compare_runs.group(runs(losses))[0]

    low, high, wide = grouped(1.0, 1.01), grouped(2.0, 2.01), grouped(1.0, 3.0)
    assert compare_runs.is_better(low, high) and not compare_runs.is_better(high, low)
    assert not compare_runs.is_better(low, wide)
    assert not compare_runs.is_better(grouped(1.0), high)  # one seed has no interval


def test_configurations_of_one_preset_are_told_apart_by_what_differs():
    given = runs([1.0, 2.0]) + runs([3.0], **{"optimizer.lr": 0.1})
    groups = compare_runs.group(given)
    assert [len(g.runs) for g in groups] == [2, 1]
    assert groups[0].name != groups[1].name and "optimizer.lr=0.1" in groups[1].name


@pytest.mark.extras
def test_the_page_in_a_browser(tmp_path):
    """It opens without an error on its console, and its figures are those of the summaries."""
    pytest.importorskip("matplotlib")
    for name in ("fix", "bug"):
        short_run(tmp_path / name, f"experiment={name}")
    page, pictures = tmp_path / "compare.html", tmp_path / "pictures"
    done = command("scripts/compare.py", str(tmp_path), "--html", str(page), "--pictures",
                   str(pictures))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {p.name for p in pictures.iterdir()} >= {"losses.png", "losses.svg", "visibility.svg"}
    assert page.stat().st_size < 3e6 and "http://" not in page.read_text().replace(
        "http://www.w3.org", "")  # fmt: skip
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in shown.stderr
    assert shown.stdout.count("<svg") == 3
    table = shown.stdout.partition('id="runs"')[2].partition("</table>")[0]
    for name in ("fix", "bug"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        row = re.search(rf">{name}</th>(.*?)</tr>", table)[1]
        cells = re.findall(r"<td>(.*?)</td>", row)
        assert cells[1:3] == [f"{summary[key]:.3f}" for key in ("train/loss", "val/loss")]
        assert ("shift" in cells[-1]) == (name == "bug")


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plots"):
        compare_page.page(compare_runs.group(runs([1.0])))
    assert (ROOT / "scripts/compare_page.html").is_file()
