"""The benchmark of Lightning's Trainer: one round at toy size, both loops ending alike."""

import pytest

from support import ROOT, load_script

TOY = ["model.d_model=16", "model.n_heads=2", "model.n_kv_heads=2", "model.n_layers=1",
       "model.d_ff=16", "data.max_length=32", "data.batch_size=2"]  # fmt: skip


@pytest.mark.slow
def test_both_loops_end_in_the_same_weights(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = load_script("trainer_overhead")
    seconds = script.measure(2, 3, TOY)  # raises where they do not
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert "0.500 of its speed" in script.table_of({"Trainer": [2.0], "bare loop": [1.0]}, 1)


@pytest.mark.slow
def test_a_loop_that_does_less_is_told(monkeypatch):
    script = load_script("trainer_overhead")
    monkeypatch.setattr(script, "_bare_loop", lambda *_: 0.0)
    with pytest.raises(AssertionError, match="not close"):
        script.measure(1, 3, TOY)
