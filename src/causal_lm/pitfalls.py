"""Pitfalls: wrong versions of the module, each a small override of one method.

With every pitfall off this file is not imported, and it can be deleted, with ``configs/pitfalls``
and the presets that name it. ``docs/pitfalls.md`` shows what each pitfall does.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from causal_lm import masks, objective
from causal_lm.data.collate import Batch
from causal_lm.masks import AttentionMask
from causal_lm.module import CausalLM
from causal_lm.objective import IGNORE

PITFALLS: dict[str, type["Pitfall"]] = {}
"""Key in ``pitfalls`` of the configuration -> class, in the order of their definition."""


class Pitfall(CausalLM):
    """Base of the pitfalls: splits ``training_labels`` into :meth:`targets` and :meth:`has_target`,
    and logs the training objective in validation, as ``val/loss_as_trained``."""

    label: str  # of the fault in the preflight's report
    pad_id: int
    train_objective_differs = True

    def __init_subclass__(cls, key: str = "", label: str = "") -> None:
        cls.label = label or cls.label
        if key:
            PITFALLS[key] = cls

    def targets(self, batch: Batch) -> Tensor:
        """(B, T): the token that each position is trained to predict."""
        return objective.shift_left(batch.input_ids)

    def has_target(self, batch: Batch) -> Tensor:
        """bool (B, T): the positions whose target counts in the loss."""
        return objective.has_target(batch.document_ids, batch.loss_mask)

    def training_labels(self, batch: Batch) -> Tensor:
        return self.targets(batch).masked_fill(~self.has_target(batch), IGNORE)


class UnshiftedLabels(Pitfall, key="unshifted_labels", label="shift"):
    """Each position is trained on its own input: the model learns to copy; the loss goes to 0."""

    def targets(self, batch: Batch) -> Tensor:
        return batch.input_ids


class ShiftedTwice(Pitfall, key="shifted_twice", label="shift"):
    """The data shifts the labels and so does the model: each position learns token t + 2."""

    def targets(self, batch: Batch) -> Tensor:
        next_has_target = objective.shift_left(self.has_target(batch).long()) == 1
        twice = objective.shift_left(objective.shift_left(batch.input_ids))
        return twice.where(next_has_target, IGNORE)


class PadInLoss(Pitfall, key="pad_in_loss", label="pad"):
    """Every slot counts, PAD included: easy PAD -> PAD targets dilute the loss, and are learned."""

    def has_target(self, batch: Batch) -> Tensor:
        return torch.ones_like(batch.input_ids, dtype=torch.bool)


class InputMaskOnTargets(Pitfall, key="input_mask_on_targets", label="pad"):
    """A target counts where its *input* is real: the EOS of each document is trained on PAD."""

    def has_target(self, batch: Batch) -> Tensor:
        correct = super().has_target(batch)
        return correct | ((batch.document_ids >= 0) & ~objective.has_target(batch.document_ids))


class PadIsEosByValue(Pitfall, key="pad_is_eos_by_value", label="eos"):
    """Targets equal to the PAD id are ignored; where PAD is EOS, no document learns to end."""

    def has_target(self, batch: Batch) -> Tensor:
        return super().has_target(batch) & (objective.shift_left(batch.input_ids) != self.pad_id)


class LabelCrossesDocuments(Pitfall, key="label_crosses_documents", label="shift"):
    """The EOS of each packed document is trained to predict the start of an unrelated one."""

    def has_target(self, batch: Batch) -> Tensor:
        return objective.has_target(_merge_documents(batch), batch.loss_mask)


class NoCausalMask(Pitfall, key="no_causal_mask", label="causal"):
    """Every position attends to its whole document, including its target."""

    def training_mask(self, batch: Batch) -> AttentionMask:
        return batch.attention_mask.with_dense(masks.same_document(batch.document_ids))


class InvertedMask(Pitfall, key="inverted_mask", label="causal"):
    """True means "masked out": a position attends only to later tokens and other documents, or to
    itself if there are none (a softmax over no key is NaN)."""

    def training_mask(self, batch: Batch) -> AttentionMask:
        inverted = batch.attention_mask.to_masked_out()
        diagonal = torch.eye(inverted.shape[-1], dtype=torch.bool, device=inverted.device)
        without_key = ~inverted.any(dim=-1, keepdim=True)
        return batch.attention_mask.with_dense(inverted | (diagonal & without_key))


class PaddingAttended(Pitfall, key="padding_attended", label="pad"):
    """PAD is a valid key. With left padding every token attends to it."""

    def training_mask(self, batch: Batch) -> AttentionMask:
        allowed = masks.same_document(batch.document_ids) | (batch.document_ids < 0)[:, None, :]
        return batch.attention_mask.with_dense(allowed.tril())


class LeakyPacking(Pitfall, key="leaky_packing", label="causal"):
    """Causal over the whole packed row: a document attends to the ones before it."""

    def training_mask(self, batch: Batch) -> AttentionMask:
        return AttentionMask.from_document_ids(_merge_documents(batch))


def _merge_documents(batch: Batch) -> Tensor:
    """Document ids in which all documents of a row are one: 0, and -1 at PAD."""
    return (batch.document_ids >= 0).long() - 1


class MaskAfterMean(Pitfall, key="mask_after_mean", label="pad"):
    """The mask is multiplied with the mean over every slot, a scalar, and so has no effect."""

    def loss_terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.model(batch.input_ids, batch.position_ids, self.training_mask(batch))
        targets, mask = self.targets(batch), self.has_target(batch)
        mean = objective.token_nll(logits, targets).sum() / (targets != IGNORE).sum()
        return (mean * mask).sum(), mask.sum()


class MeanOfMeans(Pitfall, key="mean_of_means", label="reduction"):
    """Each micro-batch and rank has the same weight, however few targets it holds, as Lightning and
    DDP do with a mean over tokens."""

    def loss_terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        nats, denominator = super().loss_terms(batch)
        return nats / denominator.clamp(min=1), torch.ones_like(denominator)


def pitfall_module(enabled: Mapping[str, bool], pad_id: int) -> type[CausalLM]:
    """The module class with the enabled pitfalls. If two override the same method, the later one in
    :data:`PITFALLS` is used."""
    chosen = tuple(cls for name, cls in reversed(PITFALLS.items()) if enabled.get(name))
    return type("Pitfall" + "".join(c.__name__ for c in chosen), chosen, {"pad_id": pad_id})
