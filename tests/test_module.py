"""The seed model, the correct path, and each pitfall beside it."""

import inspect
import math
import sys

import pytest
import torch

from causal_lm import masks, objective, pitfalls
from causal_lm.callbacks.preflight import audit_batch
from causal_lm.data.collate import Batch
from causal_lm.module import CausalLM
from causal_lm.objective import IGNORE
from conftest import PAD, V, make_batch, make_model, make_module

ALL = tuple(pitfalls.PITFALLS)


def faulty(*names):
    return make_module(pitfalls.faulty(dict.fromkeys(names, True)))


def labels_of(module, batch):
    return objective.make_labels(module.targets(batch), module.counted(batch))


# ---- the seed model ----


@pytest.mark.parametrize("training", [True, False])
def test_no_logit_sees_its_future_or_pad(batch, training):
    """For every token: a changed one moves its own and later logits of its row, and no others."""
    model = make_model().train(training)
    may = masks.causal(batch.document_ids)
    with torch.no_grad():
        before = model(batch.input_ids, batch.position_ids, may)
        for row in range(3):
            for t in range(batch.input_ids.shape[1]):
                changed = batch.input_ids.clone()
                changed[row, t] = (changed[row, t] + 1) % V
                moved = (model(changed, batch.position_ids, may) - before).abs().amax(-1) > 1e-5
                assert torch.equal(moved, moved & torch.eye(3, dtype=torch.bool)[row][:, None])
                assert torch.equal(moved[row], may[row, :, t]), (row, t)


def test_a_row_alone_and_in_padded_company_agree(batch):
    model = make_model().eval()
    together = model(batch.input_ids, batch.position_ids, masks.causal(batch.document_ids))
    for row, n in enumerate(batch.lengths.tolist()):
        ids = batch.input_ids[row : row + 1, :n]
        alone = model(ids, torch.arange(n)[None], masks.causal(torch.zeros(1, n)))
        torch.testing.assert_close(together[row : row + 1, :n], alone, rtol=1e-5, atol=1e-6)


def test_train_and_eval_mode_agree_without_dropout(batch):
    model = make_model()
    args = (batch.input_ids, batch.position_ids, masks.causal(batch.document_ids))
    with torch.no_grad():
        torch.testing.assert_close(model.train()(*args), model.eval()(*args), rtol=1e-5, atol=1e-6)


def test_a_row_longer_than_the_positions_is_refused():
    with pytest.raises(ValueError, match=r"row of 17 tokens .* 16 positions.*model\.max_positions"):
        make_module()(make_batch((17,)))


def test_layers_do_not_start_as_copies_of_each_other():
    one, two = make_model().blocks.layers
    assert not torch.equal(one.linear1.weight, two.linear1.weight)


# ---- the correct path ----


def test_the_loss_is_the_mean_over_next_tokens(batch):
    module = make_module()
    logits = module(batch).log_softmax(-1)
    terms = [
        -float(logits.detach()[r, t, batch.input_ids[r, t + 1]])
        for r, n in enumerate(batch.lengths.tolist())
        for t in range(n - 1)
    ]
    assert len(terms) == 4 + 1 + 6
    loss = float(module.training_loss(batch).detach())
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_more_padding_moves_nothing(batch):
    module = make_module()
    wider = Batch(*(
        torch.nn.functional.pad(part, (0, 3), value=value)
        for part, value in zip(batch, (PAD, 0, -1), strict=True)
    ))  # fmt: skip
    torch.testing.assert_close(module.training_loss(wider), module.training_loss(batch))


def test_an_all_pad_row_counts_nothing_and_makes_no_nan(batch):
    module = make_module()
    with_empty = make_batch((5, 2, 7, 0))
    assert (with_empty.document_ids[3] == -1).all()
    loss = module.training_loss(with_empty)
    torch.testing.assert_close(loss, module.training_loss(batch))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_the_correct_class_has_no_switch_and_no_pitfalls():
    source = inspect.getsource(sys.modules[CausalLM.__module__])
    assert not any(name in source for name in ALL)


# ---- the pitfalls ----


def test_unshifted_labels(batch):
    labels = labels_of(faulty("unshifted_labels"), batch)
    counted = labels != IGNORE
    assert torch.equal(labels[counted], batch.input_ids[counted])


def test_pad_in_loss(batch):
    labels = labels_of(faulty("pad_in_loss"), batch)
    assert int((labels == PAD).sum()) == 2 + 5  # each row's PAD slots, all of them targets
    assert int((labels != IGNORE).sum()) == 3 * 6


def test_no_causal_mask(batch):
    may = faulty("no_causal_mask").may_attend(batch)
    real = batch.document_ids >= 0
    assert torch.equal(may, real[:, :, None] == real[:, None, :])


@pytest.mark.parametrize("names", [(n,) for n in ALL] + [ALL])
def test_what_is_measured_is_the_same_whatever_is_trained(names, batch):
    right, wrong = make_module(), faulty(*names)
    for module in (right, wrong):
        module.validation_step(batch, 0)
    measured = [module.val.compute()["loss"] for module in (right, wrong)]
    assert torch.equal(*measured)
    own = wrong.loss_as_trained(measured[0])
    assert float(own) == pytest.approx(float(wrong.training_loss(batch)), rel=1e-6)
    assert abs(float(own) - float(measured[0])) > 1e-3
    assert right.loss_as_trained(measured[0]) is measured[0]


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        ([], set()),
        (["unshifted_labels"], {"shift"}),
        (["pad_in_loss"], {"pad"}),
        (["no_causal_mask"], {"causal"}),
        (ALL, {"shift", "pad", "causal"}),
    ],
)
def test_the_preflight_names_each_fault_and_no_other(names, labels):
    module = faulty(*names) if names else make_module()
    report = audit_batch(module, make_batch((5, 3, 7, 6)), module.training_loss, pad_id=PAD)
    assert report.faults == labels
    assert labels == {pitfalls.PITFALLS[name].label for name in names}


def test_first_loss_is_near_uniform(batch):
    assert float(make_module().training_loss(batch)) == pytest.approx(math.log(V), rel=0.15)
