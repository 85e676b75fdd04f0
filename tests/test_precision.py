import logging

import pytest
import torch

from causal_lm import precision
from support.runs import short_run


@pytest.fixture(params=["avx512_bf16", "amx_bf16", None])
def instruction(request, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    flags = {"avx2": True, "amx_bf16": False} | ({request.param: True} if request.param else {})
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    return request.param


def test_auto_takes_bf16_only_where_it_is_not_emulated(instruction, caplog):
    caplog.set_level(logging.INFO)
    chosen = "bf16-mixed" if instruction else "32-true"
    assert precision.resolve("auto", "cpu") == chosen
    assert len(caplog.records) == 1 and chosen in caplog.text


@pytest.mark.parametrize("given", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_a_given_precision_stays_and_an_emulated_one_is_warned_about(instruction, given, caplog):
    assert precision.resolve(given, "auto") == given
    warned = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warned) == ("bf16" in given and not instruction)


def test_a_gpu_decides_for_itself(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for supported, chosen in ((True, "bf16-mixed"), (False, "32-true")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda answer=supported, **_: answer)
        assert precision.resolve("auto", "gpu") == chosen


def test_a_run_records_what_was_chosen(tmp_path):
    short_run(tmp_path, "trainer.precision=auto", "trainer.max_steps=2")
    kept = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert kept["causal_lm_config"]["trainer"]["precision"] != "auto"
