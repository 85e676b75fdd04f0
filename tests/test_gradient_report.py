"""The gradient report: figures by hand, its warning, and which steps it reports."""

import logging
import math

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from causal_lm.callbacks.gradient_report import GradientReport, layer_figures
from support import make_batch, make_module


def test_figures_by_hand():
    """Two blocks of a weight and a bias, one step of gradient descent at lr 0.5."""
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    model.frozen = nn.Linear(1, 1)
    before, gradients = [], [([[3.0, 0.0]], [-6.0]), ([[1.0, 1.0]], [4.0])]
    with torch.no_grad():
        for block, (of_weight, of_bias) in zip(model.blocks, gradients, strict=True):
            block.weight.copy_(torch.tensor([[3.0, 4.0]]))
            block.bias.copy_(torch.tensor([12.0]))  # the layer's norm is 13
            block.weight.grad, block.bias.grad = torch.tensor(of_weight), torch.tensor(of_bias)
        before = [p.clone() for p in model.parameters()]
        for parameter in model.blocks.parameters():
            parameter -= 0.5 * parameter.grad
    figures = layer_figures(model, before)
    assert figures.keys() == {"blocks.0", "blocks.1"}
    assert figures["blocks.0"] == pytest.approx((9 / 3, 0.5 * 45**0.5 / 13))
    assert figures["blocks.1"] == pytest.approx((6 / 3, 0.5 * 18**0.5 / 13))


class LoggedFigures(L.Callback):
    """Collects the logged figures of the report, by step."""

    def __init__(self):
        self.steps = {}

    def on_train_batch_end(self, trainer, *_):
        found = {k: float(v) for k, v in trainer.logged_metrics.items() if "gradient/" in k}
        if found:
            self.steps[trainer.global_step] = found


def fit(module, report, steps, accumulate=1, plugins=None):
    logged = LoggedFigures()
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, log_every_n_steps=1,
        enable_model_summary=False, callbacks=[report, logged],
        plugins=plugins,
    )  # fmt: skip
    trainer.fit(module, DataLoader([make_batch(seed=s) for s in range(8)], batch_size=None))
    return trainer, logged


@pytest.mark.parametrize("accumulate", [1, 2])
def test_reports_the_gradient_of_the_loss_every_few_steps(accumulate):
    module, report = make_module(), GradientReport(2)
    _, logged = fit(module, report, 4, accumulate)
    twin = make_module()
    twin.accumulated_loss(*(make_batch(seed=s) for s in range(accumulate))).backward()
    expected = twin.model.lm_head.weight.grad.abs().mean()
    assert logged.steps[1]["gradient/model.lm_head"] == pytest.approx(float(expected), rel=1e-4)
    gradients = [step["gradient/model.lm_head"] for _, step in sorted(logged.steps.items())]
    assert len(set(gradients)) == 2  # of steps 1 and 3; steps 2 and 4 are not reported
    assert report.weights_before is None  # the copy is freed


def test_a_starved_lowest_block_is_warned_about_once(caplog):
    module = make_module()
    module.model.blocks.layers[0].register_full_backward_pre_hook(
        lambda layer, gradients: tuple(g * 1e-3 for g in gradients)
    )
    with caplog.at_level(logging.INFO, logger="causal_lm.callbacks.gradient_report"):
        fit(module, GradientReport(1), 3)
    assert caplog.text.count("the gradient of model.blocks.layers.0 is ") == 1
    assert "model.blocks.layers.1:" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="causal_lm.callbacks.gradient_report"):
        fit(make_module(), GradientReport(1), 3)
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


def test_a_step_that_the_loss_scaler_skips_is_not_reported():
    module, report, calls = make_module(), GradientReport(1), []

    def break_second_call(layer, gradients):
        calls.append(len(calls))
        return tuple(g * float("nan") for g in gradients) if len(calls) == 2 else None

    module.model.lm_head.register_full_backward_pre_hook(break_second_call)
    scaler = torch.amp.GradScaler("cpu")
    _, logged = fit(module, report, 2, plugins=MixedPrecision("16-mixed", "cpu", scaler=scaler))
    assert len(calls) == 2 and scaler.get_scale() == 2.0**15
    assert logged.steps[1] and all(map(math.isfinite, logged.steps[1].values()))
    assert logged.steps[2] == logged.steps[1]
