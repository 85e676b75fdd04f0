"""The page that compares runs: its figures are those of summary.json, and it loads nothing."""

import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from causal_lm.report import compare_page
from support import command
from support.runs import short_run

pytestmark = pytest.mark.extras


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.figures, self.ids, self.links = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "data":
            self.figures.append(float(found["value"]))
        self.ids += [found["id"]] if "id" in found else []
        self.links += [v for k, v in attributes if k in ("src", "href") and not v.startswith("#")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    pytest.importorskip("matplotlib")
    folder = tmp_path_factory.mktemp("runs")
    for name in ("fix", "pad_in_loss"):
        short_run(folder / name, f"experiment={name}", "preflight.on_fault=warn")
    return folder


def test_the_page_has_the_figures_of_the_summaries(runs, tmp_path):
    done = command("scripts/compare.py", str(runs), "--html", str(tmp_path / "page.html"))
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "page.html").read_text()
    page = Page(text)
    expected = []
    for name in ("fix", "pad_in_loss"):
        summary = json.loads((runs / name / "summary.json").read_text())
        values = [summary[key] for key in compare_page.COLUMNS]
        expected += [value for value in values if isinstance(value, int | float)]
    assert page.figures == expected and len(expected) > 10
    assert len(page.ids) == len(set(page.ids)) > 10
    assert page.links == [] and "<script" not in text
    assert "pitfalls.pad_in_loss" in text and "data.batch_size" not in text


def test_a_picture_shows_what_there_is(runs):
    run = compare_page.read_run(runs / "fix" / "summary.json")
    assert [step for step, _ in run.true] == [3, 6]
    assert [step for step, _ in run.reported] == [1, 2, 3, 4, 5, 6]
    assert run.true[-1][1] == pytest.approx(run.summary["val/loss"])
    svg = ElementTree.fromstring(compare_page.draw(run, "a-"))
    assert svg.tag.endswith("svg")


def test_a_run_without_a_validation_is_on_the_page_too(runs, tmp_path):
    summary = json.loads((runs / "fix" / "summary.json").read_text())
    summary |= {"status": "failed", "val/loss": None, "error": "a < b"}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    text = compare_page.page([compare_page.read_run(tmp_path / "summary.json")])
    assert "a &lt; b" in text
