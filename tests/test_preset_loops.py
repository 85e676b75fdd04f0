"""callbacks=loop_probe: the training loop of every preset has no fault of its own."""

import pytest

from causal_lm import config
from causal_lm.fit import run
from causal_preflight.loop_probe import LoopProbe
from support import ROOT
from support.runs import SHORT

NEEDS_EXTRA = {"finetune"}
PRESETS = sorted({p.stem for p in (ROOT / "configs/experiment").glob("*.yaml")} - NEEDS_EXTRA)


@pytest.fixture
def reports(monkeypatch):
    """The reports of all fits, by number."""
    seen, tell = [], LoopProbe.on_train_end

    def note(probe, *args):
        tell(probe, *args)
        seen.append(probe.report)

    monkeypatch.setattr(LoopProbe, "on_train_end", note)
    return seen


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_has_a_fault_of_the_loop(preset, tmp_path, reports):
    words = [*SHORT, f"experiment={preset}", "callbacks=loop_probe", "preflight.on_fault=off"]
    if preset == "text_cpu":  # it reads a text, not the symbols of data.source
        (tmp_path / "text.txt").write_text("A line of text that is read, learned and told.\n" * 300)
        words = [word for word in words if "data.source" not in word]
        words += ["data=text", f"data.path={tmp_path / 'text.txt'}", "model.d_model=24"]
    run(config.load(words), tmp_path / "run")
    (report,) = reports
    assert report.clean and report.steps >= 3, str(report)
    assert {"parameters", "gradients", "rate", "tie"} <= set(report.passed), str(report)
