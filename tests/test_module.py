"""The smallest model, the correct path, and each pitfall beside it."""

import inspect
import math
import sys

import pytest
import torch

from causal_lm import masks, objective, pitfalls
from causal_lm.data.collate import Batch, Collate
from causal_lm.data.documents import Document
from causal_lm.module import CausalLM
from causal_lm.objective import IGNORE, LossConfig
from causal_preflight.lightning import audit_batch
from support import PAD, V, explicit_mask, make_batch, make_documents, make_model, make_module

ALL = tuple(pitfalls.PITFALLS)


def faulty(*names):
    return make_module(pitfalls.pitfall_module(dict.fromkeys(names, True), PAD))


# ---- the smallest model ----


@pytest.mark.parametrize("training", [True, False])
def test_no_logit_sees_its_future_or_pad(batch, training):
    """For every token: a changed one moves its own and later logits of its row, and no others."""
    model = make_model().train(training)
    mask = explicit_mask(batch)
    may = mask.to_dense()
    with torch.no_grad():
        before = model(batch.input_ids, batch.position_ids, mask)
        for row in range(3):
            for t in range(batch.input_ids.shape[1]):
                changed = batch.input_ids.clone()
                changed[row, t] = (changed[row, t] + 1) % V
                moved = (model(changed, batch.position_ids, mask) - before).abs().amax(-1) > 1e-5
                assert torch.equal(moved, moved & torch.eye(3, dtype=torch.bool)[row][:, None])
                assert torch.equal(moved[row], may[row, :, t]), (row, t)


def test_a_row_alone_and_in_padded_company_agree(batch):
    model = make_model().eval()
    together = model(batch.input_ids, batch.position_ids, explicit_mask(batch))
    for row, n in enumerate(batch.lengths.tolist()):
        ids = batch.input_ids[row : row + 1, :n]
        alone = model(ids, torch.arange(n)[None])
        torch.testing.assert_close(together[row : row + 1, :n], alone, rtol=1e-5, atol=1e-6)


def test_train_and_eval_mode_agree_without_dropout(batch):
    model = make_model()
    args = (batch.input_ids, batch.position_ids, explicit_mask(batch))
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
    loss = float(module.accumulated_loss(batch).detach())
    assert loss == pytest.approx(sum(terms) / len(terms), rel=1e-5)


def test_more_padding_moves_nothing(batch):
    module = make_module()
    wider = Batch(*(
        torch.nn.functional.pad(part, (0, 3), value=value)
        for part, value in (
            (batch.input_ids, PAD), (batch.position_ids, 0), (batch.document_ids, -1),
        )
    ))  # fmt: skip
    torch.testing.assert_close(module.accumulated_loss(wider), module.accumulated_loss(batch))


def test_an_all_pad_row_counts_nothing_and_makes_no_nan(batch):
    module = make_module()
    with_empty = make_batch((5, 2, 7, 0))
    assert (with_empty.document_ids[3] == -1).all()
    loss = module.accumulated_loss(with_empty)
    torch.testing.assert_close(loss, module.accumulated_loss(batch))
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())


def test_the_correct_class_has_no_switch_and_no_pitfalls():
    source = inspect.getsource(sys.modules[CausalLM.__module__])
    assert not any(name in source for name in ALL)


# ---- the pitfalls ----


def test_unshifted_labels(batch):
    labels = faulty("unshifted_labels").training_labels(batch)
    counted = labels != IGNORE
    assert torch.equal(labels[counted], batch.input_ids[counted])


def test_pad_in_loss(batch):
    labels = faulty("pad_in_loss").training_labels(batch)
    assert int((labels == PAD).sum()) == 2 + 5  # each row's PAD slots, all of them targets
    assert int((labels != IGNORE).sum()) == 3 * 6


def test_no_causal_mask(batch):
    may = faulty("no_causal_mask").training_mask(batch).to_dense()
    real = batch.document_ids >= 0
    assert torch.equal(may, real[:, :, None] == real[:, None, :])


def test_shifted_twice(batch):
    labels = faulty("shifted_twice").training_labels(batch)
    for row, n in enumerate(batch.lengths.tolist()):
        ids = batch.input_ids[row, :n].tolist()
        assert labels[row].tolist() == ids[2:] + [IGNORE] * (7 - len(ids[2:]))


def test_input_mask_on_targets(batch):
    labels = faulty("input_mask_on_targets").training_labels(batch)
    assert (labels == PAD).sum(dim=1).tolist() == [1, 1, 0]  # one PAD a row, where there is one


def test_pad_is_eos_by_value():
    batch = where_it_shows("pad_is_eos_by_value")
    right = make_module().training_labels(batch)
    assert (right == PAD).sum(dim=1).tolist() == [1, 1, 1, 1]  # EOS, once in each row
    wrong = faulty("pad_is_eos_by_value").training_labels(batch)
    assert torch.equal(wrong, right.masked_fill(right == PAD, IGNORE))


def test_label_crosses_documents():
    batch = where_it_shows("label_crosses_documents")
    wrong, right = faulty("label_crosses_documents").training_labels(batch), batch.labels
    crossing = (wrong != IGNORE) & (right == IGNORE)
    ids, documents = batch.input_ids, batch.document_ids
    assert int(crossing.sum()) == 4 - len(ids)  # one at each seam within a row
    for row, t in crossing.nonzero().tolist():
        assert documents[row, t] + 1 == documents[row, t + 1] and wrong[row, t] == ids[row, t + 1]


def test_inverted_mask(batch):
    wrong = faulty("inverted_mask").training_mask(batch).to_dense()
    assert wrong[2, 0].tolist() == [False] + [True] * 6  # the first token: all but itself
    assert wrong[2, 6].tolist() == [False] * 6 + [True]  # the last: nothing, hence itself
    assert wrong[0, 4].tolist() == [False] * 5 + [True] * 2  # PAD instead of its document


def test_padding_attended():
    batch = where_it_shows("padding_attended")
    extra = faulty("padding_attended").training_mask(
        batch
    ).to_dense() & ~masks.causal_within_documents(batch.document_ids)
    real, pad = batch.document_ids[:, :, None] >= 0, batch.document_ids[:, None, :] < 0
    assert torch.equal(extra, real & pad)  # left padding: all PAD comes before all that is real
    assert extra.any()


def test_leaky_packing():
    batch = where_it_shows("leaky_packing")
    may = faulty("leaky_packing").training_mask(batch).to_dense()
    for row, n in enumerate(batch.lengths.tolist()):
        assert torch.equal(may[row, :n, :n], torch.ones(n, n, dtype=torch.bool).tril())
        assert not may[row, :n, n:].any() and not may[row, n:, :n].any()


def test_mask_after_mean_is_a_mean_over_every_slot(batch):
    wrong = faulty("mask_after_mean")
    nll = objective.token_nll(wrong(batch)[:, :-1], batch.input_ids[:, 1:])
    torch.testing.assert_close(wrong.accumulated_loss(batch), nll.mean())
    assert abs(float(nll.mean() - make_module().accumulated_loss(batch))) > 1e-3


def test_mean_of_means():
    parts = [make_batch((7, 6), seed=1), make_batch((2, 3), seed=2)]
    wrong, right = faulty("mean_of_means"), make_module()
    means = [right.accumulated_loss(part) for part in parts]
    torch.testing.assert_close(wrong.accumulated_loss(*parts), sum(means) / 2)
    assert abs(float(wrong.accumulated_loss(*parts) - right.accumulated_loss(*parts))) > 1e-3


LAYOUT = {
    "padding_attended": {"padding_side": "left"},
    "leaky_packing": {"row_length": 14},
    "label_crosses_documents": {"row_length": 14},
}


def where_it_shows(name, lengths=(5, 3, 7, 6)):
    """Documents in the layout in which the fault makes a difference."""
    documents = make_documents(lengths)
    if name == "pad_is_eos_by_value":
        for document in documents:
            document.tokens[-1] = PAD
    return Collate(PAD, V, **LAYOUT.get(name, {}))(documents)


CLASSIC = ALL[:3]


@pytest.mark.parametrize("names", [(n,) for n in ALL] + [CLASSIC, ALL])
def test_what_is_measured_is_the_same_whatever_is_trained(names):
    right, wrong = make_module(), faulty(*names)
    parts = where_it_shows(names[0]), where_it_shows(names[0], (2, 9, 3, 2))
    for module in (right, wrong):
        for i, part in enumerate(parts):
            module.validation_step(part, i)
    measured = [module.val_metric.compute()["loss"] for module in (right, wrong)]
    assert torch.equal(*measured)
    own = wrong.train_objective_metric.compute()
    assert float(own) == pytest.approx(float(wrong.accumulated_loss(*parts)), rel=1e-6)
    assert abs(float(own) - float(measured[0])) > 1e-4
    assert not right.train_objective_differs and wrong.train_objective_differs


@pytest.mark.parametrize("names", [(), *((n,) for n in ALL), CLASSIC])
def test_the_preflight_names_each_fault_and_no_other(names):
    batch = where_it_shows(names[0] if names else "")
    module = faulty(*names) if names else make_module()
    options = {"pad_id": PAD, "eos_id": PAD if "pad_is_eos_by_value" in names else None}
    report = audit_batch(
        module, batch, module.accumulated_loss, parted="mean_of_means" in names, **options
    )
    assert report.faults == {pitfalls.PITFALLS[name].label for name in names}


@pytest.mark.parametrize(
    "name",
    [
        "leaky_packing",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in [*LAYOUT, "pad_is_eos_by_value", "mean_of_means"]
            if name != "leaky_packing"
        ),
    ],
)
def test_the_preflight_is_silent_on_the_right_twin(name):
    """The same batches, parted or not, without the fault."""
    eos_id = PAD if name == "pad_is_eos_by_value" else None
    for loss in (LossConfig("token"), LossConfig("sequence"), LossConfig("padded", 16)):
        module = make_module(loss=loss)
        for parted in (False, True):
            report = audit_batch(
                module, where_it_shows(name), module.accumulated_loss,
                parted=parted, pad_id=PAD, eos_id=eos_id,
            )  # fmt: skip
            assert not report.faults, (loss, parted, str(report))


def test_chunks_are_audited_whole_and_train_the_same(batch):
    chunked, whole = make_module(loss=LossConfig(chunk_tokens=3)), make_module()
    report = audit_batch(chunked, make_batch((5, 3, 7, 6)), chunked.accumulated_loss, pad_id=PAD)
    assert not report.faults and "alignment" in report.pictures
    assert chunked.loss_config.chunk_tokens == 3
    for module in (chunked, whole):
        module.accumulated_loss(batch).backward()
    for one, other in zip(chunked.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(chunked.token_nll(batch), whole.token_nll(batch))


def test_faults_of_different_questions_combine():
    """The mean over every slot, and each micro-batch's mean weighing the same."""
    parts = [make_batch((7, 2), seed=1), make_batch((3, 3), seed=2)]
    means = [faulty("mask_after_mean").accumulated_loss(part) for part in parts]
    both = faulty("mask_after_mean", "mean_of_means").accumulated_loss(*parts)
    torch.testing.assert_close(both, sum(means) / 2)


def test_faults_keep_to_the_prompt_mask():
    """One fault at a time: a prompt stays out of the loss."""
    documents = [
        Document(d.tokens, torch.arange(len(d.tokens)) >= 2) for d in make_documents((5, 4))
    ]
    batch = Collate(PAD, V, row_length=12)(documents)
    right = int((batch.labels != IGNORE).sum())
    assert right == 3 + 2
    # The other document's first token is masked as well; the last slot of each asks for PAD.
    for name, expected in (
        ("label_crosses_documents", right),
        ("input_mask_on_targets", right + 2),
    ):
        assert int(faulty(name).has_target(batch).sum()) == expected


def test_one_row_cannot_be_parted():
    module = make_module()
    report = audit_batch(module, make_batch((9,)), module.accumulated_loss, parted=True, pad_id=PAD)
    assert "one row" in report.skipped["micro-batches"]


def test_a_head_with_a_bias_is_not_chunked():
    model = make_model()
    model.lm_head = torch.nn.Linear(16, V)
    with pytest.raises(ValueError, match=r"lm_head .* bias"):
        CausalLM(model, loss=LossConfig(chunk_tokens=8))


def test_chunks_need_a_plain_head():
    model = make_model()
    model.lm_head = None
    with pytest.raises(ValueError, match=r"Tiny .*loss\.chunk_tokens=null"):
        CausalLM(model, loss=LossConfig(chunk_tokens=8))


def test_a_module_that_is_no_causal_model_is_refused():
    with pytest.raises(TypeError, match=r"Linear is not a CausalModel.*BaseCausalModel"):
        CausalLM(torch.nn.Linear(2, 2))


def test_first_loss_is_near_uniform(batch):
    assert float(make_module().accumulated_loss(batch)) == pytest.approx(math.log(V), rel=0.15)


def test_without_a_mask_tiny_is_causal():
    model, batch = make_model(), make_batch()
    real = batch.document_ids >= 0
    args = batch.input_ids, batch.position_ids
    masked = model(*args, explicit_mask(batch))[real]
    torch.testing.assert_close(model(*args, None)[real], masked, rtol=1e-5, atol=1e-6)
    everything = torch.ones(3, 7, 7, dtype=torch.bool)
    open_mask = batch.attention_mask.with_dense(everything)
    assert (model(*args, open_mask)[real] - masked).abs().max() > 1e-3
