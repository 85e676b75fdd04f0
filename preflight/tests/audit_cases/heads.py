"""Set-ups with several heads: multi-token prediction, deep supervision, auxiliary heads.

They are a collection of their own, as the audit of each head takes its time.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .head_models import (
    Beside,
    Chain,
    Deep,
    DeepOpen,
    Deepseek,
    Frozen,
    Functional,
    Loss,
    LossLate,
    Medusa,
    Mixed,
    NextRow,
    OneMore,
    OpenBlock,
    OpenTrainOnly,
    SeesDocuments,
    Sliced,
    Stacked,
    TimeFirst,
    TrainOnly,
    TwoOn,
    ahead,
)  # fmt: skip
from .parts import Batch, Tiny, V, ce, feed, left, packed, padded, token_mean
from .registry import Cases, Setup, case

Build = Callable[[int], Setup]
HEADS = Cases()


def right(name: str, make: Any, loss: Any, batch: Any = padded) -> Build:
    return HEADS.add_right(name, case(make, batch, loss))


def wrong(label: str, twin: Build, name: str, make: Any, loss: Any, batch: Any = padded) -> None:
    HEADS.add(label, twin, name, case(make, batch, loss))


def multi(*offsets: int, weights: tuple[float, ...] = (1.0, 0.3, 0.1)) -> Any:
    """Loss of a model that returns a sequence of logits, each trained on its own offset."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        out = feed(model, batch)
        out = out.unbind(2) if isinstance(out, Tensor) else out
        pairs = zip(weights, out, offsets, strict=False)
        return torch.stack([w * ce(z, ahead(batch, k)) for w, z, k in pairs]).sum()

    return loss


def beside(term: Callable[[Tensor, Tensor, Batch], Tensor], k: int = 1) -> Any:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        z, other = feed(model, batch)
        return ce(z, ahead(batch, k)) + 0.5 * term(other, z, batch)

    return loss


def value(other: Tensor, z: Tensor, batch: Batch) -> Tensor:
    keep = batch["attention_mask"].bool()
    return (other[..., 0][keep] - batch["input_ids"][keep] / V).pow(2).mean()


def classes(other: Tensor, z: Tensor, batch: Batch) -> Tensor:
    return F.cross_entropy(other, batch["input_ids"][:, 3])


def tags(other: Tensor, z: Tensor, batch: Batch) -> Tensor:
    """A class of 31 for each token, which is no token."""
    tag = (batch["input_ids"] * 7 + 3) % 31
    return ce(other, tag.masked_fill(batch["attention_mask"] == 0, -100))


def student(other: Tensor, z: Tensor, batch: Batch) -> Tensor:
    keep = batch["attention_mask"].bool()
    p = z.detach()[keep].softmax(-1)
    return F.kl_div(other[keep].log_softmax(-1), p, reduction="batchmean")


def composed(model: Any, batch: Batch, k: int = 2) -> Tensor:
    """The parts of the model, put together in the loss: the embedding is called first."""
    ids = batch["input_ids"]
    x = model.tok(ids) + model.pos(torch.arange(ids.shape[1]))
    see = model.visible(ids, batch.get("attention_mask"), None)
    for i in range(2):
        x = x + model.out[i](model.attend(model.ln[i](x), i, see))
        x = x + model.mlp[i](x)
    y = model.join[0](torch.cat([x, model.tok(ids.roll(-1, 1))], -1))
    z, y = model.head(model.final(x)), model.head(model.final(y))
    return ce(z, ahead(batch, 1)) + 0.3 * ce(y, ahead(batch, k))


def chunked(model: Any, batch: Batch, *offsets: int) -> Tensor:
    """Each head is applied to five positions at a time."""
    head, model.head = model.head, nn.Identity()
    states = feed(model, batch)
    model.head = head
    total = []
    for x, k in zip(states, offsets, strict=True):
        t = ahead(batch, k)
        pairs = zip(x.split(5, 1), t.split(5, 1), strict=True)
        total += [ce(head(h), c, reduction="sum") / (t != -100).sum() for h, c in pairs]
    return torch.stack(total).sum()


def one_by_one(model: nn.Module, batch: Batch, *offsets: int) -> Tensor:
    """A backward pass for each head, to hold the logits of one at a time (Gloeckle et al.)."""
    losses = [ce(z, ahead(batch, k)) for z, k in zip(feed(model, batch), offsets, strict=True)]
    for loss in losses:
        loss.backward(retain_graph=True)
    return torch.stack(losses).sum().detach()


def from_object(*offsets: int) -> Any:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        out = feed(model, batch)
        heads = zip((out.logits, *out.mtp_logits), offsets, strict=True)
        return torch.stack([ce(z, ahead(batch, k)) for z, k in heads]).mean()

    return loss


def time_first(*offsets: int) -> Any:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        heads = zip(feed(model, batch), offsets, strict=True)
        return torch.stack([ce(z.transpose(0, 1), ahead(batch, k)) for z, k in heads]).sum()

    return loss


def shifted_labels(model: nn.Module, batch: Batch, k: int = 1) -> Tensor:
    """Labels that are shifted already, as of nanoGPT; those of the next head once more."""
    z, y = feed(model, batch)
    return ce(z, batch["labels"]) + 0.3 * ce(y[:, :-k], batch["labels"][:, k:])


def next_tokens(seed: int) -> Batch:
    ids = stream(seed)["input_ids"]
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def r_drop(model: nn.Module, batch: Batch) -> Tensor:
    """Two passes with other dropout, both trained."""
    return (token_mean(model, batch) + token_mean(model, batch)) / 2


def on_pad(model: nn.Module, batch: Batch) -> Tensor:
    z, y = feed(model, batch)[:2]
    return ce(z, ahead(batch, 1)) + 0.3 * ce(y[:, :-2], batch["input_ids"][:, 2:])


def across(model: nn.Module, batch: Batch) -> Tensor:
    z, y = feed(model, batch)[:2]
    t = batch["input_ids"].masked_fill(batch["document_ids"] < 0, -100)
    return ce(z, ahead(batch, 1)) + 0.3 * ce(y[:, :-2], t[:, 2:])


def wrapped(model: nn.Module, batch: Batch, cut: int = 0) -> Tensor:
    z, y = feed(model, batch)[:2]
    t = batch["input_ids"].roll(-2, 1)
    if cut:
        t[:, -cut:] = -100
    return ce(z, ahead(batch, 1)) + 0.3 * ce(y, t)


def stream(seed: int) -> Batch:
    """No PAD and no labels."""
    gen = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(3, V, (4, 14), generator=gen)}


MEAN = (1 / 3, 1 / 3, 1 / 3)
EVEN = (1.0, 1.0)

medusa = right("medusa", Medusa, multi(1, 2, 3))
medusa_mean = right("medusa_mean", Medusa, multi(1, 2, 3, weights=MEAN))
medusa_left = right("medusa_left", Medusa, multi(1, 2, 3), left)
medusa_packed = right("medusa_packed", Medusa, multi(1, 2, 3), packed)
wrong("shift", medusa, "medusa_unshifted", Medusa, multi(1, 0, 1))
wrong("shift", medusa, "medusa_last_late", Medusa, multi(1, 2, 4))
wrong("shift", medusa, "medusa_main_unshifted", Medusa, multi(0, 2, 3))
wrong("shift", medusa_mean, "medusa_all_late", Medusa, multi(2, 3, 4, weights=MEAN))
wrong("shift", medusa_mean, "medusa_all_early", Medusa, multi(0, 1, 2, weights=MEAN))
wrong("shift", medusa_packed, "medusa_across_documents", Medusa, across, packed)
wrong("pad", medusa, "medusa_on_pad", Medusa, on_pad)

frozen = right("medusa_frozen", Frozen, multi(2, 3))
wrong("shift", frozen, "medusa_frozen_late", Frozen, multi(3, 4))

stacked = right("stacked", Stacked, multi(1, 2, 3, weights=MEAN))
wrong("shift", stacked, "stacked_unshifted", Stacked, multi(0, 1, 2, weights=MEAN))
wrong("shift", stacked, "stacked_gap", Stacked, multi(1, 2, 4, weights=MEAN))

deepseek = right("deepseek", Deepseek, multi(1, 2))
deepseek_even = right("deepseek_even", Deepseek, multi(1, 2, weights=EVEN))
deepseek_packed = right("deepseek_packed", Deepseek, multi(1, 2), packed)
deepseek_left = right("deepseek_left", Deepseek, multi(1, 2), left)
deepseek_stream = right("deepseek_stream", Deepseek, lambda m, b: wrapped(m, b, 2), stream)
chain = right("chain", Chain, multi(1, 2, 3))
sliced = right("sliced", Sliced, multi(1, 2))
train_only = right("train_only", TrainOnly, multi(1, 2))
inside = right("loss_inside", Loss, None)
wrong("shift", deepseek, "deepseek_copies", Deepseek, multi(1, 1))
wrong("shift", deepseek_even, "deepseek_copies_even", Deepseek, multi(1, 1, weights=EVEN))
wrong("shift", deepseek, "deepseek_late", Deepseek, multi(1, 3))
wrong("shift", deepseek, "deepseek_main_unshifted", Deepseek, multi(0, 2))
wrong("shift", deepseek, "deepseek_main_late", Deepseek, multi(2, 2))
wrong("shift", deepseek_stream, "deepseek_wraps", Deepseek, wrapped, stream)
wrong("shift", chain, "chain_copies", Chain, multi(1, 2, 2))
wrong("shift", train_only, "train_only_late", TrainOnly, multi(1, 3))
wrong("shift", inside, "loss_inside_late", LossLate, None)
wrong("causal", deepseek, "deepseek_two_on", TwoOn, multi(1, 2))
wrong("causal", deepseek, "deepseek_open", OpenBlock, multi(1, 2))
wrong("causal", deepseek, "deepseek_one_more", OneMore, multi(1, 2))
wrong("causal", train_only, "train_only_open", OpenTrainOnly, multi(1, 2))

wrong("shift", medusa, "medusa_first_again", Medusa, multi(1, 1, 2))
wrong("shift", medusa, "medusa_last_again", Medusa, multi(1, 2, 2))

documents = right("documents", Deepseek, multi(1, 2), packed)
wrong("causal", deepseek, "next_row", NextRow, multi(1, 2))
wrong("causal", documents, "sees_documents", SeesDocuments, multi(1, 2), packed)
wrong("pad", deepseek_left, "sees_pad", SeesDocuments, multi(1, 2), left)
right("mixed", Mixed, multi(1, 1, 2, weights=(0.3, 1.0, 0.3)))
functional = right("functional", Functional, from_object(1, 2))
wrong("shift", functional, "functional_late", Functional, from_object(1, 3))
first = right("time_first", TimeFirst, time_first(1, 2, 3))
wrong("shift", first, "time_first_late", TimeFirst, time_first(1, 2, 4))
parts = right("composed", Deepseek, composed, stream)
wrong("shift", parts, "composed_late", Deepseek, lambda m, b: composed(m, b, 3), stream)
chunks = right("chunked", Deepseek, lambda m, b: chunked(m, b, 1, 2))
wrong("shift", chunks, "chunked_late", Deepseek, lambda m, b: chunked(m, b, 1, 3))
one = right("one_by_one", Medusa, lambda m, b: one_by_one(m, b, 1, 2, 3))
wrong("shift", one, "one_by_one_unshifted", Medusa, lambda m, b: one_by_one(m, b, 1, 2, 0))
labels = right("shifted_labels", Deepseek, shifted_labels, next_tokens)
wrong("shift", labels, "labels_late", Deepseek, lambda m, b: shifted_labels(m, b, 2), next_tokens)

deep = right("deep_supervision", Deep, multi(1, 1))
deep_even = right("deep_supervision_even", Deep, multi(1, 1, weights=(0.5, 0.5)))
wrong("shift", deep, "deep_first_unshifted", Deep, multi(1, 0))
wrong("shift", deep_even, "deep_all_late", Deep, multi(2, 2, weights=(0.5, 0.5)))
wrong("causal", deep, "deep_pooled", DeepOpen, multi(1, 1))

right("value", lambda: Beside(1), beside(value))
right("classifier", lambda: Beside(31, pool=True), beside(classes))
tagger = right("tagger", lambda: Beside(31), beside(tags))
distilled = right("student", lambda: Beside(V), beside(student))
right("r_drop", lambda: Tiny(dropout=0.2), r_drop)
wrong("shift", tagger, "tagger_unshifted", lambda: Beside(31), beside(tags, 0))
wrong("shift", distilled, "student_unshifted", lambda: Beside(V), beside(student, 0))
