"""Optimizer factories, the rule for the learning rate, and Muon beside AdamW as one optimizer."""

import io
import logging

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from causal_lm import config
from causal_lm.build import instantiate, make_optimizer
from causal_lm.optim import optimizers
from causal_lm.optim.parameter_groups import WITHOUT_DECAY, assert_complete, parameter_groups
from support import make_batch, make_model, make_module
from support.models import make

OPTIONS = {"muon_lr": 0.02, "muon_momentum": 0.95, "lr": 0.01, "weight_decay": 0.1}


def muon(model, **options):
    return optimizers.muon(parameter_groups(model), **OPTIONS, **options)


@pytest.mark.parametrize("kind", ["adamw", "adam", "sgd", "muon"])
@pytest.mark.parametrize("name", ["llama", "llama_tied", "gru"])
def test_every_parameter_is_stepped_once(name, kind):
    model = make(name)
    options = OPTIONS if kind == "muon" else {"lr": 0.01, "weight_decay": 0.1}
    optimizer = getattr(optimizers, kind)(parameter_groups(model), **options)
    assert_complete(model, optimizer.param_groups)
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0 if group["role"] in WITHOUT_DECAY else 0.1)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "gru"])
def test_muon_takes_the_hidden_matrices_alone(name):
    first, *rest = muon(make(name)).param_groups
    assert (first["role"], first["lr"], first["momentum"]) == ("hidden_matrix", 0.02, 0.95)
    assert rest and all(group["lr"] == 0.01 and "betas" in group for group in rest)


def width(channels):
    return parameter_groups(nn.Embedding(3, channels))


def test_auto_lr_follows_the_width_of_the_embedding(caplog):
    with caplog.at_level(logging.INFO, logger="causal_lm.optim"):
        assert optimizers.peak_lr("auto", width(768)) == pytest.approx(2.165e-4, rel=1e-3)
    assert "optimizer.lr" in caplog.text and "768" in caplog.text
    assert optimizers.peak_lr("auto", parameter_groups(make_model())) == pytest.approx(1.5e-3)
    assert optimizers.peak_lr(0.3, width(768)) == 0.3


def test_auto_lr_of_a_frozen_embedding_follows_the_head():
    model = make_model()
    for table in (model.token_embedding, model.position_embedding):
        table.weight.requires_grad_(False)
    assert optimizers.peak_lr("auto", parameter_groups(model)) == pytest.approx(1.5e-3)
    with pytest.raises(ValueError, match=r"optimizer\.lr"):
        optimizers.peak_lr("auto", parameter_groups(nn.Linear(2, 2)))


# ---- Muon and AdamW as one ----


def train(module, optimizer, steps, start=0):
    """Steps on batches that are a function of the step."""
    for step in range(start, start + steps):
        optimizer.zero_grad()
        module.accumulated_loss(make_batch(seed=step)).backward()
        optimizer.step()


def test_combined_equals_both_of_torch(monkeypatch):
    monkeypatch.setattr(optimizers, "has_instructions", lambda *_: True)
    combined, apart = make_module(), make_module()
    train(combined, muon(combined.model, betas=(0.9, 0.95)), 5)

    named = list(apart.named_parameters())
    hidden = [p for n, p in named if "blocks" in n and p.dim() == 2]
    head = [p for n, p in named if "head" in n]
    rest = [p for n, p in named if p.dim() == 1 or "embedding" in n]
    both = (
        torch.optim.Muon(hidden, lr=0.02, weight_decay=0.1),
        torch.optim.AdamW(head, lr=0.01, betas=(0.9, 0.95), weight_decay=0.1),
        torch.optim.AdamW(rest, lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
    )
    for step in range(5):
        for optimizer in both:
            optimizer.zero_grad()
        apart.accumulated_loss(make_batch(seed=step)).backward()
        for optimizer in both:
            optimizer.step()
    for one, other in zip(combined.parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4, 12), (12, 4)])
def test_muon_is_exact_where_bfloat16_is_emulated(shape, monkeypatch):
    """A step of float32 is that of float64; torch's, in bfloat16, is near it."""
    weight, grad = (torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    steps = []
    for supported in (False, True):
        monkeypatch.setattr(optimizers, "has_instructions", lambda *_, answer=supported: answer)
        parameter = nn.Parameter(weight.clone())
        parameter.grad = grad.clone()
        optimizers.Muon([parameter], lr=1.0, momentum=0.0, weight_decay=0.0).step()
        steps.append((weight - parameter.detach()).double())
    x = (grad if shape[0] <= shape[1] else grad.T).double()
    x = x / x.norm()
    a, b, c = 3.4445, -4.775, 2.0315
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    expected = x if shape[0] <= shape[1] else x.T
    expected = expected * max(1, shape[0] / shape[1]) ** 0.5
    errors = [float((step - expected).norm() / expected.norm()) for step in steps]
    assert errors[0] < 1e-5 and 1e-4 < errors[1] < 5e-2


@pytest.mark.parametrize("fused", [False, True])
def test_combined_resumes_as_if_never_stopped(fused):
    """Through a file that holds plain data alone, with a schedule over both peaks."""

    def make(module):
        optimizer = muon(module.model, fused=fused)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def steps(module, optimizer, schedule, few):
        for step in few:
            train(module, optimizer, 1, start=step)
            schedule.step()

    whole, stopped = make_module(), make_module()
    steps(whole, *make(whole), range(6))
    optimizer, schedule = make(stopped)
    steps(stopped, optimizer, schedule, range(3))
    assert {g["lr"] for g in optimizer.param_groups} == {0.02 / 4, 0.01 / 4}
    file = io.BytesIO()
    torch.save([o.state_dict() for o in (stopped, optimizer, schedule)], file)
    file.seek(0)

    resumed = make_module(seed=1)
    optimizer, schedule = make(resumed)
    saved = torch.load(file, weights_only=True)
    for part, state in zip((resumed, optimizer, schedule), saved, strict=True):
        part.load_state_dict(state)
    assert len(optimizer.state) == len(list(resumed.parameters()))
    steps(resumed, optimizer, schedule, range(3, 6))
    for one, other in zip(resumed.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_closure_runs_once_and_gradients_go():
    module, calls = make_module(), []
    optimizer = muon(module.model)

    def closure():
        calls.append(1)
        loss = module.accumulated_loss(make_batch())
        loss.backward()
        return loss

    with torch.no_grad():
        assert float(optimizer.step(closure)) > 0
    assert calls == [1]
    optimizer.zero_grad()
    assert all(p.grad is None for p in module.parameters())


def test_muon_needs_a_matrix():
    with pytest.raises(ValueError, match="optimizer=adamw"):
        muon(nn.Embedding(3, 2))


# ---- from the configuration ----


@pytest.mark.parametrize(
    ("precision", "fused"), [("32-true", True), ("bf16-mixed", True), ("16-mixed", False)]
)
@pytest.mark.parametrize("kind", ["adamw", "adam", "muon"])
def test_fused_where_clipping_sees_unscaled_gradients(kind, precision, fused):
    cfg = config.load([f"optimizer={kind}", f"trainer.precision={precision}"])
    optimizer = make_optimizer(cfg)(parameter_groups(make_model()))
    assert optimizer.param_groups[-1]["fused"] is fused
    with pytest.raises(config.ConfigError, match=r"optimizer\.fused=true cannot clip"):
        config.load([f"optimizer={kind}", "optimizer.fused=true", "trainer.precision=16-mixed"])


def test_an_optimizer_of_torch_needs_nothing_but_a_yaml(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("_target_: torch.optim.AdamW\n_partial_: true\nlr: 0.1\nweight_decay: 0.2\n")
    model = make_model()
    optimizer = instantiate(OmegaConf.load(path))(parameter_groups(model))
    assert type(optimizer) is torch.optim.AdamW
    assert_complete(model, optimizer.param_groups)
    assert {g["role"]: g["weight_decay"] for g in optimizer.param_groups} == {
        "hidden_matrix": 0.2, "head": 0.2, "embedding": 0.0, "norm_or_bias": 0.0,
    }  # fmt: skip
