"""Models under torch.compile are audited without compiling them, and compile as before after it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audit_cases.causal import Open
from audit_cases.parts import Batch, Tiny, ce, padded, targets
from audit_cases.registry import KNOWN
from causal_preflight import preflight

torch.set_num_threads(1)


@pytest.mark.parametrize("make", [Tiny, Open])
@pytest.mark.parametrize("wrap", ["whole", "in place", "inner"])
def test_a_compiled_model_is_audited_eagerly(make: Any, wrap: str) -> None:
    compiled = list[Any]()

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch.manual_seed(0)
    model: Any = make()
    if wrap == "in place":
        model.compile(backend=backend)
    else:
        model = torch.compile(model, backend=backend)
        model = nn.Sequential(model) if wrap == "inner" else model

    def loss(model: Any, batch: Batch) -> Tensor:
        return ce(model(batch["input_ids"]), targets(batch))

    report = preflight(model, padded(0), loss, **KNOWN)
    assert report.faults == ({"causal"} if make is Open else set()), str(report)
    assert not compiled
    assert any("torch.compile" in note for note in report.sampled)
    loss(model, padded(0))
    assert compiled  # it compiles again afterwards
