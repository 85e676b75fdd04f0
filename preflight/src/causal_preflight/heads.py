"""Several heads on one batch: what each is trained on, and which of them is the main one.

A head of multi-token prediction (Gloeckle et al., arXiv:2404.19737; DeepSeek-V3, arXiv:2412.19437)
is trained on token t + k. Once its logits are moved by k - 1 columns, the rules for the next token
hold for it as well: its target follows, and it may see no token after its own position.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TypeVar

from torch import Tensor

from causal_preflight.batch import AuditBatch, shift_left

_TRAINED = 1e-3  # fraction of the largest weight below which a position has no target
Key = TypeVar("Key")


@dataclass
class Observation:
    """Loss of one run, its logits in float32 (B, T, V), and where there are any: `made` (B, T).

    The logits of further heads lie beside those of the main one, along the vocabulary (`widths`):
    moved to the position before their target, and 0 where they are not trained.
    """

    loss: float
    logits: Tensor
    made: Tensor
    widths: list[int]

    @property
    def main(self) -> Tensor:
        """Logits of the main head alone."""
        return self.logits[..., : self.widths[0]]


@dataclass
class Readout:
    """What the loss trained, per position (B, T): see `gradient_fit.fit`. 0 where nothing.

    `pieces` counts the pieces of logits that it used: several calls, or a head applied in chunks.
    `extra` holds the same for further heads, in columns that are moved by `ahead`.
    """

    loss: float
    residual: float
    pieces: int
    target: Tensor
    weight: Tensor
    onehot_weight: Tensor
    max_abs_grad: Tensor
    grad_sum: Tensor
    ahead: int = 0
    number: int = 0
    extra: list["Readout"] = field(default_factory=list)

    @cached_property
    def trained(self) -> Tensor:
        """(B, T) bool: positions that the loss trains on a target."""
        weight = self.weight.abs()
        least = _TRAINED * weight.max().clamp_min(1e-300)
        return weight.minimum(self.onehot_weight.abs()) > least

    @property
    def heads(self) -> list["Readout"]:
        """This one, of the main head, and those of further heads."""
        return [self, *self.extra]

    @property
    def name(self) -> str:
        """What a message begins with."""
        where = f", its columns moved by {self.ahead}" if self.ahead else ""
        return f"head {self.number}{where}: " if self.number else ""

    def moved(self, ahead: int) -> "Readout":
        """Every column moved to the right; as it is if a target would leave the row."""
        if not ahead or bool(self.trained[:, -ahead:].any()):
            return self
        names = ("target", "weight", "onehot_weight", "max_abs_grad", "grad_sum")
        columns = {name: getattr(self, name).roll(ahead, 1) for name in names}
        for name, x in columns.items():
            x[:, :ahead] = -1 if name == "target" else 0
        return replace(self, ahead=ahead, **columns)


@dataclass(frozen=True)
class Head:
    """By how many columns a head's readout and its logits are moved, and where they then count."""

    ahead: int
    move: int
    counts: Tensor


def offset_of(batch: AuditBatch, r: Readout, most: int = 4) -> int | None:
    """The k <= `most` for which t is mostly trained on token t + k; None where no k fits."""
    on, width = r.trained, batch.ids.shape[1]
    scores: dict[int, float] = {}
    for k in range(-2, min(most + 1, width)):
        inside = on.clone()  # positions for which the row holds a token t + k
        inside[:, : max(0, -k)] = False
        inside[:, width - max(0, k) :] = False
        if bool(inside.any()):
            hits = float((batch.ids.roll(-k, 1) == r.target)[inside].float().mean())
            scores[k] = hits * min(1.0, float(inside.sum() / on.sum()) + 0.25)
    best = max(scores, key=lambda k: scores[k], default=0)
    if scores.get(1, 0.0) >= 0.9 * scores.get(best, 1.0):
        best = 1
    return best if scores.get(best, 0.0) >= 0.5 else None


def arrange(batch: AuditBatch, found: Mapping[Key, Readout], frozen: bool) -> dict[Key, Head]:
    """The heads that are trained on tokens, the main one first; `found` is in the order of calls.

    The main one is trained on the next token, with the largest weight. Right are offsets 1, 2, 3,
    ... without a gap, each once; that of the main head is also right before it, and where there is
    no other (deep supervision). Over a `frozen` model they may begin at 2 (Medusa,
    arXiv:2401.10774). A wrong head does not count, and is moved so that it shows.
    """
    offsets = {h: offset_of(batch, r, 4 + len(found)) for h, r in found.items()}
    known = set(offsets.values())
    first = 2 if frozen and {2, 3} <= known and 1 not in known else 1
    last = next(k for k in range(first, len(found) + 3) if k not in known) - 1

    def rank(h: Key) -> tuple[bool, bool, float]:
        k = offsets[h]
        return k == first, k is not None, round(float(found[h].weight.abs().sum()), 4)

    main = max(reversed(found), key=rank)
    heads, taken, order = dict[Key, Head](), set[int | None](), list(found)
    for h in (main, *(h for h in order if h != main and offsets[h] is not None)):
        k, before = offsets[h] or 0, order.index(h) < order.index(main)
        again = k in taken and last > first and not (k == first and before)
        right = first <= k <= last and not again
        ahead = k - 1 + again if first <= k <= last else 0
        counts = found[h].moved(ahead).trained & right & (batch.doc.roll(ahead, 1) == batch.doc)
        heads[h] = Head(ahead, 0 if h == main else ahead, counts)
        taken.add(k)
    return heads


def trained_too_near(heads: list[Head], seen: list[Tensor], late: Tensor) -> bool:
    """Whether each head whose logits are `seen` to move with `late` tokens lacks a shift.

    Such a head reads a few coming tokens and no more, and is trained as far ahead as another head,
    which does not read them. All are (B, T) bool, one of `seen` for each head.
    """
    near = late
    for _ in heads[1:]:
        near = near | shift_left(near, False)
    moves = [bool(m.any()) for m in seen]
    blind = {h.ahead for h, hit in zip(heads, moves, strict=True) if not hit}
    few = not any(bool((m & ~near).any()) for m in seen)
    return few and all(h.ahead in blind for h, hit in zip(heads, moves, strict=True) if hit)
