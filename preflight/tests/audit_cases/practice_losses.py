"""Held-out set-ups in the style of 2024 to 2026, right and wrong: losses, collators, templates."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .parts import BOS, EOS, PAD, Batch, Tiny, V, ce, feed, full, nll, padded, targets, token_mean
from .practice import run
from .registry import Cases, case

LOSSES = Cases()
SHARED = {"pad_id": EOS, "eos_id": EOS}


def logits(model: nn.Module, batch: Batch) -> Tensor:
    keys = ("input_ids", "attention_mask", "position_ids", "document_ids")
    return feed(model, {k: v for k, v in batch.items() if k in keys})


def unshifted(batch: Batch) -> Tensor:
    return batch.get("labels", batch["input_ids"])


# Weights of the batch: they are noted, and what is around them is judged.


def weighted(seed: int) -> Batch:
    gen = torch.Generator().manual_seed(seed)
    b = padded(seed)
    return {**b, "token_weights": torch.rand(b["input_ids"].shape, generator=gen) + 0.2}


def with_advantages(seed: int) -> Batch:
    b = padded(seed)
    return {**b, "advantages": torch.tensor([1.3, -0.7, 0.4, -1.1, 0.6])}


def by_weights(model: nn.Module, batch: Batch, goal: Any = targets, normed: bool = True) -> Tensor:
    t, w = goal(batch), batch["token_weights"]
    w = F.pad(w[:, 1:], (0, 1)) * (t != -100)
    each = nll(logits(model, batch), t) * w
    return each.sum() / (w.sum() if normed else (t != -100).sum())


def by_advantage(model: nn.Module, batch: Batch, goal: Any = targets) -> Tensor:
    t = goal(batch)
    each = nll(logits(model, batch), t).sum(1) / (t != -100).sum(1)
    return (each * batch["advantages"]).mean()


def over_pad(batch: Batch) -> Tensor:
    return F.pad(batch["input_ids"][:, 1:], (0, 1), value=-100)


LOSSES.pair(
    "token weights",
    case(batch=weighted, loss=by_weights),
    shift=case(batch=weighted, loss=lambda m, b: by_weights(m, b, unshifted)),
    pad=case(batch=weighted, loss=lambda m, b: by_weights(m, b, over_pad)),
)
LOSSES.pair(
    "token weights over a count",
    case(batch=weighted, loss=lambda m, b: by_weights(m, b, normed=False)),
)
LOSSES.pair(
    "advantages",
    case(batch=with_advantages, loss=by_advantage),
    shift=case(batch=with_advantages, loss=lambda m, b: by_advantage(m, b, unshifted)),
    pad=case(batch=with_advantages, loss=lambda m, b: by_advantage(m, b, over_pad)),
)


def focal(model: nn.Module, batch: Batch, goal: Any = targets) -> Tensor:
    t = goal(batch)
    each = nll(logits(model, batch), t)
    return ((1 - (-each).exp()).pow(2) * each).sum() / (t != -100).sum()


def class_weights(model: nn.Module, batch: Batch, goal: Any = targets) -> Tensor:
    w = torch.ones(V)
    w[EOS], w[5], w[7], w[11] = 4.0, 0.5, 2.0, 3.0
    return ce(logits(model, batch), goal(batch), weight=w)


for name, loss in (("focal", focal), ("class weights", class_weights)):
    LOSSES.pair(
        name,
        case(loss=loss),
        shift=case(loss=lambda m, b, f=loss: f(m, b, unshifted)),
        pad=case(loss=lambda m, b, f=loss: f(m, b, over_pad)),
    )


# Fill in the middle: the collator puts prefix, suffix and middle in another order.


def fim(seed: int) -> Batch:
    b = full(seed, rows=4, width=12)["input_ids"]
    b = torch.where(b < 6, b + 6, b)
    pre, suf, mid, end = (torch.full((4, 1), t) for t in (3, 4, 5, EOS))
    ids = torch.cat([pre, b[:, :4], suf, b[:, 8:], mid, b[:, 4:8], end], 1)
    return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


LOSSES.pair(
    "fill in the middle",
    case(batch=fim),
    shift=case(batch=fim, loss=lambda m, b: ce(logits(m, b), b["labels"])),
    shift_rolled=case(batch=fim, loss=lambda m, b: ce(logits(m, b), b["labels"].roll(-1, 1))),
)


# Chats: only the assistant's tokens are targets.


def chat(seed: int) -> Batch:
    """Two turns each: user and assistant; an EOS ends each answer."""
    gen = torch.Generator().manual_seed(seed)
    ids, keep = torch.full((5, 18), PAD), torch.zeros(5, 18, dtype=torch.bool)
    for b in range(5):
        row, on = [BOS], [False]
        for turn in range(2):
            words = torch.randint(3, V, (6,), generator=gen).tolist()
            said = 2 + (b + turn) % 3
            row += [*words[:said], *words[said : said + 3], EOS]
            on += [False] * said + [True] * (len(row) - len(on) - said)
        ids[b, : len(row)], keep[b, : len(on)] = torch.tensor(row), torch.tensor(on)
    mask = (ids != PAD).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~keep, -100)}


def early(model: nn.Module, batch: Batch) -> Tensor:
    """The mask of the answer is applied one token too early."""
    on = batch["labels"] != -100
    t = batch["input_ids"][:, 1:].masked_fill(~on[:, :-1], -100)
    return ce(logits(model, batch)[:, :-1], t)


def answers(model: nn.Module, batch: Batch) -> Tensor:
    t = targets(batch)
    each = nll(logits(model, batch), t).sum(1) / (t != -100).sum(1)
    return each.mean()


def no_end(seed: int) -> Batch:
    b = chat(seed)
    return {**b, "labels": b["labels"].masked_fill(b["input_ids"] == EOS, -100)}


LOSSES.pair(
    "chat",
    case(batch=chat),
    pad_mask_one_early=case(batch=chat, loss=early),
    pad_user_trained=case(
        batch=chat, loss=lambda m, b: token_mean(m, {**b, "labels": over_user(b)})
    ),
    eos_never=case(batch=no_end),
    shift=case(batch=chat, loss=lambda m, b: ce(logits(m, b), b["labels"])),
    shift_twice=case(batch=chat, loss=lambda m, b: ce(logits(m, b)[:, :-1], targets(b)[:, 1:])),
    reduction_empty=case(batch=chat, loss=answers),
)


def over_user(batch: Batch) -> Tensor:
    return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)


# Accumulation, several passes, and terms beside the cross-entropy.


def num_items(model: nn.Module, batch: Batch, each: bool = False) -> Tensor:
    total, parts = (targets(batch) != -100).sum(), []
    for at in (0, 2):
        part = {k: v[at : at + 2] if at == 0 else v[at:] for k, v in batch.items()}
        s = ce(logits(model, part), targets(part), reduction="sum")
        parts.append(s / ((targets(part) != -100).sum() * 2 if each else total))
    return torch.stack(parts).sum()


LOSSES.pair("num_items_in_batch", case(loss=num_items),
            reduction_each=case(loss=lambda m, b: num_items(m, b, True)))  # fmt: skip


def r_drop(model: nn.Module, batch: Batch, everywhere: bool = False) -> Tensor:
    """Two passes with other dropout, drawn to each other."""
    a, b = logits(model, batch), logits(model, batch)
    keep = torch.ones_like(batch["input_ids"]).bool() if everywhere else targets(batch) != -100
    kl = F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    both = 0.5 * (ce(a, targets(batch)) + ce(b, targets(batch)))
    return both + 0.1 * kl[keep].mean()


def z_loss(model: nn.Module, batch: Batch, everywhere: bool = False) -> Tensor:
    z, t = logits(model, batch), targets(batch)
    keep = torch.ones_like(t).bool() if everywhere else t != -100
    return ce(z, t) + 1e-2 * z.logsumexp(-1)[keep].pow(2).mean()


LOSSES.pair("z-loss", case(loss=z_loss), pad_everywhere=case(loss=lambda m, b: z_loss(m, b, True)))
LOSSES.pair("two passes", case(lambda: Tiny(dropout=0.2), loss=r_drop))


class Auxiliary(Tiny):
    """Keeps the load of two experts, for a term of the loss."""

    def mix(self, x: Tensor) -> Tensor:
        self.load = x[..., :2].softmax(-1)
        return x


def balanced(model: Any, batch: Batch, everywhere: bool = False) -> Tensor:
    loss, load = token_mean(model, batch), model.load
    load = load.flatten(0, 1) if everywhere else load[batch["attention_mask"].bool()]
    return loss + 0.1 * (load.mean(0) * torch.tensor([1.0, 3.0])).sum()


LOSSES.pair("load of experts", run(Auxiliary, loss=balanced),
            pad_counted=run(Auxiliary, loss=lambda m, b: balanced(m, b, True)))  # fmt: skip


# Where PAD and EOS are one id.


def one_id(seed: int) -> Batch:
    return padded(seed, pad=EOS)


def by_value(batch: Batch) -> Tensor:
    return F.pad(batch["input_ids"][:, 1:], (0, 1), value=EOS).masked_fill(
        F.pad(batch["input_ids"][:, 1:], (0, 1), value=EOS) == EOS, -100
    )


LOSSES.pair(
    "PAD is EOS",
    case(batch=one_id, **SHARED),
    eos_ignored_by_value=case(
        batch=one_id, loss=lambda m, b: ce(logits(m, b), by_value(b)), **SHARED
    ),
    pad_counted=case(batch=one_id, loss=lambda m, b: ce(logits(m, b), over_pad(b)), **SHARED),
)
