"""The wrong versions, each a small override of one method of the module. Here, and nowhere else.

With every switch off this file is not imported. Without the file, ``configs/pitfalls`` and the
presets that name it, a clean starter remains. ``docs/pitfalls.md`` shows what each one does.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from causal_lm import masks, objective
from causal_lm.data.collate import Batch
from causal_lm.masks import AttentionMask
from causal_lm.module import CausalLM
from causal_lm.objective import IGNORE


class Pitfall(CausalLM):
    """Splits the training labels into two methods, one of which a pitfall overrides.

    Validation also logs the training objective, as ``val/loss_as_trained``.
    """

    label: str  # what the preflight calls the fault
    pad_id: int
    has_own_objective = True

    def __init_subclass__(cls, label: str = "") -> None:
        cls.label = label or cls.label

    def targets(self, batch: Batch) -> Tensor:
        """(B, T): the token that each position is trained to predict."""
        return objective.shift_left(batch.input_ids)

    def has_target(self, batch: Batch) -> Tensor:
        """bool (B, T): the positions whose target counts in the loss."""
        return objective.has_target(batch.document_ids, batch.loss_mask)

    def training_labels(self, batch: Batch) -> Tensor:
        return self.targets(batch).masked_fill(~self.has_target(batch), IGNORE)


# ---- which token is the target ----


class UnshiftedLabels(Pitfall, label="shift"):
    """Each position is trained on its own input: the model learns to copy; the loss goes to 0."""

    def targets(self, batch: Batch) -> Tensor:
        return batch.input_ids


class ShiftedTwice(Pitfall, label="shift"):
    """The data shifts the labels and so does the model: each position learns token t + 2."""

    def targets(self, batch: Batch) -> Tensor:
        next_has_target = objective.shift_left(self.has_target(batch).long()) == 1
        twice = objective.shift_left(objective.shift_left(batch.input_ids))
        return twice.where(next_has_target, IGNORE)


# ---- which targets count ----


class PadInLoss(Pitfall, label="pad"):
    """Every slot counts, PAD included: easy PAD -> PAD targets dilute the loss, and are learned."""

    def has_target(self, batch: Batch) -> Tensor:
        return torch.ones_like(batch.input_ids, dtype=torch.bool)


class InputMaskOnTargets(Pitfall, label="pad"):
    """A target counts where its *input* is real: the EOS of each document learns to predict PAD."""

    def has_target(self, batch: Batch) -> Tensor:
        right = super().has_target(batch)
        return right | ((batch.document_ids >= 0) & ~objective.has_target(batch.document_ids))


class PadIsEosByValue(Pitfall, label="eos"):
    """Targets equal to the PAD id are ignored; where PAD is EOS, no document learns to end."""

    def has_target(self, batch: Batch) -> Tensor:
        return super().has_target(batch) & (objective.shift_left(batch.input_ids) != self.pad_id)


class LabelCrossesDocuments(Pitfall, label="shift"):
    """The EOS of each packed document is trained to predict the start of an unrelated one."""

    def has_target(self, batch: Batch) -> Tensor:
        return objective.has_target(_merge_documents(batch), batch.loss_mask)


# ---- which positions see which ----


class NoCausalMask(Pitfall, label="causal"):
    """Every position sees its whole document, the answer included: the model looks it up."""

    def training_mask(self, batch: Batch) -> AttentionMask:
        return batch.attention_mask.replaced_by(masks.same_document(batch.document_ids))


class InvertedMask(Pitfall, label="causal"):
    """True is taken for "masked out": each position sees exactly what it must not.

    A position that would see nothing sees itself, as a softmax over nothing is NaN.
    """

    def training_mask(self, batch: Batch) -> AttentionMask:
        wrong = batch.attention_mask.to_masked_out()
        itself = torch.eye(wrong.shape[-1], dtype=torch.bool, device=wrong.device)
        visible = wrong | (itself & ~wrong.any(dim=-1, keepdim=True))
        return batch.attention_mask.replaced_by(visible)


class PaddingAttended(Pitfall, label="pad"):
    """PAD is attended to like any token; padded on the left, by every token of the document."""

    def training_mask(self, batch: Batch) -> AttentionMask:
        pad = (batch.document_ids < 0)[:, None, :]
        visible = masks.same_document(batch.document_ids) | pad
        return batch.attention_mask.replaced_by(visible.tril())


class LeakyPacking(Pitfall, label="causal"):
    """Causal over the whole packed row: documents see those before them."""

    def training_mask(self, batch: Batch) -> AttentionMask:
        return AttentionMask.from_document_ids(_merge_documents(batch))


def _merge_documents(batch: Batch) -> Tensor:
    """Document ids in which all documents of a row are one: 0, and -1 at PAD."""
    return (batch.document_ids >= 0).long() - 1


# ---- how the losses are reduced ----


class MaskAfterMean(Pitfall, label="pad"):
    """The mask is applied after the mean over every slot, which is a scalar: it cancels out."""

    def loss_terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.model(batch.input_ids, batch.position_ids, self.training_mask(batch))
        targets, mask = self.targets(batch), self.has_target(batch)
        mean = objective.token_nll(logits, targets).sum() / (targets != IGNORE).sum()
        return (mean * mask).sum(), mask.sum()


class MeanOfMeans(Pitfall, label="reduction"):
    """Each micro-batch and rank has the same weight, however few targets it holds.

    Lightning does this to a mean over tokens under accumulation, and DDP does it across ranks.
    """

    def loss_terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        nats, denominator = super().loss_terms(batch)
        return nats / denominator.clamp(min=1), torch.ones_like(denominator)


PITFALLS: dict[str, type[Pitfall]] = {
    "unshifted_labels": UnshiftedLabels,
    "pad_in_loss": PadInLoss,
    "no_causal_mask": NoCausalMask,
    "shifted_twice": ShiftedTwice,
    "input_mask_on_targets": InputMaskOnTargets,
    "pad_is_eos_by_value": PadIsEosByValue,
    "label_crosses_documents": LabelCrossesDocuments,
    "inverted_mask": InvertedMask,
    "padding_attended": PaddingAttended,
    "leaky_packing": LeakyPacking,
    "mask_after_mean": MaskAfterMean,
    "mean_of_means": MeanOfMeans,
}


def faulty_module(switches: Mapping[str, bool], pad_id: int) -> type[CausalLM]:
    """The module class with the faults that are switched on.

    Of two that override the same method, the later one in :data:`PITFALLS` takes effect.
    """
    chosen = tuple(cls for name, cls in reversed(PITFALLS.items()) if switches.get(name))
    return type("Faulty" + "".join(c.__name__ for c in chosen), chosen, {"pad_id": pad_id})
