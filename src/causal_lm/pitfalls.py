"""The wrong versions, each a small override of one seam of the module. Here, and nowhere else.

With every switch off this file is not even imported. Delete it, ``configs/pitfalls`` and the
presets that name it, and a clean starter remains. ``docs/pitfalls.md`` has what each one does.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from causal_lm import masks, objective
from causal_lm.data.collate import Batch
from causal_lm.module import CausalLM
from causal_lm.objective import IGNORE


class Pitfall(CausalLM):
    """Logs, beside the canonical validation loss, what the faulty objective says of it."""

    label: str
    """What the preflight calls the fault."""

    pad_id: int
    has_own_view = True


# ---- which token is the target ----


class UnshiftedLabels(Pitfall):
    """Each position is trained on the token it was given: the model learns to copy, loss -> 0."""

    label = "shift"

    def targets(self, batch: Batch) -> Tensor:
        return batch.input_ids


class ShiftedTwice(Pitfall):
    """Labels that the data shifted, handed to a model that shifts: each position learns t + 2."""

    label = "shift"

    def targets(self, batch: Batch) -> Tensor:
        return objective.next_tokens(objective.next_tokens(batch.input_ids)).where(
            objective.next_tokens(self.counted(batch).long()) == 1, IGNORE
        )


# ---- which targets count ----


class PadInLoss(Pitfall):
    """Every slot counts, PAD too: the easy PAD -> PAD dilutes the loss, and PAD gets written."""

    label = "pad"

    def counted(self, batch: Batch) -> Tensor:
        return torch.ones_like(batch.input_ids, dtype=torch.bool)


class InputMaskOnTargets(Pitfall):
    """A target counts where its *input* is real: the EOS of each document learns to say PAD."""

    label = "pad"

    def counted(self, batch: Batch) -> Tensor:
        right = super().counted(batch)
        return right | ((batch.document_ids >= 0) & ~objective.has_target(batch.document_ids))


class PadIsEosByValue(Pitfall):
    """Targets that equal PAD are ignored; where PAD is EOS, no document ever learns to end."""

    label = "eos"

    def counted(self, batch: Batch) -> Tensor:
        return super().counted(batch) & (objective.next_tokens(batch.input_ids) != self.pad_id)


class LabelCrossesDocuments(Pitfall):
    """The EOS of each packed document is trained to predict how an unrelated one begins."""

    label = "shift"

    def counted(self, batch: Batch) -> Tensor:
        return objective.has_target((batch.document_ids >= 0).long() - 1, batch.loss_mask)


# ---- who may see whom ----


class NoCausalMask(Pitfall):
    """Every position sees the whole document, its own answer included: the model looks it up."""

    label = "causal"

    def may_attend(self, batch: Batch) -> Tensor:
        return masks.same_document(batch.document_ids)


class InvertedMask(Pitfall):
    """True is taken for "masked out": each position sees just what it must not.

    What would then see nothing sees itself, as a softmax over nothing is NaN.
    """

    label = "causal"

    def may_attend(self, batch: Batch) -> Tensor:
        wrong = ~masks.causal(batch.document_ids)
        myself = torch.eye(wrong.shape[-1], dtype=torch.bool, device=wrong.device)
        return wrong | (myself & ~wrong.any(dim=-1, keepdim=True))


class PaddingAttended(Pitfall):
    """PAD is looked at like any token; with PAD on the left, by every token of the document."""

    label = "pad"

    def may_attend(self, batch: Batch) -> Tensor:
        pad = (batch.document_ids < 0)[:, None, :]
        return (masks.same_document(batch.document_ids) | pad).tril()


class LeakyPacking(Pitfall):
    """Causal, but over the whole packed row: documents see those before them."""

    label = "causal"

    def may_attend(self, batch: Batch) -> Tensor:
        return masks.causal((batch.document_ids >= 0).long() - 1)


# ---- how the losses become one ----


class MaskAfterMean(Pitfall):
    """The mask comes after the mean, over every slot, is a scalar: it divides itself away."""

    label = "pad"

    def loss_terms(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits = self.model(batch.input_ids, batch.position_ids, self.may_attend(batch))
        targets, mask = self.targets(batch), self.counted(batch)
        mean = objective.token_nll(logits, targets).sum() / (targets != IGNORE).sum()
        return (mean * mask).sum(), mask.sum()


class MeanOfMeans(Pitfall):
    """Each micro-batch and rank weighs the same, however few targets it holds.

    That is what Lightning makes of a mean over tokens under accumulation, and DDP over ranks.
    """

    label = "norm"

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


def faulty(switches: Mapping[str, bool], pad_id: int) -> type[CausalLM]:
    """The module class with the faults that are switched on.

    Of two that answer the same question, the one that is later in :data:`PITFALLS` has its way.
    """
    chosen = tuple(kind for name, kind in reversed(PITFALLS.items()) if switches.get(name))
    return type("Faulty" + "".join(c.__name__ for c in chosen), chosen, {"pad_id": pad_id})
