"""The same documents give the same step, however they are batched."""

import logging
from dataclasses import replace

import lightning as L
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import MixedPrecision
from torch.utils.data import DataLoader

from causal_lm import objective
from causal_lm.data.collate import Collate
from causal_lm.data.documents import Document
from causal_lm.objective import LossConfig
from support import PAD, V, make_batch, make_documents, make_module

LENGTHS = (12, 2, 11, 3)
REDUCTIONS = [LossConfig("token"), LossConfig("sequence"), LossConfig("padded", 16)]


def micro_batches(sizes, documents=None, **layout):
    """The four documents in micro-batches of these sizes."""
    documents, batches, start = documents or make_documents(LENGTHS), [], 0
    for size in sizes:
        batches.append(Collate(PAD, V, **layout)(documents[start : start + size]))
        start += size
    return batches


def fit(batches, accumulate, steps=2, loss=None, plugin=None, **sgd):
    """Steps of SGD on these micro-batches."""
    module = make_module(loss=loss)
    module.make_optimizer = lambda p: torch.optim.SGD(p, **{"lr": 0.1} | sgd)
    trainer = L.Trainer(
        max_steps=steps, max_epochs=-1, accumulate_grad_batches=accumulate, accelerator="cpu",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, plugins=plugin,
        enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return module, trainer


def flat(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def difference(parts, whole):
    """Relative to the way that training went."""
    way = flat(whole) - flat(make_module())
    assert float(way.norm()) > 0.01  # it moved
    return float((flat(parts) - flat(whole)).norm() / way.norm())


@pytest.mark.parametrize("loss", REDUCTIONS, ids=lambda loss: loss.reduction)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2), (3, 1)])
def test_accumulation_is_exact(sizes, loss):
    whole, trainer = fit(micro_batches([4]), 1, loss=loss)
    parts, other = fit(micro_batches(sizes), len(sizes), loss=loss)
    assert difference(parts, whole) < 1e-5
    expected = float(trainer.callback_metrics["train/loss"])
    assert float(other.callback_metrics["train/loss"]) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("loss", REDUCTIONS, ids=lambda loss: loss.reduction)
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2)])
def test_the_gradient_of_uneven_parts_is_that_of_the_whole(sizes, loss):
    documents = make_documents((32, 2, 30, 3))
    gradients = []
    for batches in (micro_batches([4], documents), micro_batches(sizes, documents)):
        module = make_module(loss=loss, max_positions=32)
        module.accumulated_loss(*batches).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    whole, parts = gradients
    assert float((parts - whole).norm()) <= 1e-6 * float(whole.norm())


def test_reductions_are_not_each_other():
    """The guard of the test above."""
    gradients = []
    for loss in REDUCTIONS:
        module = make_module(loss=loss)
        module.accumulated_loss(make_batch(LENGTHS)).backward()
        gradient = torch.cat([p.grad.flatten() for p in module.parameters()])
        gradients.append(gradient / gradient.norm())
    token, sequence, padded = gradients
    assert float((token - sequence).norm()) > 0.1
    assert float((token - padded).norm()) < 1e-5  # the same direction, a shorter step


def test_a_last_window_that_is_shorter_is_not_scaled_down():
    """Four micro-batches in windows of three: the second window holds one."""
    shorter, _ = fit(micro_batches((1, 1, 1, 1)), 3)
    module = make_module()
    documents = make_documents(LENGTHS)
    for window in (documents[:3], documents[3:]):
        module.zero_grad()
        module.accumulated_loss(Collate(PAD, V)(window)).backward()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter -= 0.1 * parameter.grad
    assert difference(shorter, module) < 1e-5


def test_a_mean_of_means_would_differ():
    """The guard of the tests above: what they exclude is not what they would see anyway."""
    module = make_module()
    of_all = module.accumulated_loss(make_batch(LENGTHS))
    means = [module.accumulated_loss(part) for part in micro_batches((1, 1, 1, 1))]
    assert abs(float((sum(means) / 4 - of_all).detach())) > 1e-3


def test_a_window_in_which_nothing_counts_is_a_skipped_step(caplog):
    """Neither momentum nor weight decay moves the weights; the log says so; training goes on."""
    first, _ = fit(micro_batches([4]), 1, steps=1, momentum=0.9, weight_decay=0.1)
    nothing = make_batch((0, 0))
    assert (nothing.document_ids == -1).all()
    with caplog.at_level(logging.WARNING, logger="causal_lm.module"):
        second, trainer = fit(
            [*micro_batches([4]), nothing], 1, steps=2, momentum=0.9, weight_decay=0.1
        )
    assert trainer.global_step == 2
    assert torch.equal(flat(first), flat(second))
    assert "step 1 is skipped" in caplog.text
    third, _ = fit([*micro_batches([4]), nothing], 1, steps=3, momentum=0.9, weight_decay=0.1)
    assert torch.isfinite(flat(third)).all() and not torch.equal(flat(third), flat(second))


def test_half_precision_scaler_sees_the_same_step():
    """float16 with its loss scaler: no step is lost to a sum that is too large, and clipping and
    division act on unscaled gradients."""
    scaler = torch.amp.GradScaler("cpu")
    batches = micro_batches((2, 2))
    half, trainer = fit(batches, 2, plugin=MixedPrecision("16-mixed", "cpu", scaler=scaler))
    assert trainer.precision == "16-mixed"
    assert scaler.get_scale() == 2.0**16  # it never had to back off
    whole, _ = fit(batches, 2)
    assert 0 < difference(half, whole) < 0.02


# ---- layouts ----


@settings(max_examples=30)
@given(
    st.lists(st.integers(2, 12), min_size=1, max_size=7),
    st.sampled_from(REDUCTIONS),
    st.sampled_from(["left", "right"]),
    st.integers(12, 16),
)
def test_packed_is_padded(lengths, loss, side, row_length):
    """Loss and gradient of the same documents, in rows of their own and packed."""
    gradients, losses = [], []
    for layout in ({}, {"row_length": row_length, "padding_side": side}):
        batch = make_batch(lengths, **layout)
        module = make_module(loss=loss).double()
        value = module.accumulated_loss(batch)
        value.backward()
        losses.append(float(value.detach()))
        gradients.append(torch.cat([p.grad.flatten() for p in module.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert float((gradients[1] - gradients[0]).norm()) <= 1e-6 * float(gradients[0].norm())


def test_packed_is_padded_in_float32():
    whole, _ = fit(micro_batches([4]), 1)
    packed, _ = fit(micro_batches([4], row_length=16), 1)
    assert len(micro_batches([4], row_length=16)[0].input_ids) == 2  # rows, for four documents
    assert difference(packed, whole) < 1e-5


def test_bf16_module_measures_in_full():
    """A module in bfloat16 throughout keeps its sums in float64: nothing rounds to 32,768."""
    module = make_module().to(torch.bfloat16)
    batch = make_batch((12,) * 4)
    for i in range(40):
        module.validation_step(batch, i)
    assert module.val_metric.nats.dtype == torch.float64
    assert int(module.val_metric.tokens) == 40 * 44
    assert float(module.val_metric.compute()["loss"]) == pytest.approx(
        float(objective.token_nll(module(batch), batch.labels).double().sum() / 44),
        rel=1e-6,
    )


# ---- prompts ----


def test_prompts_are_context_and_not_learned():
    """A masked token is no target, in any layout; what follows it still sees it."""
    documents = [
        Document(d.tokens, torch.arange(len(d.tokens)) >= k)
        for d, k in zip(make_documents(LENGTHS), (5, 1, 3, 1), strict=True)
    ]
    module = make_module()
    losses = []
    for layout in ({}, {"row_length": 16}, {"padding_side": "left"}):
        (batch,) = micro_batches([4], documents, **layout)
        assert int((batch.labels != objective.IGNORE).sum()) == 7 + 1 + 8 + 2
        losses.append(float(module.accumulated_loss(batch).detach()))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    free = replace(batch, loss_mask=None)
    labels = free.labels
    assert int((labels != objective.IGNORE).sum()) == sum(LENGTHS) - 4
    assert losses[0] != pytest.approx(float(module.accumulated_loss(free).detach()), rel=1e-3)
