"""Runs of the loss: any loss can be run again, and leaves nothing behind."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audit_cases.parts import EOS, PAD, Batch, Tiny, V, ce, feed, padded, targets, token_mean
from causal_preflight import preflight
from causal_preflight.instrumented_model import InstrumentedModel
from causal_preflight.parse_batch import parse_batch
from causal_preflight.sandbox import Sandbox

torch.set_num_threads(1)
KNOWN = {"pad_id": PAD, "eos_id": EOS}


def test_parameters_of_the_loss_keep_their_gradients() -> None:
    bias, fresh = (nn.Parameter(torch.zeros(V)) for _ in range(2))
    bias.grad = kept = torch.ones(V)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return ce(feed(model, batch) + bias + fresh, targets(batch))

    assert preflight(Tiny(), padded(0, rows=2), loss, **KNOWN).audited
    assert bias.grad is kept and bool((kept == 1).all()) and fresh.grad is None


def masked(z: Tensor) -> Tensor:
    return z[..., PAD].fill_(-torch.inf)


@pytest.mark.parametrize(
    "edit", [lambda z: z.div_(2), pytest.param(masked, marks=pytest.mark.slow)]
)
def test_a_loss_may_edit_its_logits_in_place(edit: Any) -> None:
    def loss(model: nn.Module, batch: Batch, shift: int = 1) -> Tensor:
        z = feed(model, batch)
        edit(z)
        return ce(z, targets(batch) if shift else batch["labels"])

    for shift, faults in ((1, set()), (0, {"shift"})):
        report = preflight(Tiny(), padded(0), lambda m, b, s=shift: loss(m, b, s), **KNOWN)
        assert report.faults == faults and not report.remarks  # the logits themselves are read


def test_an_error_that_hides_the_logits_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory\nand more")

    monkeypatch.setattr(InstrumentedModel, "readout", fails)
    report = preflight(Tiny(), padded(0, rows=2), token_mean, **KNOWN)
    assert not report.audited and report.verdict.endswith("OutOfMemoryError: out of memory")


def test_no_hook_is_left_where_a_run_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(tensor: Tensor) -> Tensor:
        raise MemoryError

    model = Tiny()
    instrumented = InstrumentedModel(model, token_mean, Sandbox(model), 0, lambda raw: raw)
    hooks = [m.register_forward_hook(lambda *_: None) for m in model.modules()]
    monkeypatch.setattr(Tensor, "clone", fails)
    with pytest.raises(MemoryError):
        instrumented.run(parse_batch(padded(0), PAD, EOS), hooks=hooks)
    assert not any(m._forward_hooks for m in model.modules())


class Table(nn.Module):
    """Looks up ids in a plain parameter, and a kind of row in a small embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.kind = nn.Parameter(torch.randn(V, 16)), nn.Embedding(3, 16)
        self.rnn, self.head = nn.GRU(16, 16, batch_first=True), nn.Linear(16, V)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = nn.functional.embedding(input_ids, self.table) + self.kind(torch.zeros_like(input_ids))
        return self.head(self.rnn(x)[0])


@pytest.mark.slow
def test_small_embeddings_of_something_else_are_no_reason_to_refuse() -> None:
    assert preflight(Table(), padded(0), token_mean, **KNOWN).clean
