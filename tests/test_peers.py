"""The benchmark beside other models: a short run, and the table that is made of its figures."""

import json

import pytest

from support import ROOT, command, load_script
from support.models import NANOGPT


@pytest.mark.extras
@pytest.mark.slow
def test_one_round_of_one_step(tmp_path):
    figures = tmp_path / "figures.json"
    (tmp_path / "model.py").write_text(NANOGPT)
    options = ("--rounds", "1", "--steps", "1", "--json", figures, "--nanogpt", tmp_path)
    done = command("scripts/benchmark.py", "peers", *map(str, options))
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(figures.read_text())
    shares = {
        name: rates[0] / result["slots_per_second"][name][0]
        for name, rates in result["targets_per_second"].items()
    }
    assert {"llama, packed", "x-transformers, padded", "transformers, padded"} <= set(shares)
    assert shares["llama, packed"] > 0.97 > shares["llama, padded"]
    assert shares["nanoGPT, contiguous stream"] == 1 > shares["nanoGPT, padded"]
    for name in shares:
        assert f"| {name} | " in done.stdout


def test_the_page_shows_the_stored_figures():
    figures = json.loads((ROOT / "docs/peers.json").read_text("utf-8"))
    page = (ROOT / "docs/performance.md").read_text("utf-8")
    shown = page.partition("<!-- peers -->\n")[2].partition("\n<!-- /peers -->")[0]
    assert shown == load_script("peers").table_of(figures)
    assert len(figures["targets_per_second"]["llama, packed"]) == figures["rounds"] >= 5
