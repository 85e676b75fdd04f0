"""Batches that are mappings of another class come back as what they were."""

from collections import UserDict, defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audit_cases.parts import EOS, PAD, Tiny, ce, padded, targets
from causal_preflight import preflight
from causal_preflight.parse_batch import named_tensors

KNOWN = {"pad_id": PAD, "eos_id": EOS}


class Attributes(UserDict):
    """`batch.input_ids`, as in BatchEncoding of transformers."""

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise AttributeError(name)
        return self.data[name]


class Dotted(dict):
    """The same, as a dict."""

    def __getattr__(self, name: str) -> Any:
        return self[name]


class TwoArguments(UserDict):
    """Its constructor takes no dict."""

    def __init__(self, fields: dict[str, Any], device: str) -> None:
        super().__init__(fields)


@pytest.mark.parametrize(("kind", "shift"), [(Attributes, 1), (Dotted, 1), (Attributes, 2)])
def test_attributes_of_a_mapping(kind: Any, shift: int) -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert type(batch) is kind
        logits = model(batch.input_ids, batch.attention_mask)
        return ce(logits, targets(batch) if shift == 1 else targets(batch).roll(-1, 1))

    report = preflight(Tiny(), kind(padded(0)), loss, **KNOWN)
    assert report.clean if shift == 1 else "shift" in report.faults, str(report)


@pytest.mark.parametrize(
    "batch", [TwoArguments({"kind": torch.ones(2), "tokens": torch.ones(2)}, "cpu"),
              defaultdict(list, kind=torch.ones(2), tokens=torch.ones(2))]
)  # fmt: skip
def test_a_mapping_that_takes_no_dict_becomes_one(batch: Any) -> None:
    raw, rebuild = named_tensors(batch, "tokens")
    assert set(raw) == {"input_ids", "kind"}
    again = rebuild(raw)
    assert type(again) is dict and set(again) == {"tokens", "kind"}


@pytest.mark.extras
def test_the_batch_of_a_tokenizer() -> None:
    transformers = pytest.importorskip("transformers")

    def loss(model: nn.Module, batch: Any) -> Tensor:
        assert isinstance(batch, transformers.BatchEncoding)
        return ce(model(batch.input_ids, batch.attention_mask), targets(batch))

    assert preflight(Tiny(), transformers.BatchEncoding(padded(0)), loss, **KNOWN).clean
