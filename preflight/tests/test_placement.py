"""Logits and documents placed unusually, and losses that are no plain cross-entropy."""

import pytest
import torch
from torch import Tensor

from audit_cases import RIGHT
from audit_cases.objectives import OBJECTIVES, _Edited, distilled
from audit_cases.parts import EOS, PAD, Tiny, feed, packed, padded, targets, token_mean
from audit_cases.placement import PLACEMENT, Varlen, varlen, within
from causal_preflight import preflight
from causal_preflight.gradient_fit import fit
from causal_preflight.locate import first_column
from causal_preflight.parse_batch import documents_of, parse_batch, writer
from causal_preflight.report import UnexaminableError

torch.set_num_threads(1)
KNOWN = {"pad_id": PAD, "eos_id": EOS}
ALL_RIGHT = PLACEMENT.right | OBJECTIVES.right
ALL_FAULTY = PLACEMENT.faulty | OBJECTIVES.faulty
QUICK = {"last_k_unshifted", "cu_seqlens_not_masked", "distilled_ahead", "softmax_twice"}


def cases(names: dict) -> list:
    """Each case with seed 0; those that are not quick are slow."""
    slow = pytest.mark.slow
    return [
        pytest.param(name, seed, marks=[] if name in QUICK and not seed else slow)
        for name in names
        for seed in (0,)
    ]


@pytest.mark.parametrize(("name", "seed"), cases(ALL_RIGHT))
def test_a_right_set_up_raises_no_alarm(name: str, seed: int) -> None:
    model, batch, loss_fn, known = ALL_RIGHT[name](seed)
    report = preflight(model, batch, loss_fn, seed=seed, **known)
    assert report.clean, str(report)
    assert {"alignment", "future", "context"} <= set(report.passed), str(report)


@pytest.mark.parametrize(("name", "seed"), cases(ALL_FAULTY))
def test_a_fault_is_named_exactly(name: str, seed: int) -> None:
    label, _, build = ALL_FAULTY[name]
    model, batch, loss_fn, known = build(seed)
    report = preflight(model, batch, loss_fn, seed=seed, **known)
    assert report.faults == {label}, str(report)


def test_every_fault_has_a_right_twin() -> None:
    assert len(ALL_RIGHT) >= 40 and len(ALL_FAULTY) >= 40
    assert all(twin in ALL_RIGHT | RIGHT for _, twin, _ in ALL_FAULTY.values())


def boundaries(value: Tensor, name: str = "cu_seqlens", rows: int = 2) -> dict:
    """Two rows of eight tokens, PAD in the last two slots of the second, and `value`."""
    ids = torch.arange(3, 19).view(rows, -1).clone()
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask, name: value}


@pytest.mark.parametrize(
    ("value", "reversed_rows", "cut"),
    [
        ([0, 3, 8, 12, 14], [0, 4, 6, 9, 14], [0, 3, 4, 8]),  # PAD left out
        ([0, 3, 8, 12, 14, 16], [0, 4, 6, 8, 11, 16], [0, 3, 4, 8]),  # PAD is a document
        ([3, 5, 4, 2], [4, 2, 3, 5], [3, 1, 4]),
        ([0, 3, 8, 12, 14, 14, 14], [0, 4, 6, 9, 14, 14, 14], [0, 3, 4, 8, 8, 8, 8]),
        ([[3, 5, 0], [4, 2, 0]], [[4, 2, 0], [3, 5, 0]], [[3, 1, 0], [4, 0, 0]]),
        ([[0, 3, 8], [0, 4, 6]], [[0, 4, 6], [0, 3, 8]], [[0, 3, 4], [0, 4, 4]]),
    ],
)
def test_boundaries_follow_rows_and_columns(value: list, reversed_rows: list, cut: list) -> None:
    batch = parse_batch(boundaries(torch.tensor(value)), None, None)
    assert [(row[1:] != row[:-1])[row[1:] >= 0].sum() for row in batch.doc] == [1, 1]
    assert batch.rows([1, 0]).raw["cu_seqlens"].tolist() == reversed_rows
    assert batch.cols(0, 4).raw["cu_seqlens"].tolist() == cut
    assert batch.rows([0, 1]).raw["cu_seqlens"].dtype == batch.raw["cu_seqlens"].dtype


def test_numbers_that_state_no_documents_make_none() -> None:
    real = torch.ones(2, 8, dtype=torch.bool)
    for value in ([1, 2, 3], [8, 8], [0, 5, 9], [16]):
        assert documents_of({"n": torch.tensor(value)}, real) is None
    whole = torch.zeros(2, 8, dtype=torch.long)
    assert writer(torch.tensor([8, 8]), whole) is not None  # the lengths of the rows
    assert writer(torch.tensor([7, 8]), whole) is None


def test_an_entry_that_is_not_understood_stops_the_edits_alone() -> None:
    raw = boundaries(torch.tensor([0, 3, 9]), "starts")
    batch = parse_batch(raw, None, None)
    with pytest.raises(UnexaminableError, match="`starts`"):
        batch.rows([1, 0])
    assert batch.swap(batch.real, 0).raw["starts"] is batch.raw["starts"]

    def loss(model: Tiny, batch: dict) -> Tensor:
        given = {k: v for k, v in batch.items() if k != "starts"}
        assert len(batch["starts"]) == len(padded(0)["input_ids"]) + 2
        return token_mean(model, given)

    raw = {**padded(0), "starts": torch.arange(7)}
    report = preflight(Tiny(), raw, loss, **KNOWN)
    assert not report.faults and "future" in report.passed and "`starts`" in report.skipped["order"]


def test_a_row_of_documents_is_edited_with_its_boundaries() -> None:
    """`Varlen` fails where the boundaries do not fit the ids: no probe may run into that."""
    report = preflight(Varlen(), varlen(0), within, **KNOWN)
    assert report.clean and "packed" in report.passed and "documents" in report.passed
    assert not [why for why in report.skipped.values() if "Assertion" in why], str(report)


def test_the_first_column_of_a_slice_is_read_off_the_graph() -> None:
    hidden = torch.randn(3, 14, 4, requires_grad=True) * 2
    head = torch.nn.Linear(4, 9)
    for part, start in (
        (hidden[:, -6:], 8), (hidden[:, 3:7], 3), (hidden[:, -7:][:, 1:-1], 8),
        (hidden.narrow(1, 5, 2), 5), (hidden[:, -20:], 0), (hidden[:2, -3:], 11),
    ):  # fmt: skip
        assert first_column(head(part), 14) == start
        assert first_column(head(part.flatten(0, 1)).tanh(), 14) == start
    assert first_column(head(hidden), 14) == first_column(torch.zeros(3, 2, 9), 14) == 0
    both = torch.cat([hidden[:, 1:], hidden[:, :-1]], -1)  # as a head that reads the next token
    assert first_column(both @ torch.randn(8, 9), 14) == 0


def test_positions_that_are_not_chosen_by_a_slice_are_unknown() -> None:
    hidden = torch.randn(3, 14, 4, requires_grad=True) * 2
    last = torch.arange(8, 14)
    for part in (hidden[:, last], hidden.index_select(1, last), hidden.split([8, 6], 1)[1]):
        assert first_column(part @ torch.randn(4, 9), 14) is None


@pytest.mark.parametrize("factor", [1 / 16, 1 / 4, 8.0])
def test_weights_behind_a_scale_are_those_of_the_loss(factor: float) -> None:
    """With small noise the weight is w s^2 and the weight of the target w s: here w = 1 / 6."""
    z = (3e-3 * torch.randn(29)).expand(2, 3, 29).clone().requires_grad_()
    torch.nn.functional.cross_entropy(factor * z.flatten(0, 1), torch.arange(6)).backward()
    target, (weight, onehot, _, _), residual = fit(z.detach(), z.grad)
    assert target.flatten().tolist() == list(range(6)) and residual < 1e-2
    torch.testing.assert_close(weight / onehot, torch.full_like(weight, factor), rtol=0.02, atol=0)
    expected = torch.full_like(weight, 1 / 6)
    torch.testing.assert_close(onehot**2 / weight, expected, rtol=0.02, atol=0)


@pytest.mark.slow
def test_what_one_target_does_not_explain_is_said_in_the_summary() -> None:
    model, batch, _, known = OBJECTIVES.right["distilled"](0)
    report = preflight(model, batch, distilled(mix=0.5), **known)
    assert report.clean and len(report.remarks) == 1
    assert report.remarks[0] in " ".join(report.summary().split())
    assert report.to_dict()["remarks"] == report.remarks


@pytest.mark.slow
def test_teacher_targets_at_pad_are_found() -> None:
    def loss(model: torch.nn.Module, batch: dict) -> Tensor:
        wanted = feed(model.teacher, batch).detach().softmax(-1)
        return -(wanted * feed(model, batch).log_softmax(-1)).sum(-1).mean()

    model, batch, _, known = OBJECTIVES.right["distilled"](0)
    assert preflight(model, batch, loss, **known).faults == {"pad"}


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 4])
def test_any_number_of_dropped_labels_is_counted(count: int) -> None:
    def loss(model: torch.nn.Module, batch: dict) -> Tensor:
        kept = targets(batch)
        kept.view(-1)[kept.view(-1) != -100] = kept[kept != -100].index_fill(
            0, torch.arange(3, 3 + count), -100
        )
        return torch.nn.functional.cross_entropy(feed(model, batch).transpose(1, 2), kept)

    report = preflight(Tiny(), padded(0), loss, **KNOWN)
    assert [(f.label, f.probe, f.size) for f in report.findings] == [("pad", "dropped", count)]


@pytest.mark.slow
def test_packed_rows_do_not_miss_the_first_tokens_of_documents() -> None:
    report = preflight(Tiny(), packed(0), token_mean, **KNOWN)
    assert report.clean and "dropped" in report.passed


@pytest.mark.slow
def test_scale_and_faults_of_the_model_are_told_apart() -> None:
    """A scale in the loss hides no missing shift."""

    def loss(model: torch.nn.Module, batch: dict) -> Tensor:
        z = feed(_Edited(model, lambda z: z / 8), batch)
        return torch.nn.functional.cross_entropy(z.transpose(1, 2), batch["labels"])

    assert preflight(Tiny(), padded(0), loss, **KNOWN).faults == {"shift"}
