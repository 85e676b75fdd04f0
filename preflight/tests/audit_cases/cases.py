"""The collection: set-ups that are right, and faulty ones that are each one edit away from one.

A case is a function of a seed that returns (model, batch, loss_fn, keywords of preflight).
`@right` registers one that must raise no alarm, `@faulty(label, twin)` one that must be named.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import (
    BOS,
    EOS,
    PAD,
    Batch,
    Tiny,
    V,
    ce,
    feed,
    full,
    left,
    nll,
    packed,
    padded,
    targets,
    token_mean,
)

Setup = tuple[nn.Module, Batch, Any, dict[str, Any]]
RIGHT: dict[str, Callable[[int], Setup]] = {}
FAULTY: dict[str, tuple[str, str, Callable[[int], Setup]]] = {}
KNOWN = {"pad_id": PAD, "eos_id": EOS}


def right(build: Callable[[int], Setup]) -> Callable[[int], Setup]:
    RIGHT[build.__name__] = build
    return build


def faulty(label: str, twin: Callable[[int], Setup]) -> Callable[..., Any]:
    def register(build: Callable[[int], Setup]) -> Callable[[int], Setup]:
        FAULTY[build.__name__] = (label, twin.__name__, build)
        return build

    return register


def case(
    make: Callable[[], nn.Module] = Tiny,
    batch: Callable[[int], Batch] = padded,
    loss: Any = token_mean,
    **kw: Any,
) -> Callable[[int], Setup]:
    """The common shape of a case: a model, a batch and a loss, all seeded."""

    def build(seed: int) -> Setup:
        torch.manual_seed(seed)
        return make().eval() if seed % 2 else make(), batch(seed), loss, {**KNOWN, **kw}

    return build


def add_right(name: str, build: Callable[[int], Setup]) -> Callable[[int], Setup]:
    build.__name__ = name
    return right(build)


def add(label: str, twin: Callable[[int], Setup], name: str, build: Callable[[int], Setup]) -> None:
    build.__name__ = name
    faulty(label, twin)(build)


# ---------------------------------------------------------------------------------- right set-ups
plain = add_right("plain", case())
left_padded = add_right("left_padded", case(batch=left))
packed_rows = add_right("packed_rows", case(batch=packed))
stream = add_right("stream", case(batch=full))
dropout = add_right("dropout", case(lambda: Tiny(dropout=0.2)))
one_layer = add_right("one_layer", case(lambda: Tiny(layers=1)))
no_hints = add_right("no_hints", case(pad_id=None, eos_id=None))
prompt = add_right("prompt_masked", case(batch=lambda s: _prompt(padded(s))))


def _prompt(b: Batch) -> Batch:
    labels = b["labels"].clone()
    labels[:, :5] = -100
    return {**b, "labels": labels}


def sequence_mean(model: nn.Module, batch: Batch) -> Tensor:
    t = targets(batch)
    count = (t != -100).sum(1)
    return (nll(feed(model, batch), t).sum(1) / count.clamp_min(1)).sum() / (count > 0).sum()


def plain_sum(model: nn.Module, batch: Batch) -> Tensor:
    return ce(feed(model, batch), targets(batch), reduction="sum")


def fixed_length(model: nn.Module, batch: Batch) -> Tensor:
    return plain_sum(model, batch) / (len(batch["input_ids"]) * 64)


def smoothing(model: nn.Module, batch: Batch) -> Tensor:
    return ce(feed(model, batch), targets(batch), label_smoothing=0.1)


def z_loss(model: nn.Module, batch: Batch, everywhere: bool = False) -> Tensor:
    z, t = feed(model, batch), targets(batch)
    keep = torch.ones_like(t, dtype=torch.bool) if everywhere else batch["attention_mask"].bool()
    return ce(z, t) + 1e-2 * z.logsumexp(-1)[keep].pow(2).mean()


def accumulated(model: nn.Module, batch: Batch, micro: int = 2, by_token: bool = True) -> Tensor:
    """Several calls of the model, one loss."""
    rows = len(batch["input_ids"])
    total = (targets(batch) != -100).sum()
    parts = []
    for at in range(0, rows, micro):
        part = {k: v[at : at + micro] for k, v in batch.items()}
        parts.append(plain_sum(model, part) / total if by_token else token_mean(model, part))
    return torch.stack(parts).sum() if by_token else torch.stack(parts).mean()


right_sequence_mean = add_right("sequence_mean", case(loss=sequence_mean))
right_sum = add_right("plain_sum", case(loss=plain_sum))
right_fixed = add_right("fixed_length", case(loss=fixed_length))
right_smoothing = add_right("label_smoothing", case(loss=smoothing))
right_z = add_right("z_loss", case(loss=z_loss))
right_accumulated = add_right("accumulated", case(loss=accumulated))


class Wrapped(Tiny):
    """Outputs in another dress."""

    dress: Any = staticmethod(lambda z: (z, None))

    def forward(self, *a: Any, **k: Any) -> Any:
        return self.dress(super().forward(*a, **k))


def dressed(dress: Any, undress: Any) -> Callable[[int], Setup]:
    make = type("Dressed", (Wrapped,), {"dress": staticmethod(dress)})

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        out = model(**{k: v for k, v in batch.items() if k != "labels"})
        return ce(undress(out), targets(batch))

    return case(make, loss=loss)


class Output:
    def __init__(self, logits: Tensor) -> None:
        self.logits = logits


as_tuple = add_right("as_tuple", dressed(lambda z: (z, {"x": 1}), lambda o: o[0]))
as_dict = add_right("as_dict", dressed(lambda z: {"logits": z}, lambda o: o["logits"]))
as_object = add_right("as_object", dressed(Output, lambda o: o.logits))
as_bvt = add_right("as_bvt", dressed(lambda z: z.transpose(1, 2), lambda o: o.transpose(1, 2)))
as_flat = add_right(
    "as_flat", dressed(lambda z: z.flatten(0, 1), lambda o: o.unflatten(0, (-1, 14)))
)


class OwnLoss(Tiny):
    """Computes the loss itself, from a functional head tied to the embedding."""

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, **k: Any) -> Any:
        self.head = nn.Identity()
        z = super().forward(input_ids, **k) @ self.tok.weight.T
        out = Output(z)
        out.loss = ce(z[:, :-1], labels[:, 1:])  # type: ignore[attr-defined, index]
        return out


own_loss = add_right("own_loss", case(OwnLoss, loss=None))


class Recurrent(nn.Module):
    def __init__(self, both: bool = False, stateful: bool = False) -> None:
        super().__init__()
        self.tok, self.stateful = nn.Embedding(V, 12), stateful
        self.rnn = nn.GRU(12, 12, batch_first=True, bidirectional=both)
        self.head = nn.Linear(24 if both else 12, V)
        self.state: Tensor | None = None

    def reset(self) -> None:
        self.state = None

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        y, h = self.rnn(self.tok(input_ids), self.state)
        if self.stateful:
            self.state = h.detach()
        return self.head(y)


gru = add_right("gru", case(Recurrent))
stateful = add_right("stateful", case(lambda: Recurrent(stateful=True)))


class Alibi(Tiny):
    def positions(self, ids: Tensor, given: Tensor | None) -> Tensor:
        return torch.zeros(())

    def weights(self, scores: Tensor, see: Tensor) -> Tensor:
        t = torch.arange(scores.shape[-1])
        return super().weights(scores - 0.5 * (t[:, None] - t).clamp_min(0), see)


alibi = add_right("alibi", case(Alibi))
alibi_left = add_right("alibi_left", case(Alibi, lambda s: padded(s, "left")))


class Prefix(Tiny):
    def causal(self, t: int) -> Tensor:
        see = super().causal(t)
        see[:5, :5] = True
        return see


prefix = add_right("prefix_uncounted", case(Prefix, lambda s: _prompt({**padded(s)})))


class ZeroInit(Tiny):
    def __init__(self, **kw: Any) -> None:
        super().__init__(**kw)
        for m in (*self.out, self.head):
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)


zero_init = add_right("zero_init", case(ZeroInit))


class Tied(Tiny):
    def __init__(self) -> None:
        super().__init__()
        self.head.weight = self.tok.weight


tied = add_right("tied", case(Tied))
bigram = add_right(
    "bigram", case(lambda: nn.Embedding(V, V), loss=lambda m, b: ce(m(b["input_ids"]), targets(b)))
)


class Experts(nn.Module):
    """A bigram: each token goes to the one of eight experts that likes it best; most stay idle."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.tok, self.gate = nn.Embedding(V, 12), nn.Linear(12, 8)
        self.places = nn.Parameter(torch.randn(64, 12))
        each = nn.ModuleList(nn.Linear(12, 12) for _ in range(8))
        self.each = nn.Parameter(torch.randn(8, 12, 12) / 4) if stacked else each
        self.head = nn.Linear(12, V)

    def forward(self, input_ids: Tensor, **_: Any) -> Tensor:
        x = self.tok(input_ids) + self.places[: input_ids.shape[1]]
        share, chosen = self.gate(x).softmax(-1).max(-1, keepdim=True)
        apply = x.__matmul__ if isinstance(self.each, Tensor) else lambda e: e(x)
        every = torch.stack([apply(e) for e in self.each], -2)
        only = F.one_hot(chosen, 8)[..., 0, :, None]
        return self.head(x + (share[..., None] * only * every).sum(-2))


experts = add_right("experts", case(lambda: Experts(False), lambda s: full(s, 2, 6)))
stacked = add_right("stacked_experts", case(lambda: Experts(True), lambda s: full(s, 2, 6)))


class Autocast(Tiny):
    def forward(self, *a: Any, **k: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(*a, **k).float()


bf16 = add_right("bf16", case(Autocast))
bf16_left = add_right("bf16_left", case(Autocast, left))


class Sure(Tiny):
    """As after long training: logits that leave no doubt."""

    def forward(self, *a: Any, **k: Any) -> Tensor:
        return 300 * super().forward(*a, **k)


confident = add_right("confident", case(Sure))


class Fft(Tiny):
    """A causal convolution by FFT: right but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(64, 16) / 8)

    def mix(self, x: Tensor) -> Tensor:
        n = 2 * x.shape[1]
        f = torch.fft.rfft(x, n, 1) * torch.fft.rfft(self.kernel[: x.shape[1]], n, 0)
        return torch.fft.irfft(f, n, 1)[:, : x.shape[1]]


fft = add_right("fft", case(Fft))
shared_id = {"pad_id": EOS, "eos_id": EOS}
pad_is_eos = add_right("pad_is_eos", case(batch=lambda s: padded(s, pad=EOS), **shared_id))


class ShiftedInside(Tiny):
    """Sees tokens before t only, and is trained on token t: right, in another frame."""

    def forward(self, input_ids: Tensor, **k: Any) -> Tensor:
        before = torch.cat([torch.full_like(input_ids[:, :1], BOS), input_ids[:, :-1]], 1)
        return super().forward(before)


def unshifted(model: nn.Module, batch: Batch) -> Tensor:
    return ce(feed(model, batch), batch["labels"])


shifted_inside = add_right("shifted_inside", case(ShiftedInside, loss=unshifted))


def moe(over_pad: bool) -> Any:
    """A load-balancing term over tokens (switch transformer), read off the hidden states."""

    def loss(model: Any, batch: Batch) -> Tensor:
        out, keep = feed(model, batch), batch["attention_mask"].bool()
        p = model.tok(batch["input_ids"])[..., :4].softmax(-1)
        p = p.flatten(0, 1) if over_pad else p[keep]
        return ce(out, targets(batch)) + 0.01 * 4 * p.mean(0).pow(2).sum()

    return loss


right_moe = add_right("moe", case(loss=moe(False)))
preshifted = add_right(
    "preshifted_labels",
    case(
        batch=lambda s: {**padded(s), "labels": targets(padded(s))},
        loss=lambda m, b: ce(feed(m, b), b["labels"]),
    ),
)

# ------------------------------------------------------------------------------------------ shift
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

# -------------------------------------------------------------------------------------------- pad


def raw(model: nn.Module, batch: Batch, **kw: Any) -> Tensor:
    return ce(feed(model, batch)[:, :-1], batch["input_ids"][:, 1:], **kw)


def after_the_mean(model: nn.Module, batch: Batch) -> Tensor:
    keep = batch["attention_mask"][:, 1:].float()
    return (raw(model, batch) * keep).sum() / keep.sum()


def input_mask(model: nn.Module, batch: Batch) -> Tensor:
    keep = batch["attention_mask"][:, :-1].bool()
    t = batch["input_ids"][:, 1:].masked_fill(~keep, -100)
    return ce(feed(model, batch)[:, :-1], t)


def smooth_over_pad(model: nn.Module, batch: Batch) -> Tensor:
    z, t = feed(model, batch), targets(batch)
    uniform = -z.log_softmax(-1).mean(-1)
    return 0.9 * ce(z, t) + 0.1 * uniform.mean()


add("pad", plain, "no_ignore_index", case(loss=raw))
add("pad", left_padded, "no_ignore_index_left", case(batch=left, loss=raw))
add("pad", plain, "wrong_ignore_index", case(loss=lambda m, b: raw(m, b, ignore_index=7)))
add("pad", plain, "mask_after_the_mean", case(loss=after_the_mean))
add("pad", plain, "input_mask_on_targets", case(loss=input_mask))
add("pad", right_smoothing, "smoothing_over_pad", case(loss=smooth_over_pad))
add("pad", right_z, "z_loss_over_pad", case(loss=lambda m, b: z_loss(m, b, True)))
add("pad", right_moe, "aux_over_pad", case(loss=moe(True)))
add(
    "pad",
    left_padded,
    "left_pad_trained_on_bos",
    case(batch=left, loss=lambda m, b: ce(feed(m, b)[:, :-1], b["labels"][:, 1:])),
)


class Unmasked(Tiny):
    def visible(self, ids: Tensor, mask: Tensor | None, docs: Tensor | None) -> Tensor:
        return super().visible(ids, None, docs)


class Inverted(Tiny):
    def visible(self, ids: Tensor, mask: Tensor | None, docs: Tensor | None) -> Tensor:
        return super().visible(ids, 1 - mask, docs)  # type: ignore[operator]


class NoSelf(Tiny):
    """Queries at left PAD have no key at all."""

    def visible(self, ids: Tensor, mask: Tensor | None, docs: Tensor | None) -> Tensor:
        return self.causal(ids.shape[1]) & mask.bool()[:, None, None]  # type: ignore[union-attr]


class Tiled(Tiny):
    """A mask (B * heads, T, T) made by `repeat` where `repeat_interleave` is meant."""

    def weights(self, scores: Tensor, see: Tensor) -> Tensor:
        b, h, t, _ = scores.shape
        return super().weights(scores, see.reshape(b, t, t).repeat(h, 1, 1).reshape(b, h, t, t))


add("pad", left_padded, "left_pad_attended", case(Unmasked, left))
add("pad", left_padded, "key_mask_inverted_left", case(Inverted, left))
add("pad", plain, "key_mask_inverted", case(Inverted))
add("pad", left_padded, "fully_masked_query", case(NoSelf, left))
add("pad", left_padded, "mask_tiled_wrongly", case(Tiled, left))
add("pad", plain, "mask_tiled_wrongly_right", case(Tiled))
add("pad", gru, "gru_left_pad", case(Recurrent, left))

# ----------------------------------------------------------------------------------------- causal


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

# ------------------------------------------------------------------------------------------- norm


def all_slots(model: nn.Module, batch: Batch) -> Tensor:
    return plain_sum(model, batch) / batch["input_ids"].numel()


def empty_rows(model: nn.Module, batch: Batch) -> Tensor:
    t = targets(batch)
    return (nll(feed(model, batch), t).sum(1) / (t != -100).sum(1)).mean()


def over_count(model: nn.Module, batch: Batch) -> Tensor:
    return plain_sum(model, batch) / (batch["labels"] != -100).sum()


add("norm", plain, "divided_by_slots", case(loss=all_slots))
add("norm", stream, "divided_by_slots_unpadded", case(batch=full, loss=all_slots))
add(
    "norm",
    right_accumulated,
    "mean_of_means",
    case(loss=lambda m, b: accumulated(m, b, by_token=False)),
)
add(
    "norm",
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
    "norm",
    right_accumulated,
    "mean_of_single_rows",
    case(
        batch=lambda s: padded(s, rows=2),
        loss=lambda m, b: accumulated(m, b, max(1, len(b["input_ids"]) // 2), by_token=False),
    ),
)
add("norm", plain, "first_label_counted", case(loss=over_count))
add(
    "norm",
    plain,
    "divided_twice",
    case(loss=lambda m, b: token_mean(m, b) / (targets(b) != -100).sum()),
)
add(
    "norm",
    right_accumulated,
    "divided_twice_by_calls",
    case(loss=lambda m, b: accumulated(m, b) / 3),
)
add(
    "norm",
    prompt,
    "row_without_targets",
    case(batch=lambda s: _prompt(padded(s)), loss=empty_rows),
)
add(
    "norm",
    plain,
    "only_ignored",
    case(batch=lambda s: {**padded(s), "labels": torch.full((5, 14), -100)}),
)

# -------------------------------------------------------------------------------------------- eos


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

# --------------------------------------------------------------------------------------- position


class Counting(Tiny):
    def positions(self, ids: Tensor, given: Tensor | None) -> Tensor:
        return super().positions(ids, None)


class FromTheEnd(Tiny):
    def positions(self, ids: Tensor, given: Tensor | None) -> Tensor:
        return super().positions(ids, None).flip(1)


class AlongBatch(Tiny):
    def positions(self, ids: Tensor, given: Tensor | None) -> Tensor:
        return self.pos(torch.arange(len(ids)))[:, None]


def running(seed: int) -> Batch:
    b = packed(seed)
    return {**b, "position_ids": torch.arange(18).expand_as(b["input_ids"])}


def plain_arange(seed: int) -> Batch:
    b = padded(seed, "left")
    return {**b, "position_ids": torch.arange(14).expand_as(b["input_ids"])}


add("position", left_padded, "left_pad_arange", case(Counting, left))
add("position", left_padded, "left_pad_arange_in_batch", case(batch=plain_arange))
add("position", packed_rows, "pack_not_reset", case(Counting, packed))
add("position", packed_rows, "pack_not_reset_in_batch", case(batch=running))
add("position", plain, "along_the_batch", case(AlongBatch))
add("position", plain, "from_the_end", case(FromTheEnd))


class Cached(Tiny):
    """Keeps the ids seen so far as its cache: slow, and right."""

    offset = 0

    def forward(self, input_ids: Tensor, cache: Tensor | None = None, **k: Any) -> Any:
        if cache is None:
            return super().forward(input_ids, **k), input_ids
        ids = torch.cat([cache, input_ids], 1)
        at = torch.arange(ids.shape[1]).expand_as(ids)
        at = torch.where(at >= cache.shape[1], at - self.offset, at)
        z = super().forward(ids, position_ids=at)
        return z[:, -input_ids.shape[1] :], ids


class CacheOff(Cached):
    offset = 1


def first(model: nn.Module, batch: Batch) -> Tensor:
    return ce(model(batch["input_ids"])[0], targets(batch))


cached = add_right("cached", case(Cached, loss=first))
add("position", cached, "cache_offset", case(CacheOff, loss=first))


# -------------------------------------------------------------- logits that take an unusual way


class LogProbs(Tiny):
    def forward(self, *a: Any, **k: Any) -> Tensor:
        return super().forward(*a, **k).log_softmax(-1)


class Capped(Tiny):
    def forward(self, *a: Any, **k: Any) -> Tensor:
        return 5 * torch.tanh(super().forward(*a, **k) / 5)


def chunked_head(model: Any, batch: Batch, shift: int = 1) -> Tensor:
    """The head, applied to three positions at a time, to spare memory."""
    head, model.head = model.head, nn.Identity()
    hidden = feed(model, batch)
    model.head = head
    target = targets(batch) if shift else batch["labels"]
    pairs = zip(hidden.split(3, 1), target.split(3, 1), strict=True)
    total = torch.stack([ce(head(h), t, reduction="sum") for h, t in pairs]).sum()
    return total / (target != -100).sum()


def counted_only(model: Any, batch: Batch) -> Tensor:
    """The head, applied to positions with a target alone."""
    head, model.head = model.head, nn.Identity()
    hidden, target = feed(model, batch), targets(batch)
    model.head = head
    return F.cross_entropy(head(hidden[target != -100]), target[target != -100])


log_probs = add_right("log_probs", case(LogProbs))
capped = add_right("capped", case(Capped))
chunks = add_right("chunked_head", case(loss=chunked_head))
selected = add_right("counted_only", case(loss=counted_only))
add("shift", chunks, "chunked_unshifted", case(loss=lambda m, b: chunked_head(m, b, 0)))
add("causal", chunks, "chunked_open", case(Open, loss=chunked_head))
