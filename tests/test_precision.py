import logging
import re
import time

import pytest
import torch
from omegaconf import OmegaConf

from causal_lm import precision
from support.runs import short_run


@pytest.fixture(params=["avx512_bf16", "amx_bf16", "avx512_fp16", None])
def instruction(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    flags = {"avx2": True, "amx_bf16": False} | ({request.param: True} if request.param else {})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    return request.param


def has_bf16(instruction):
    return instruction in ("avx512_bf16", "amx_bf16")


def test_auto_takes_bf16_only_where_it_is_not_emulated(instruction, caplog):
    caplog.set_level(logging.INFO)
    chosen = "bf16-mixed" if has_bf16(instruction) else "32-true"
    assert precision.resolve("auto", "cpu") == chosen
    assert len(caplog.records) == 1 and chosen in caplog.text


def warnings_with_a_factor(caplog):
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    found = [re.search(r"trainer\.precision=(\S+) .* (\d+\.\d) times", text) for text in warned]
    return [(match[1], float(match[2])) for match in found]


@pytest.mark.parametrize("given", ["32-true", "bf16-mixed", "bf16-true", "16-true", "64-true", 32])
def test_a_given_precision_stays_and_an_emulated_one_is_warned_about(instruction, given, caplog):
    assert precision.resolve(given, "auto") == given
    emulated = "bf16" in str(given) and not has_bf16(instruction)
    emulated |= given == "16-true" and instruction != "avx512_fp16"
    warned = warnings_with_a_factor(caplog)
    assert [name for name, _ in warned] == [given] * emulated
    assert all(factor > 0 for _, factor in warned)


@pytest.mark.parametrize("given", ["16-mixed", 16])
def test_mixed_float16_is_mixed_bfloat16_on_a_cpu(instruction, given, caplog):
    caplog.set_level(logging.INFO)
    assert precision.resolve(given, "auto") == "bf16-mixed"
    assert f"trainer.precision={given}: bf16-mixed" in caplog.records[0].getMessage()
    warned = warnings_with_a_factor(caplog)
    assert [name for name, _ in warned] == ["bf16-mixed"] * (not has_bf16(instruction))


def test_the_factor_is_that_of_the_products(monkeypatch):
    """Where a product in bfloat16 takes four times as long as in float32."""

    def slow_product(a, _):
        time.sleep(0.08 if a.dtype == torch.bfloat16 else 0.02)

    monkeypatch.setattr(torch.Tensor, "__matmul__", slow_product)
    assert 2 < precision.emulation_factor(torch.bfloat16, "cpu") < 6


def test_a_gpu_decides_for_itself(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported, chosen in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda answer=supported, **_: answer)
        assert precision.resolve("auto", "gpu") == chosen
    for given in ("16-mixed", "16-true"):
        assert precision.resolve(given, "gpu") == given
    assert not warnings_with_a_factor(caplog)


@pytest.mark.parametrize("given", ["auto", "16-mixed"])
def test_a_run_records_what_it_trains_in(given, tmp_path):
    """In both configurations; and AdamW is fused, as the gradients need no scaler."""
    short_run(tmp_path, f"trainer.precision={given}", "trainer.max_steps=2")
    kept = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    recorded = kept["causal_lm_config"]["trainer"]["precision"]
    assert recorded == OmegaConf.load(tmp_path / "config.yaml").trainer.precision
    assert recorded in (("bf16-mixed", "32-true") if given == "auto" else ("bf16-mixed",))
    assert kept["optimizer_states"][0]["param_groups"][0]["fused"] is True
