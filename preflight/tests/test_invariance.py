"""Probes of what is not finite, and of rows that hold PAD alone or one token."""

import pytest
import torch
from torch import Tensor, nn

from audit_cases.parts import EOS, PAD, Batch, Tiny, ce, feed, packed, padded, targets, token_mean
from causal_preflight import preflight
from causal_preflight.report import REMEDIES

torch.set_num_threads(1)
KNOWN = {"pad_id": PAD, "eos_id": EOS}


def of_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    p = feed(model, batch).softmax(-1)
    return nn.functional.nll_loss((p * (p > 0.03)).log().flatten(0, 1), targets(batch).flatten())


def with_an_empty_row(model: nn.Module, batch: Batch) -> Tensor:
    y = targets(batch)
    y[0] = -100
    rows = zip(feed(model, batch), y, strict=True)
    return torch.stack([nn.functional.cross_entropy(z, t) for z, t in rows]).mean()


@pytest.mark.parametrize(
    ("loss", "value", "remedy"),
    [(of_probabilities, "inf", "overflow"), (with_an_empty_row, "nan", "clamp")],
)
def test_a_loss_that_is_not_finite_is_told_by_its_kind(loss, value, remedy) -> None:
    report = preflight(Tiny(), padded(0), loss, **KNOWN)
    (finding,) = [f for f in report.findings if f.probe == "finite"]
    assert finding.label == "reduction" and finding.remedy == REMEDIES[remedy]
    assert f"loss is {value} " in finding.seen and finding.row is None


def test_gradients_that_are_not_finite_are_not_blamed_on_pad() -> None:
    """The square root of 0 has an infinite gradient, with or without PAD."""

    class Root(Tiny):
        def mix(self, x: Tensor) -> Tensor:
            return x + (0 * x).sqrt().nan_to_num()

    report = preflight(Root(), padded(0), token_mean, **KNOWN)
    assert [f.probe for f in report.findings] == ["finite"] and "pad" not in report.faults


@pytest.mark.slow
def test_a_row_of_pad_alone_stops_no_probe() -> None:
    batch = packed(0)
    empty = {"input_ids": PAD, "document_ids": -1, "position_ids": 0}
    batch = {k: torch.cat([v, torch.full_like(v[:1], empty[k])]) for k, v in batch.items()}
    report = preflight(Tiny(), batch, token_mean, **KNOWN)
    assert report.clean and "packed" in report.passed


@pytest.mark.slow
def test_decoding_takes_the_longest_row() -> None:
    """Of a batch whose first row holds one token."""

    class Cached(Tiny):
        seen = 0

        def forward(self, input_ids, attention_mask=None, past=None, **kw):
            assert input_ids.numel()
            Cached.seen = max(Cached.seen, input_ids.shape[1])
            ids = input_ids if past is None else torch.cat([past, input_ids], 1)
            return super().forward(ids, attention_mask)[:, -input_ids.shape[1] :], ids

    batch = padded(0, rows=3)
    batch["attention_mask"][0, 1:] = 0
    batch["input_ids"][0, 1:] = PAD

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        z, _ = model(batch["input_ids"], batch["attention_mask"])
        return ce(z, targets(batch))

    batch.pop("labels")
    report = preflight(Cached(), batch, loss, **KNOWN)
    assert report.clean and "decoding" in report.passed, str(report)
