"""Set-ups whose targets are not the next token."""

import torch.nn.functional as F
from torch import Tensor, nn

from .parts import Batch, ce, feed, full, packed, padded, targets, token_mean
from .registry import add, case
from .right import (
    Sure,
    confident,
    packed_rows,
    plain,
    preshifted,
    right_smoothing,
    stream,
    unshifted,
)

add("shift", plain, "not_shifted", case(loss=unshifted))
add(
    "shift",
    packed_rows,
    "not_shifted_packed",
    case(
        batch=packed,
        loss=lambda m, b: ce(feed(m, b), b["input_ids"].masked_fill(b["document_ids"] < 0, -100)),
    ),
)
add(
    "shift",
    plain,
    "shifted_twice",
    case(loss=lambda m, b: ce(feed(m, b)[:, :-1], targets(b)[:, 1:])),
)
add(
    "shift",
    preshifted,
    "shifted_by_collator_and_loss",
    case(
        batch=lambda s: {**padded(s), "labels": targets(padded(s))},
        loss=lambda m, b: ce(feed(m, b)[:, :-1], b["labels"][:, 1:]),
    ),
)
add("shift", plain, "backwards", case(loss=lambda m, b: ce(feed(m, b)[:, 1:], b["labels"][:, :-1])))
add(
    "shift",
    stream,
    "flattened_before_shift",
    case(
        batch=full,
        loss=lambda m, b: F.cross_entropy(
            feed(m, b).flatten(0, 1)[:-1], b["input_ids"].flatten()[1:]
        ),
    ),
)
add(
    "shift",
    stream,
    "rolled",
    case(batch=full, loss=lambda m, b: ce(feed(m, b), b["input_ids"].roll(-1, 1))),
)
add(
    "shift",
    preshifted,
    "rolled_by_collator",
    case(
        batch=lambda s: {**full(s), "labels": full(s)["input_ids"].roll(-1, 1)},
        loss=lambda m, b: ce(feed(m, b), b["labels"]),
    ),
)


def smoothing_unshifted(model: nn.Module, batch: Batch, train: bool = True) -> Tensor:
    if model.training != train:
        return token_mean(model, batch)
    return ce(feed(model, batch), batch["labels"], label_smoothing=0.1)


add("shift", right_smoothing, "smoothing_branch_unshifted", case(loss=smoothing_unshifted))
add(
    "shift",
    right_smoothing,
    "unshifted_in_eval_only",
    case(loss=lambda m, b: smoothing_unshifted(m, b, False)),
)
add(
    "shift",
    packed_rows,
    "across_documents",
    case(
        batch=packed,
        loss=lambda m, b: ce(
            feed(m, b)[:, :-1],
            b["input_ids"][:, 1:].masked_fill(b["document_ids"][:, 1:] < 0, -100),
        ),
    ),
)
add("shift", confident, "not_shifted_confident", case(Sure, loss=unshifted))
