"""Set-ups in which PAD moves the loss or the logits of real tokens."""

from typing import Any

from torch import Tensor, nn

from .causal import since_eos, turns
from .parts import EOS, Batch, Tiny, ce, feed, left, padded, targets
from .registry import add, add_right, case
from .right import (
    Recurrent,
    gru,
    left_padded,
    moe,
    plain,
    right_moe,
    right_smoothing,
    right_z,
    shared_id,
    z_loss,
)


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


class ByValue(Tiny):
    """Hides every key whose id is that of PAD, which is that of EOS too."""

    def visible(self, ids: Tensor, mask: Tensor | None, docs: Tensor | None) -> Tensor:
        return super().visible(ids, (ids != EOS).long(), docs)


class Split(Tiny):
    """Documents end at each EOS: nothing before it is seen after it, which is right."""

    def visible(self, ids: Tensor, mask: Tensor | None, docs: Tensor | None) -> Tensor:
        ended = (ids == EOS).long().cumsum(1) - (ids == EOS).long()
        return super().visible(ids, None, ended)


def chat(seed: int) -> Batch:
    """Turns that each end in EOS, which is PAD as well."""
    b = padded(seed, pad=EOS)
    ids = b["input_ids"].clone()
    ids[:, 4] = EOS
    return {**b, "input_ids": ids, "labels": ids.masked_fill(b["attention_mask"] == 0, -100)}


by_length = add_right("pad_by_length", case(batch=chat, **shared_id))
add_right("split_at_eos", case(Split, turns))
add("pad", by_length, "eos_hidden_by_value", case(ByValue, chat, **shared_id))
add("pad", since_eos, "eos_hidden_in_stream", case(ByValue, turns))
