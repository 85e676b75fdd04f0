"""The page of compared runs, and what a browser shows of it."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from support import ROOT, command, load_script
from support.runs import short_run

compare_runs = sys.modules["compare_runs"] = load_script("compare_runs")  # compare_page imports it
compare_page = load_script("compare_page")


def test_a_page_of_failed_runs_alone_is_refused(tmp_path):
    """The page of a failed run alone is refused."""
    (tmp_path / "a").mkdir()
    failed = {"status": "failed", "val/loss": None, "experiment": "fix", "seed": 0}
    (tmp_path / "a/summary.json").write_text(json.dumps(failed))
    done = command("scripts/compare.py", str(tmp_path), "--html", str(tmp_path / "page.html"))
    assert done.returncode == 1 and "validation loss" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not (tmp_path / "page.html").exists()


@pytest.mark.extras
def test_the_page_in_a_browser(tmp_path):
    """It opens without an error on its console, and its figures are those of the summaries."""
    pytest.importorskip("matplotlib")
    for name, options in (("fix", []), ("bug", []), ("off", ["preflight.on_fault=off"])):
        short_run(tmp_path / name, f"experiment={name.replace('off', 'fix')}", *options)
    shutil.copytree(tmp_path / "fix", tmp_path / "older")  # the same seed a second time
    os.utime(tmp_path / "older/summary.json", (0, 0))
    page, pictures = tmp_path / "compare.html", tmp_path / "pictures"
    done = command("scripts/compare.py", str(tmp_path), "--html", str(page), "--pictures",
                   str(pictures))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {p.name for p in pictures.iterdir()} >= {"losses.png", "losses.svg", "visibility.svg"}
    assert page.stat().st_size < 3e6 and "http://" not in page.read_text().replace(
        "http://www.w3.org", "")  # fmt: skip
    assert re.search(r"Not shown.*: older\.", page.read_text())
    shown = browse(page)
    assert shown.count("<svg") == 3 and shown.count("no preflight") == 1
    bins = shown.partition('id="bins"')[2].partition("</section>")[0]
    assert len(re.findall(r'id="line2d_\d+"', bins)) > 6  # three lines in each panel, and ticks
    table = shown.partition('id="runs"')[2].partition("</table>")[0]
    columns = {"train/loss": "{:.3f}", "val/loss": "{:.3f}", "val/ppl_over_floor": "{:,.4g}",
               "sample/legal_rate": "{:.1%}", "sample/pad_eos_share": "{:.1%}",
               "train/pad_share": "{:.1%}"}  # fmt: skip
    for name in ("fix", "bug"):
        summary = json.loads((tmp_path / name / "summary.json").read_text())
        row = re.search(rf">{name}\b[^<]*</th>(.*?)</tr>", table)[1]
        cells = [cell.replace(" %", "%") for cell in re.findall(r"<td>(.*?)</td>", row)]
        assert cells[0] == str(summary["seed"])
        for cell, (key, form) in zip(cells[1:], columns.items(), strict=False):
            assert float(cell.strip("%").replace(",", "")) == pytest.approx(
                float(form.format(summary[key]).strip("%").replace(",", "")), rel=1e-3
            ), key
        assert ("shift" in cells[-1]) == (name == "bug")


def test_the_picture_of_the_readme_is_of_bug_and_fix():
    """Its titles, axes and lines, as the script names them."""
    picture = (ROOT / "docs/bug_and_fix.svg").read_text("utf-8")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", picture)
    assert {"bug", "fix", "reported", "true", "entropy floor", "nats per token"} <= set(texts)
    assert texts.count("step") == 2 and {"0", "1", "20"} <= set(texts)


@pytest.mark.extras
def test_the_page_of_whole_runs_is_small(tmp_path):
    """Two presets and three seeds, with a row for each of 750 steps."""
    short_run(tmp_path / "0_fix")
    with (tmp_path / "0_fix/metrics.csv").open(newline="") as file:
        rows = [*csv.DictReader(file)]
    for seed in range(6):
        folder = tmp_path / f"{seed}_fix"
        if seed:
            shutil.copytree(tmp_path / "0_fix", folder)
        with (folder / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows[n % len(rows)] | {"step": n} for n in range(750))
        summary = json.loads((folder / "summary.json").read_text()) | {"seed": seed}
        (folder / "summary.json").write_text(json.dumps(summary))
    page = tmp_path / "compare.html"
    done = command("scripts/compare.py", str(tmp_path), "--html", str(page))
    assert done.returncode == 0, done.stderr
    assert page.stat().st_size < 3e6 and "<td>6</td>" in page.read_text()


@pytest.mark.extras
def test_the_preflight_page_in_a_browser(tmp_path):
    """No error, each picture named, nothing wider than the screen; 500 is Chromium's narrowest."""
    page = tmp_path / "preflight.html"
    done = command("scripts/preflight.py", "experiment=bug", "--html", str(page))
    assert done.returncode == 1, done.stderr
    for width in (390, 1200):
        shown = browse(page, width, "document.title = document.documentElement.scrollWidth")
        assert int(re.search(r"<title>(\d+)</title>", shown)[1]) <= max(width, 500)
        assert 'name="viewport"' in shown and shown.count("aria-label") > 1


def browse(page, width=1200, script=""):
    """The page as Chromium has it in the end, at a width in pixels, after a script of one's own."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    if script:
        page = page.with_name("scripted.html")
        text = page.with_name("preflight.html").read_text("utf-8")
        page.write_text(text.replace("</body>", f"<script>{script}</script></body>"), "utf-8")
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--window-size={width},900", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in shown.stderr
    return shown.stdout


def test_without_matplotlib_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plots"):
        compare_page.page([])
    assert (ROOT / "scripts/compare_page.html").is_file()
