"""What a batch is taken for: its parts by their place or name, its PAD, its documents."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audit_cases.parts import EOS, PAD, Batch, Tiny, ce, feed, packed, padded, targets, token_mean
from causal_preflight import preflight
from causal_preflight.audit import audit_batch
from causal_preflight.parse_batch import named_tensors, parse_batch

torch.set_num_threads(1)
KNOWN = {"pad_id": PAD, "eos_id": EOS}


@pytest.mark.parametrize(
    ("rows", "real"),
    [
        ([[0, 5, 6, 7, 0], [0, 8, 0, 0, 0]], [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
        ([[0, 0, 5, 6, 0], [0, 8, 7, 6, 0]], [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]]),
        ([[0, 5, 6, 7, 0], [0, 0, 0, 0, 0]], [[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]]),
        ([[0], [5]], [[0], [1]]),
    ],
)
def test_an_id_of_pad_that_opens_each_row_is_a_bos(rows: list, real: list) -> None:
    """PAD, EOS and BOS share an id; where PAD is on the left of any row, it opens all of them."""
    found = parse_batch({"input_ids": torch.tensor(rows)}, 0, 0).real
    assert found.long().tolist() == real


@pytest.mark.parametrize("masked", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_eos_that_is_the_label_beyond_the_row_counts(masked: bool) -> None:
    """PAD and EOS share an id, labels are shifted: the longest row ends in its EOS."""
    ids = torch.tensor([[5, 6, 7, 8, 4, 3, 0, 0, 0], [8, 9, 4, 5, 6, 3, 7, 8, 0]])
    mask = torch.ones_like(ids)
    mask[0, 7:] = 0
    labels = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
    batch = {"input_ids": ids[:, :-1], "labels": labels}
    batch |= {"attention_mask": mask[:, :-1]} if masked else {}

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return ce(feed(model, batch), batch["labels"])

    assert preflight(Tiny(), batch, loss, pad_id=0, eos_id=0).clean
    wrong = preflight(Tiny(), batch | {"labels": ids[:, 1:]}, loss, pad_id=0, eos_id=0)
    assert wrong.faults == {"pad"}


def test_a_second_entry_of_zeros_and_ones_is_an_attention_mask() -> None:
    b = padded(0)
    pair = b["input_ids"], b["attention_mask"]
    assert set(named_tensors(pair)[0]) == {"input_ids", "attention_mask"}
    assert set(named_tensors((pair[1], pair[1]))[0]) == {"input_ids", "labels"}
    assert set(named_tensors((pair[0], pair[0]))[0]) == {"input_ids", "labels"}
    assert set(named_tensors([pair[0]])[0]) == {"input_ids"}

    def loss(model: nn.Module, batch: Any, ignored: int = -100) -> Tensor:
        batch = {"input_ids": batch[0], "attention_mask": batch[1]}
        return ce(feed(model, batch), targets(batch).where(targets(batch) >= 0, ignored))

    report = preflight(Tiny(), pair, lambda model, batch: loss(model, batch, PAD))
    assert report.faults == {"pad"}


@pytest.mark.parametrize("key", ["labels", "document_ids"])
def test_entries_that_are_no_tensors_are_refused_in_one_line(key: str) -> None:
    ids = padded(0)["input_ids"]
    for value in (ids.tolist(), ids.numpy()):
        with pytest.raises(ValueError, match=f"`{key}`.*tensor") as raised:
            preflight(Tiny(), {"input_ids": ids, key: value}, token_mean)
        assert "\n" not in str(raised.value)
    assert parse_batch({"input_ids": ids, key: None}, PAD, EOS).real.any()


def test_a_batch_of_pad_alone_is_not_audited() -> None:
    batch = {k: torch.zeros(2, 6, dtype=torch.long) for k in ("input_ids", "attention_mask")}
    batch["position_ids"] = torch.arange(6).expand(2, 6)
    report = preflight(Tiny(), batch, lambda m, b: 0.0 * feed(m, b).sum())
    assert not report.audited and not report.faults


def test_labels_of_another_name_beside_others() -> None:
    b = padded(0)
    batch = {"input_ids": b["input_ids"], "y": targets(b), "labels": torch.arange(7)}
    raw, rebuild = named_tensors(batch, labels_key="y")
    assert raw["labels"] is batch["y"] and rebuild(raw) == batch


@pytest.mark.slow
def test_a_count_for_the_whole_batch_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither where the batch is too large to be read whole, nor where it is split in two."""
    monkeypatch.setattr("causal_preflight.audit._MAX_LOGITS", 300)
    batch = padded(0, rows=6) | {"num_items": torch.tensor([37])}

    def loss(*halves: Batch) -> Tensor:
        parts = [{k: v for k, v in half.items() if k != "num_items"} for half in halves]
        assert all(len(half["num_items"]) == 1 for half in halves)
        sums = [ce(feed(model, b), targets(b), reduction="sum") for b in parts]
        return sum(sums) / sum((targets(b) >= 0).sum() for b in parts)

    model = Tiny()
    for parted in (False, True):
        report = audit_batch(model, batch, loss, parted=parted, **KNOWN)
        assert report.clean, str(report)


def test_each_half_of_a_batch_has_its_own_boundaries() -> None:
    """Documents stated by `cu_seqlens` over the rows of the whole batch, PAD left out."""
    b = packed(0)
    ends = torch.cat([row[row >= 0].bincount() for row in b["document_ids"]]).cumsum(0)
    batch = {"input_ids": b["input_ids"], "position_ids": b["position_ids"]}
    batch["attention_mask"] = (b["document_ids"] >= 0).long()
    batch["cu_seqlens"] = torch.cat([torch.zeros(1, dtype=torch.long), ends])
    model = Tiny()

    def loss(*halves: Batch) -> Tensor:
        sums, count = [], 0
        for half in halves:
            mask = half["attention_mask"].bool()
            sizes = half["cu_seqlens"].diff()
            assert int(half["cu_seqlens"][-1]) == int(mask.sum())
            doc = torch.full_like(half["input_ids"], -1)
            doc[mask] = torch.arange(len(sizes)).repeat_interleave(sizes)
            own = {k: half[k] for k in ("input_ids", "position_ids")} | {"document_ids": doc}
            sums.append(ce(feed(model, own), targets(own), reduction="sum"))
            count += int((targets(own) >= 0).sum())
        return sum(sums) / count

    report = audit_batch(model, batch, loss, parted=True, **KNOWN)
    assert not report.faults and {"alignment", "reduction", "documents"} <= set(report.passed)
