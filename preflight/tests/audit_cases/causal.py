"""Set-ups in which a logit sees what it must not see, or too little."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import BOS, EOS, Batch, Tiny, ce, feed, full, left, packed, padded, targets
from .registry import add, add_right, case
from .right import (
    Alibi,
    Autocast,
    Prefix,
    Recurrent,
    ZeroInit,
    bf16,
    dropout,
    gru,
    packed_rows,
    plain,
    prefix,
    zero_init,
)


class Open(Tiny):
    def causal(self, t: int) -> Tensor:
        return torch.ones(t, t, dtype=torch.bool)


class Upside(Tiny):
    def causal(self, t: int) -> Tensor:
        return ~super().causal(t)


class OffByOne(Tiny):
    def causal(self, t: int) -> Tensor:
        return torch.ones(t, t, dtype=torch.bool).tril(1)


class Additive(Tiny):
    def weights(self, scores: Tensor, see: Tensor) -> Tensor:
        return (scores + see.float()).softmax(-1)


class TinyFill(Tiny):
    def weights(self, scores: Tensor, see: Tensor) -> Tensor:
        return scores.masked_fill(~see, 1e-9).softmax(-1)


class ThrownAway(Tiny):
    def weights(self, scores: Tensor, see: Tensor) -> Tensor:
        scores.masked_fill(~see, -math.inf)
        return scores.softmax(-1)


class AfterSoftmax(Tiny):
    def weights(self, scores: Tensor, see: Tensor) -> Tensor:
        return scores.softmax(-1) * see


class OverQueries(Tiny):
    def weights(self, scores: Tensor, see: Tensor) -> Tensor:
        return torch.nan_to_num(scores.masked_fill(~see, -math.inf).softmax(-2))


class Unmerged(Tiny):
    def merge(self, z: Tensor) -> Tensor:
        return z.reshape(z.shape[0], z.shape[2], -1)


class DropoutPath(Tiny):
    def causal(self, t: int) -> Tensor:
        return torch.ones(t, t, dtype=torch.bool) if self.training else super().causal(t)


class OnlyUnpadded(Tiny):
    def visible(self, ids: Tensor, mask: Tensor | None, docs: Tensor | None) -> Tensor:
        see = super().visible(ids, mask, docs)
        return torch.ones_like(see) if mask is None or bool(mask.all()) else see


class Nothing(Tiny):
    def causal(self, t: int) -> Tensor:
        return torch.eye(t, dtype=torch.bool)


class Threefold(Nothing):
    """Sees itself alone; queries, keys and values are slices of one parameter along `axis`."""

    axis = 0

    def __init__(self) -> None:
        super().__init__(layers=1)
        self.all = nn.Parameter(torch.randn(3, 16, 16).movedim(0, self.axis) / 4)
        self.qkv = nn.ModuleList([nn.Identity()])

    def attend(self, x: Tensor, i: int, see: Tensor) -> Tensor:
        q, k, v = (self.split(x @ w) for w in self.all.unbind(self.axis))
        return self.merge(self.weights(q @ k.transpose(-1, -2) / 3, see) @ v)


class BlindToLast(Tiny):
    def causal(self, t: int) -> Tensor:
        return super().causal(t).tril(-2)


class OverBatch(Tiny):
    def attend(self, x: Tensor, i: int, see: Tensor) -> Tensor:
        t = torch.ones(len(x), len(x), dtype=torch.bool).tril()
        return super().attend(x.transpose(0, 1), i, t).transpose(0, 1)


class BatchNormed(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(16)

    def mix(self, x: Tensor) -> Tensor:
        return self.bn(x.transpose(1, 2)).transpose(1, 2)


class TimeNormed(Tiny):
    def mix(self, x: Tensor) -> Tensor:
        return (x - x.mean(1, keepdim=True)) / (x.std(1, keepdim=True) + 1e-3)


class Convolved(Tiny):
    """`lean` columns of padding on the left: kernel - 1 is causal."""

    lean = 2

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 3)

    def mix(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x.transpose(1, 2), (self.lean, 2 - self.lean))).transpose(1, 2)


class ConvolvedBoth(Convolved):
    lean = 1


class Pooled(Tiny):
    def mix(self, x: Tensor) -> Tensor:
        return x + 0.001 * x.mean(1, keepdim=True)


class ExpertChoice(Tiny):
    """Each expert takes its favourite tokens of the whole row, chosen without gradient."""

    def mix(self, x: Tensor) -> Tensor:
        chosen = x.detach()[..., 0].topk(x.shape[1] // 2, 1).indices
        return x * torch.zeros(x.shape[:2]).scatter(1, chosen, 1.0)[..., None]


class Summaries(Tiny):
    """Blocks of four see the mean of their own block."""

    def mix(self, x: Tensor) -> Tensor:
        pad = -x.shape[1] % 4
        blocks = F.pad(x, (0, 0, 0, pad)).unflatten(1, (-1, 4)).mean(2)
        return x + blocks.repeat_interleave(4, 1)[:, : x.shape[1]].detach()


class Rolled(Tiny):
    def mix(self, x: Tensor) -> Tensor:
        return x + x.roll(1, 1)


class Finite(Tiny):
    """A mask of -1e4, and weights grown so large that scores outgrow it."""

    size = 1.0

    def weights(self, scores: Tensor, see: Tensor) -> Tensor:
        return (self.size * scores + torch.where(see, 0.0, -1e4)).softmax(-1)


class Outgrown(Finite):
    size = 1e5


class AcrossDocuments(Tiny):
    def visible(self, ids: Tensor, mask: Tensor | None, docs: Tensor | None) -> Tensor:
        return super().visible(ids, (docs >= 0).long(), None)  # type: ignore[operator]


class ZeroOpen(ZeroInit, Open):
    pass


class Faint(Tiny):
    """A leak of about 1e-4 of the logits."""

    def forward(self, *a: Any, **k: Any) -> Tensor:
        z = super().forward(*a, **k)
        return z + 2e-4 * z.mean(1, keepdim=True)


class LengthEmbedded(Tiny):
    """Adds an embedding of the number of real tokens: those of the row, or those seen so far."""

    running = False

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **k: Any) -> Tensor:
        seen = attention_mask.cumsum(1)
        self.length = seen if self.running else seen[:, -1:].expand_as(seen)
        return super().forward(input_ids, attention_mask, **k)

    def positions(self, ids: Tensor, given: Tensor | None) -> Tensor:
        return super().positions(ids, given) + self.pos(self.length)


class RunningLength(LengthEmbedded):
    running = True


class UntilEos(Tiny):
    """Counts the tokens down to the next EOS, or up from the last one."""

    down = True

    def positions(self, ids: Tensor, given: Tensor | None) -> Tensor:
        at = torch.arange(ids.shape[1]).expand_as(ids)
        if self.down:
            ends = torch.where(ids == EOS, at, ids.shape[1])
            return self.pos(ends.flip(1).cummin(1).values.flip(1) - at)
        return self.pos(at - torch.where(ids == EOS, at, 0).cummax(1).values)


class SinceEos(UntilEos):
    down = False


def turns(seed: int) -> Batch:
    """A stream with an EOS inside each row, as chats have them."""
    ids = full(seed)["input_ids"]
    ids[:, 0], ids[:, 4], ids[:, 9] = BOS, EOS, EOS
    return {"input_ids": ids}


def _positioned(b: Batch) -> Batch:
    return {**b, "position_ids": (b["attention_mask"].cumsum(1) - 1).clamp_min(0)}


finite_mask = add_right("finite_mask", case(Finite))
convolved = add_right("convolved", case(Convolved))
for model, label in (
    (Open, "mask_missing"), (Upside, "mask_upside_down"), (OffByOne, "mask_off_by_one"),
    (Additive, "additive_zero_one"), (TinyFill, "filled_with_1e-9"),
    (ThrownAway, "masked_fill_thrown_away"), (AfterSoftmax, "mask_after_softmax"),
    (OverQueries, "softmax_over_queries"), (Unmerged, "heads_not_permuted"),
    (OnlyUnpadded, "leaks_only_unpadded"), (Nothing, "sees_nothing"),
    (BlindToLast, "blind_to_last"), (OverBatch, "over_batch_axis"), (BatchNormed, "batch_norm"),
    (TimeNormed, "norm_over_time"), (Pooled, "pooled_faintly"), (ExpertChoice, "expert_choice"),
    (Summaries, "block_summaries"), (Rolled, "rolled_hidden"), (Faint, "faint_leak"),
):  # fmt: skip
    add("causal", plain, label, case(model))
for axis in range(3):
    make = type("Threefold", (Threefold,), {"axis": axis})
    add("causal", plain, f"sees_nothing_axis_{axis}", case(make))
add("causal", dropout, "mask_dropped_in_training", case(lambda: DropoutPath(dropout=0.1)))
add("causal", convolved, "convolved_both_ways", case(ConvolvedBoth))
add("causal", finite_mask, "mask_outgrown", case(Outgrown))
add("causal", prefix, "prefix_counted", case(Prefix))
both_sides = add_right("both_sides", case(batch=lambda s: _positioned(padded(s, "both"))))

add("causal", packed_rows, "across_packed", case(AcrossDocuments, packed))
add("causal", zero_init, "zero_init_leak", case(ZeroOpen))
add("causal", gru, "gru_both_ways", case(lambda: Recurrent(both=True)))
add("causal", bf16, "bf16_open", case(type("A", (Autocast, Open), {})))

running_length = add_right("running_length", case(RunningLength))
running_left = add_right("running_length_left", case(RunningLength, left))
since_eos = add_right("since_eos", case(SinceEos, turns))
add("causal", running_length, "length_embedded", case(LengthEmbedded))
add("causal", running_left, "length_embedded_left", case(LengthEmbedded, left))
add("causal", since_eos, "until_eos", case(UntilEos, turns))


def numbered(seed: int) -> Batch:
    """Packed rows whose attention_mask numbers the documents: 1, 1, 2, 2, 3, and 0 at PAD."""
    b = packed(seed)
    return {"input_ids": b["input_ids"], "attention_mask": b["document_ids"] + 1}


class Numbered(Alibi):
    def visible(self, ids: Tensor, mask: Tensor | None, docs: Tensor | None) -> Tensor:
        return super().visible(ids, None, mask)


def of_numbered(model: nn.Module, batch: Batch) -> Tensor:
    return ce(feed(model, batch), targets({**batch, "document_ids": batch["attention_mask"] - 1}))


numbered_rows = add_right("numbered_rows", case(Numbered, numbered, of_numbered))
add("causal", numbered_rows, "numbers_read_as_bool", case(Alibi, numbered, of_numbered))
