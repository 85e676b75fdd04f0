"""Each pitfall: its switch, its preset, its row in the page, and that the audit names it."""

import pytest

from causal_lm import config
from causal_lm.pitfalls import PITFALLS
from support import ROOT, load_script

SMALL = ("data.source.train_documents=300", "data.source.val_documents=20")


audit = load_script("preflight").audit_run


def test_every_pitfall_has_a_switch_a_preset_and_a_row():
    """What docs/pitfalls.md shows was measured, and leaves nobody out."""
    page = (ROOT / "docs/pitfalls.md").read_text(encoding="utf-8")
    table = page.partition("<!-- table -->")[2].partition("<!-- /table -->")[0]
    explained = page.partition("## What happens")[2]
    rows = {line.split("`")[1]: line for line in table.splitlines() if "`" in line}
    assert set(rows) == {"fix", "bug", *PITFALLS}
    for name, kind in PITFALLS.items():
        cfg = config.load([f"experiment={name}"])
        assert cfg.experiment == name
        assert [n for n, on in cfg.pitfalls.items() if on] == [name]
        assert rows[name].rstrip(" |").endswith(kind.label)
        assert f"| `{name}` |" in explained
    assert set(config.load([]).pitfalls) == set(PITFALLS)


@pytest.mark.parametrize("name", list(PITFALLS))
def test_the_audit_of_each_preset_names_its_fault(name):
    cfg = config.load([f"experiment={name}", *SMALL])
    assert audit(cfg).faults == {PITFALLS[name].label}


@pytest.mark.parametrize("layout", ["padded", "bucketed", "packed"])
@pytest.mark.parametrize("reduction", ["token", "sequence", "padded"])
def test_the_audit_of_each_right_way_is_clean(layout, reduction):
    cfg = config.load([f"data.layout={layout}", f"loss.reduction={reduction}",
                       "trainer.accumulate_grad_batches=2", *SMALL])  # fmt: skip
    assert audit(cfg).faults == set()
