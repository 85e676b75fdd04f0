"""Set-ups that are right: each must raise no alarm."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import (
    BOS,
    EOS,
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
from .registry import Setup, add_right, case

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
