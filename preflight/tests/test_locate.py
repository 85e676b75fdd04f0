"""Which slots of the batch the arguments of a call hold."""

import torch

from causal_preflight.locate import slots_of_call
from causal_preflight.parse_batch import parse_batch


def test_equal_rows_in_two_calls_get_different_slots_though_labels_equal_the_ids() -> None:
    row = torch.tensor([5, 9, 7, 12])
    batch = parse_batch({"input_ids": row.repeat(4, 1)}, None, None)
    part, used = row.repeat(2, 1), set[int]()
    call = {"input_ids": part, "labels": part.clone()}
    found = [slots_of_call(((), call), batch, used) for _ in range(2)]
    assert [slots[:, 0].tolist() for slots in found if slots is not None] == [[0, 4], [8, 12]]
