"""Held-out set-ups in the style of 2024 to 2026, right and wrong: convolutions, scans, experts."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import Tiny, full, left
from .practice import run
from .registry import Cases

MIXING = Cases()


class ShortConv(Tiny):
    """A depthwise convolution after each block; `lean` columns of padding on the left."""

    lean = 3

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(16, 16, 4, groups=16)

    def mix(self, x: Tensor) -> Tensor:
        return x + self.conv(F.pad(x.mT, (self.lean, 3 - self.lean))).mT


class Trimmed(ShortConv):
    """Padding on both sides; the surplus is cut off at the end, or at the start."""

    cut = slice(None, -3)

    def mix(self, x: Tensor) -> Tensor:
        return x + self.conv(F.pad(x.mT, (3, 3)))[..., self.cut].mT


MIXING.pair("short convolution", run(ShortConv), causal_same=run(ShortConv, lean=2),
            causal_right=run(ShortConv, lean=0))  # fmt: skip
MIXING.pair("trimmed convolution", run(Trimmed), causal_wrong_end=run(Trimmed, cut=slice(3, None)))


class LongConv(Tiny):
    """A convolution by FFT over the row; without room for twice the length it wraps around."""

    room = 2

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(64, 16) / 8)

    def mix(self, x: Tensor) -> Tensor:
        t = x.shape[1]
        f = torch.fft.rfft(x, self.room * t, 1) * torch.fft.rfft(self.kernel[:t], self.room * t, 0)
        return torch.fft.irfft(f, self.room * t, 1)[:, :t]


MIXING.pair("FFT convolution", run(LongConv), causal_wraps=run(LongConv, room=1))


class Scan(nn.Module):
    """A gated linear recurrence, in chunks of four; ways to get it wrong."""

    way = "right"

    def __init__(self) -> None:
        super().__init__()
        self.tok, self.norm = nn.Embedding(29, 16), nn.LayerNorm(16)
        self.gate, self.value = nn.Linear(16, 16), nn.Linear(16, 16)
        self.mlp, self.head = nn.Linear(16, 16), nn.Linear(16, 29)
        self.last: Tensor | None = None

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **_: Any) -> Tensor:
        x = self.tok(input_ids)
        keep, new = self.gate(x).sigmoid(), self.value(x)
        if self.way == "reversed":
            keep, new = keep.flip(1), new.flip(1)
        if self.way == "skips pad" and attention_mask is not None:
            keep, new = (z.where(attention_mask[..., None] > 0, f) for z, f in
                         ((keep, torch.ones(())), (new, torch.zeros(()))))  # fmt: skip
        state, states = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            if self.way == "rows" and t == 0:
                state = new[:, -1].roll(1, 0)
            state = keep[:, t] * state + (1 - keep[:, t]) * new[:, t]
            states.append(state)
        y = torch.stack(states, 1)
        if self.way == "reversed":
            y = y.flip(1)
        if self.way == "chunk":  # the state at the end of its chunk, for each position
            y = y[:, [min(t | 3, y.shape[1] - 1) for t in range(y.shape[1])]]
        if self.way == "both":
            y = y + y.flip(1)
        return self.head(self.norm(y + F.silu(self.mlp(y))))


MIXING.pair(
    "scan",
    run(Scan),
    causal_reversed=run(Scan, way="reversed"),
    causal_end_of_chunk=run(Scan, way="chunk"),
    causal_state_of_another_row=run(Scan, way="rows"),
    causal_both=run(Scan, way="both"),
)
MIXING.pair("scan left", run(Scan, left, way="skips pad"), pad_in_the_state=run(Scan, left))


class TokenShift(Tiny):
    """Half of the channels come from the token before."""

    way = "pad"

    def mix(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        before = {
            "pad": F.pad(a, (0, 0, 1, 0))[:, :-1],
            "roll": a.roll(1, 1),
            "next": F.pad(a, (0, 0, 0, 1))[:, 1:],
        }[self.way]
        return torch.cat([before, b], -1)


MIXING.pair("token shift", run(TokenShift), causal_rolled=run(TokenShift, way="roll"),
            causal_next=run(TokenShift, way="next"))  # fmt: skip


class Linear(Tiny):
    """Linear attention by running sums, or by sums over the row."""

    way = "running"

    def attend(self, x: Tensor, i: int, see: Tensor) -> Tensor:
        q, k, v = (self.split(z) for z in self.qkv[i](x).chunk(3, -1))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv, total = k[..., :, None] * v[..., None, :], k
        if self.way == "row":
            kv, total = kv.sum(2, keepdim=True), k.sum(2, keepdim=True)
        else:
            kv, total = kv.cumsum(2), k.cumsum(2)
        if self.way == "norm":
            total = k.sum(2, keepdim=True)
        return self.merge((q[..., None] * kv).sum(-2) / (q * total).sum(-1, keepdim=True))


MIXING.pair("linear attention", run(Linear), causal_sum_of_the_row=run(Linear, way="row"),
            causal_denominator=run(Linear, way="norm"))  # fmt: skip


class Capacity(Tiny):
    """Two experts; each takes the first tokens of a row that choose it, up to its capacity."""

    way = "row"

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 2)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(2))

    def mix(self, x: Tensor) -> Tensor:
        p = self.router(x).softmax(-1)
        chosen = F.one_hot(p.argmax(-1), 2)  # (b, t, 2)
        if self.way == "batch":
            place = chosen.flatten(0, 1).cumsum(0).view_as(chosen)
        elif self.way == "best":
            score = (p * chosen).argsort(1, descending=True).argsort(1) + 1
            place = score
        else:
            place = chosen.cumsum(1)
        room = 9 if self.way == "batch" else 3
        kept = chosen * (place <= room)
        out = torch.stack([e(x) for e in self.experts], -1)
        return x + (out * (p * kept)[..., None, :]).sum(-1)


MIXING.pair("experts with capacity", run(Capacity), causal_best_first=run(Capacity, way="best"),
            causal_over_the_batch=run(Capacity, way="batch"))  # fmt: skip


class Normed(Tiny):
    """A norm over channels; or over time as well, or by the running mean."""

    way = "channels"

    def mix(self, x: Tensor) -> Tensor:
        if self.way == "time":
            return F.layer_norm(x.mT, x.mT.shape[-1:]).mT
        if self.way == "running":
            count = torch.arange(1, x.shape[1] + 1)[:, None]
            return x - x.cumsum(1) / count
        if self.way == "group":
            return F.group_norm(x.mT, 4).mT
        return F.rms_norm(x, x.shape[-1:])


MIXING.pair("norms", run(Normed), causal_over_time=run(Normed, way="time"),
            causal_group_norm=run(Normed, way="group"))  # fmt: skip
MIXING.pair("running mean", run(Normed, way="running"))


class Noisy(Tiny):
    """Noise on the embeddings in train mode (NEFTune)."""

    def positions(self, ids: Tensor, given: Tensor | None) -> Tensor:
        x = super().positions(ids, given)
        return x + 0.1 * torch.randn(*ids.shape, 16) if self.training else x


MIXING.pair("noisy embeddings", run(Noisy))


class Previous(Tiny):
    """Adds a table of hashed pairs of tokens: this one and the one before, or the next."""

    lag = 1

    def positions(self, ids: Tensor, given: Tensor | None) -> Tensor:
        other = F.pad(ids, (1, 0))[:, :-1] if self.lag > 0 else F.pad(ids, (0, 1))[:, 1:]
        return super().positions(ids, given) + self.pos((ids * 7 + other * 13) % 61)


MIXING.pair("hashed pairs", run(Previous), causal_next=run(Previous, lag=-1))
MIXING.pair("hashed pairs, stream", run(Previous, full), causal_next=run(Previous, full, lag=-1))
