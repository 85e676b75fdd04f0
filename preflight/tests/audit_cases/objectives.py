"""Set-ups whose loss is no plain cross-entropy of logits: distillation, caps, dropped targets."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import Batch, Tiny, V, ce, feed, full, left, nll, padded, targets, token_mean
from .registry import Cases, case
from .right import plain, plain_sum, prompt, stream

OBJECTIVES = Cases()
add, add_right = OBJECTIVES.add, OBJECTIVES.add_right

# Distillation


def teacher(sharp: float) -> Tiny:
    """A frozen model beside the trained one; `sharp` makes it as sure as a trained one."""
    made = Tiny().eval().requires_grad_(False)
    made.head.weight *= sharp
    return made


class Student(Tiny):
    """Holds its teacher."""

    sharp = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.teacher = teacher(self.sharp)


class SharpStudent(Student):
    sharp = 8.0


def kl(z: Tensor, wanted: Tensor, keep: Tensor, tau: float = 1.0) -> Tensor:
    """Mean over kept positions of KL(wanted, z), both logits (B, T, V)."""
    p = (wanted / tau).softmax(-1)
    each = (p * (p.clamp_min(1e-30).log() - (z / tau).log_softmax(-1))).sum(-1)
    return tau**2 * (each * keep).sum() / keep.sum()


def distilled(ahead: int = 0, mix: float = 0.0, tau: float = 1.0, hard: int = 1) -> Any:
    """Teacher logits `ahead` of the student's; `mix` of the loss is that of hard labels."""

    def loss(model: Any, batch: Batch) -> Tensor:
        with torch.no_grad():
            wanted = feed(model.teacher, batch)
        z, t = feed(model, batch), targets(batch)
        soft = kl(z, wanted.roll(-ahead, 1), _inner(t, ahead), tau)
        plain = ce(z, t) if hard else ce(z, batch["labels"])
        return mix * plain + (1 - mix) * soft if mix else soft

    return loss


def _inner(t: Tensor, ahead: int) -> Tensor:
    """Counted positions that stay counted when columns move."""
    keep = t != -100
    if ahead:
        keep = keep & (t.roll(-ahead, 1) != -100)
        keep[:, -1] = keep[:, 0] = False
    return keep


def stored(seed: int) -> Batch:
    """Logits of a teacher in the batch."""
    b = padded(seed)
    gen = torch.Generator().manual_seed(seed)
    return {**b, "teacher_logits": 2 * torch.randn(*b["input_ids"].shape, V, generator=gen)}


def of_stored(model: nn.Module, batch: Batch) -> Tensor:
    given = {k: v for k, v in batch.items() if k != "teacher_logits"}
    z, t = feed(model, given), targets(batch)
    return 0.5 * kl(z, batch["teacher_logits"], t != -100) + 0.5 * ce(z, t)


def entropy_bonus(model: nn.Module, batch: Batch) -> Tensor:
    z, t = feed(model, batch), targets(batch)
    p = z.softmax(-1)
    entropy = -(p * z.log_softmax(-1)).sum(-1)[t != -100].mean()
    return ce(z, t) - 0.5 * entropy


distill = add_right("distilled", case(Student, loss=distilled()))
distill_sharp = add_right("distilled_sharp", case(SharpStudent, loss=distilled()))
distill_warm = add_right("distilled_warm", case(SharpStudent, left, distilled(tau=2.0)))
distill_mix = add_right("distilled_mix", case(Student, loss=distilled(mix=0.5)))
distill_mix_sharp = add_right("distilled_mix_sharp", case(SharpStudent, loss=distilled(mix=0.3)))
add_right("distilled_stored", case(batch=stored, loss=of_stored))
add_right("entropy_bonus", case(loss=entropy_bonus))
for name, twin, make, loss in (
    ("distilled_ahead", distill, Student, distilled(1)),
    ("distilled_sharp_ahead", distill_sharp, SharpStudent, distilled(1)),
    ("distilled_behind", distill, Student, distilled(-1)),
    ("distilled_mix_ahead", distill_mix, Student, distilled(1, 0.5)),
    ("distilled_mix_sharp_ahead", distill_mix_sharp, SharpStudent, distilled(1, 0.3)),
    ("distilled_mix_hard_unshifted", distill_mix, Student, distilled(0, 0.5, hard=0)),
):
    add("shift", twin, name, case(make, loss=loss))


# Targets that never count


def without(drop: Callable[[Tensor], Tensor]) -> Any:
    """The token mean without the targets at which `drop` of them (B, T) is True."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        t = targets(batch)
        return ce(feed(model, batch), t.masked_fill(drop(t), -100))

    return loss


def tail(t: Tensor) -> Tensor:
    return torch.arange(t.shape[1]).expand_as(t) >= t.shape[1] // 2


def odd(t: Tensor) -> Tensor:
    return (torch.arange(t.shape[1]) % 2 == 1).expand_as(t)


def first_counted(t: Tensor) -> Tensor:
    return (t != -100) & ((t != -100).cumsum(1) == 1)


def one_row(t: Tensor) -> Tensor:
    drop = torch.zeros_like(t, dtype=torch.bool)
    drop[1:2] = True
    return drop


def masked(seed: int) -> Batch:
    """No labels: `loss_mask` marks the tokens that count, here the second half of each row."""
    b = padded(seed)
    mask = b["attention_mask"].clone()
    mask[:, :5] = 0
    return {"input_ids": b["input_ids"], "attention_mask": b["attention_mask"], "loss_mask": mask}


def of_mask(model: nn.Module, batch: Batch) -> Tensor:
    given = {k: v for k, v in batch.items() if k != "loss_mask"}
    keep = F.pad(batch["loss_mask"], (0, 1))[:, 1:].bool()
    return ce(feed(model, given), targets(given).masked_fill(~keep, -100))


def masked_and_labelled(seed: int) -> Batch:
    return {**masked(seed), "labels": padded(seed)["labels"]}


def fed_short(model: nn.Module, batch: Batch) -> Tensor:
    """The model gets all tokens but the last, and the loss shifts them once more."""
    short = {k: v[:, :-1] for k, v in batch.items()}
    return token_mean(model, short)


def after_marker(model: nn.Module, batch: Batch) -> Tensor:
    """No labels: what comes before the first marker of a row is a prompt."""
    ids = batch["input_ids"]
    begun = (ids == 5).long().cumsum(1) > 0
    return ce(feed(model, batch), targets(batch).masked_fill(~begun, -100))


def marked(seed: int) -> Batch:
    ids = full(seed)["input_ids"]
    ids[ids == 5] = 6
    for b in range(len(ids)):
        ids[b, 3 + b] = 5
    return {"input_ids": ids}


def selective(model: nn.Module, batch: Batch) -> Tensor:
    """The half of the targets with the larger loss (as Rho-1 selects tokens)."""
    t = targets(batch)
    each = nll(feed(model, batch), t)
    keep = (t != -100) & (each >= each[t != -100].median())
    return each[keep].mean()


def clm_stream(seed: int) -> Batch:
    b = full(seed)
    return {**b, "labels": b["input_ids"].clone()}


loss_mask = add_right("loss_mask", case(batch=masked, loss=of_mask))
add_right("loss_mask_and_labels", case(batch=masked_and_labelled, loss=of_mask))
add_right("fed_short", case(batch=full, loss=fed_short))
add_right("after_marker", case(batch=marked, loss=after_marker))
add_right("selective", case(loss=selective))
labelled = add_right("labelled_stream", case(batch=clm_stream))
for name, twin, batch, drop in (
    ("half_dropped", plain, padded, tail), ("every_second_dropped", plain, padded, odd),
    ("one_row_dropped", labelled, clm_stream, one_row),
    ("tail_dropped", labelled, clm_stream, tail), ("tail_dropped_unlabelled", stream, full, tail),
    ("first_of_answer_dropped", prompt, lambda s: prompt(s)[1], first_counted),
    ("first_dropped", labelled, clm_stream, first_counted),
    ("first_dropped_left", plain, left, first_counted),
):  # fmt: skip
    add("pad", twin, name, case(batch=batch, loss=without(drop)))
add("pad", labelled, "last_label_dropped", case(batch=clm_stream, loss=fed_short))


# Probabilities in place of logits


class Probabilities(Tiny):
    def forward(self, *a: Any, **k: Any) -> Tensor:
        return super().forward(*a, **k).softmax(-1)


class LastModule(Tiny):
    """Its head ends in a softmax module."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(self.head, nn.Softmax(-1))  # type: ignore[assignment]


def of_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    p, t = feed(model, batch), targets(batch)
    return F.nll_loss(p.log().flatten(0, 1), t.flatten())


add_right("nll_of_probabilities", case(Probabilities, loss=of_probabilities))
add("reduction", plain, "softmax_twice", case(Probabilities))
add("reduction", plain, "softmax_module", case(LastModule))
add("reduction", stream, "softmax_twice_stream", case(Probabilities, full))


# A cap or a scale of the logits inside the loss


def capped(size: float, reduce: Any = token_mean) -> Any:
    return lambda m, b: reduce(_Edited(m, lambda z: size * (z / size).tanh()), b)


def scaled(size: float, reduce: Any = token_mean) -> Any:
    return lambda m, b: reduce(_Edited(m, lambda z: z * size), b)


class _Edited(nn.Module):
    """A model whose logits are edited after it returns them."""

    def __init__(self, model: nn.Module, edit: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.edit = model, edit

    def forward(self, **k: Any) -> Tensor:
        return self.edit(self.model(**k))


def by_slots(model: nn.Module, batch: Batch) -> Tensor:
    return plain_sum(model, batch) / batch["input_ids"].numel()


class Grown(Tiny):
    """Logits of the size that a small factor is there to undo."""

    def forward(self, *a: Any, **k: Any) -> Tensor:
        return 12 * super().forward(*a, **k)


def smooth(model: nn.Module, batch: Batch) -> Tensor:
    return ce(feed(model, batch), targets(batch), label_smoothing=0.1)


for name, edited in {
    "capped_30_in_loss": case(loss=capped(30.0)),
    "capped_5_in_loss": case(loss=capped(5.0)),
    "capped_sum": case(loss=capped(30.0, plain_sum)),
    "scaled_down_in_loss": case(Grown, loss=scaled(1 / 16)),
    "scaled_down_left": case(batch=left, loss=scaled(1 / 8)),
    "scaled_up_in_loss": case(loss=scaled(12.0)),
    "scaled_smooth": case(loss=scaled(0.25, smooth)),
    "scaled_down_sum": case(Grown, loss=scaled(1 / 16, plain_sum)),
}.items():
    add_right(name, edited)
scaled_twin = add_right("scaled_twin", case(loss=scaled(1 / 8)))
capped_twin = add_right("capped_twin", case(loss=capped(20.0)))
add("reduction", scaled_twin, "scaled_by_slots", case(loss=scaled(1 / 8, by_slots)))
add("reduction", capped_twin, "capped_by_slots", case(loss=capped(20.0, by_slots)))
over_pad = scaled(1 / 8, lambda m, b: ce(feed(m, b)[:, :-1], b["input_ids"][:, 1:]))
add("pad", scaled_twin, "scaled_pad_counts", case(loss=over_pad))
