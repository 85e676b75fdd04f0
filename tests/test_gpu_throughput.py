"""The benchmark of a GPU, here on a CPU at toy size: its formula, its figures, its table."""

from argparse import Namespace
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from support import ROOT, load_script
from support.models import NANOGPT

SIZES = ["model.d_model=16", "model.n_layers=2", "model.n_heads=2", "model.n_kv_heads=1",
         "model.d_ff=24"]  # fmt: skip


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return load_script("gpu_throughput")


def test_flops_by_hand(script):
    """Two documents of 3 and 1 tokens, 10 parameters, 2 layers of width 4.

    Products of the causal half: 3 · 3 / 2 + 1 / 2 = 5 pairs, each of 4 multiplications for the
    score and 4 for the values: 2 · 2 · 4 · 5 = 80 operations a layer forward, twice that backward.
    """
    assert script.model_flops(10, 2, 4, [3, 1]) == 6 * 10 * 4 + 2 * 80 * 3
    assert script.model_flops(10, 0, 4, [3, 1]) == script.model_flops(10, 0, 4, [2, 2])


def test_flops_of_the_matrix_products_are_those_that_torch_counts(script):
    """Of a linear model: torch's own counter, forward and backward, but for the first layer's
    inputs, whose gradient nobody needs."""
    from torch.utils.flop_counter import FlopCounterMode

    layers = torch.nn.Sequential(*(torch.nn.Linear(8, 8, bias=False) for _ in range(3)))
    with FlopCounterMode(display=False) as counter:
        layers(torch.randn(5, 8)).sum().backward()
    skipped = 2 * 5 * 8 * 8
    size = script.used_parameters(layers, ())
    assert script.model_flops(size, 0, 8, [5]) == counter.get_total_flops() + skipped


@pytest.mark.parametrize("peak", [None, 0.05])
def test_a_measurement_at_toy_size(script, peak, tmp_path):
    (tmp_path / "model.py").write_text(NANOGPT)
    args = Namespace(
        overrides=SIZES, row=32, batch=2, vocab=50, warmup=1, rounds=3, steps=2, compile=False,
        peak=peak, device="cpu", nanogpt=tmp_path, json=None,
    )  # fmt: skip
    result = script.measure(args, "a machine", lambda _: nullcontext(SimpleNamespace(mib=7.0)))
    assert result["peak_tflops"] == peak
    ours, theirs = result["models"]["ours, packed"], result["models"]["nanoGPT, stream"]
    # Table and head are one; a layer: q, k, v and out; gate, up and down; two norms.
    layer = 16 * (16 + 2 * 8) + 16 * 16 + 3 * 16 * 24 + 2 * 16
    assert ours["parameters"] == 50 * 16 + 2 * layer + 16
    assert theirs["parameters"] == 50 * 16  # without the positions, which are only looked up
    for found in (ours, theirs):
        assert len(found["tokens_per_second"]) == 3 and min(found["tokens_per_second"]) > 0
        assert found["peak_mib"] == 7.0
    # 2 steps of 64 tokens each, in rows of 32: FLOPs per token of the stream are a constant.
    each = 6 * theirs["parameters"] + 6 * 2 * 16 * 32
    rates = zip(theirs["tflops"], theirs["tokens_per_second"], strict=True)
    assert [t * 1e12 / rate for t, rate in rates] == pytest.approx([each] * 3)
    rows = script.table_of(result).splitlines()
    assert rows[2].startswith("| ours, packed | ") and ("%" in rows[2]) == (peak is not None)


def test_pad_does_not_count(script):
    """Documents in packed rows: tokens and FLOPs are those of the documents."""
    lengths, args = [20, 20, 31], Namespace(vocab=50, row=32, batch=4, device="cpu")
    args.compile, args.warmup = False, 0
    documents = [script.Document(torch.ones(n, dtype=torch.int64), None) for n in lengths]
    cfg = script.config.load(["model=llama_124m", *SIZES])
    memory = SimpleNamespace(mib=0.0)
    ours = script._ours(cfg, documents, args, lambda _: nullcontext(memory))
    assert ours.step() == (71, script.model_flops(ours.parameters, 2, 16, lengths))


def test_the_peak_is_that_of_the_device(script):
    names = {"NVIDIA H100 PCIe, torch 2.13": 756, "NVIDIA H100 80GB HBM3": 989, "CPU": None}
    peaks = script.PEAK_TFLOPS.items()
    found = {name: next((t for part, t in peaks if part in name), None) for name in names}
    assert found == names
