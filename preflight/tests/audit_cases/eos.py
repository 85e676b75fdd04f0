"""Set-ups in which the end of a document is never trained."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import EOS, Batch, ce, feed, padded
from .registry import add, case
from .right import no_hints, pad_is_eos, plain, shared_id


def by_id(model: nn.Module, batch: Batch) -> Tensor:
    return ce(feed(model, batch)[:, :-1], batch["input_ids"][:, 1:], ignore_index=EOS)


def too_short(model: nn.Module, batch: Batch) -> Tensor:
    keep = F.pad(batch["attention_mask"], (0, 1))[:, 2:].bool()
    return ce(feed(model, batch)[:, :-1], batch["input_ids"][:, 1:].masked_fill(~keep, -100))


def endless(seed: int) -> Batch:
    b = padded(seed)
    ids = torch.where(b["input_ids"] == EOS, 5, b["input_ids"])
    return {**b, "input_ids": ids, "labels": torch.where(b["labels"] == EOS, 5, b["labels"])}


def masked_end(seed: int) -> Batch:
    b = padded(seed, pad=EOS)
    return {**b, "labels": b["input_ids"].masked_fill(b["input_ids"] == EOS, -100)}


add(
    "eos",
    pad_is_eos,
    "eos_ignored_as_pad",
    case(batch=lambda s: padded(s, pad=EOS), loss=by_id, **shared_id),
)
add("eos", pad_is_eos, "eos_ignored_by_collator", case(batch=masked_end, **shared_id))
add("eos", pad_is_eos, "eos_ignored_no_hints", case(batch=masked_end, pad_id=None, eos_id=None))
add("eos", plain, "mask_too_short", case(loss=too_short))
add("eos", no_hints, "mask_too_short_no_hints", case(loss=too_short, pad_id=None, eos_id=None))
add("eos", plain, "no_eos_in_data", case(batch=endless))
