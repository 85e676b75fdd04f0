"""Set-ups whose token weights fit no mean or sum, or whose loss is NaN without targets."""

import torch
from torch import Tensor, nn

from .parts import Batch, ce, feed, full, nll, padded, targets, token_mean
from .registry import add, case
from .right import _prompt, accumulated, plain, plain_sum, prompt, right_accumulated, stream


def all_slots(model: nn.Module, batch: Batch) -> Tensor:
    return plain_sum(model, batch) / batch["input_ids"].numel()


def empty_rows(model: nn.Module, batch: Batch) -> Tensor:
    t = targets(batch)
    return (nll(feed(model, batch), t).sum(1) / (t != -100).sum(1)).mean()


def over_count(model: nn.Module, batch: Batch) -> Tensor:
    return plain_sum(model, batch) / (batch["labels"] != -100).sum()


add("reduction", plain, "divided_by_slots", case(loss=all_slots))
add("reduction", stream, "divided_by_slots_unpadded", case(batch=full, loss=all_slots))
add(
    "reduction",
    right_accumulated,
    "mean_of_means",
    case(loss=lambda m, b: accumulated(m, b, by_token=False)),
)
add(
    "reduction",
    right_accumulated,
    "mean_of_ranks",
    case(
        batch=lambda s: padded(s, rows=4),
        loss=lambda m, b: torch.stack(
            [ce(z, t) for z, t in zip(feed(m, b).chunk(2), targets(b).chunk(2), strict=True)]
        ).mean(),
    ),
)
add(
    "reduction",
    right_accumulated,
    "mean_of_single_rows",
    case(
        batch=lambda s: padded(s, rows=2),
        loss=lambda m, b: accumulated(m, b, max(1, len(b["input_ids"]) // 2), by_token=False),
    ),
)
add("reduction", plain, "first_label_counted", case(loss=over_count))
add(
    "reduction",
    plain,
    "divided_twice",
    case(loss=lambda m, b: token_mean(m, b) / (targets(b) != -100).sum()),
)
add(
    "reduction",
    right_accumulated,
    "divided_twice_by_calls",
    case(loss=lambda m, b: accumulated(m, b) / 3),
)
add(
    "reduction",
    prompt,
    "row_without_targets",
    case(batch=lambda s: _prompt(padded(s)), loss=empty_rows),
)
add(
    "reduction",
    plain,
    "only_ignored",
    case(batch=lambda s: {**padded(s), "labels": torch.full((5, 14), -100)}),
)
