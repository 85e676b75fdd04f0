"""The wrong versions, each a small override of one seam of the module. Here, and nowhere else.

With every switch off this file is not even imported. Delete it, ``configs/pitfalls`` and the
presets that name it, and a clean starter remains.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from causal_lm import masks, objective
from causal_lm.data.collate import Batch
from causal_lm.metrics import TokenPerplexity
from causal_lm.module import CausalLM


class Pitfall(CausalLM):
    """Logs, beside the canonical validation loss, what the faulty objective says of it."""

    label: str
    """What the preflight calls the fault."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.own_view = TokenPerplexity()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        logits, labels = self.as_trained(batch)
        self.own_view.update(objective.token_nll(logits, labels), labels)

    def loss_as_trained(self, val_loss: Tensor) -> Tensor:
        value = self.own_view.compute()["loss"]
        self.own_view.reset()
        return value


class UnshiftedLabels(Pitfall):
    """Each position is trained on the token it was given: the model learns to copy, loss -> 0."""

    label = "shift"

    def targets(self, batch: Batch) -> Tensor:
        return batch.input_ids


class PadInLoss(Pitfall):
    """Every slot counts, PAD too: the easy PAD -> PAD dilutes the loss, and PAD gets written."""

    label = "pad"

    def counted(self, batch: Batch) -> Tensor:
        return torch.ones_like(batch.input_ids, dtype=torch.bool)


class NoCausalMask(Pitfall):
    """Every position sees the whole document, its own answer included: the model looks it up."""

    label = "causal"

    def may_attend(self, batch: Batch) -> Tensor:
        return masks.same_document(batch.document_ids)


PITFALLS: dict[str, type[Pitfall]] = {
    "unshifted_labels": UnshiftedLabels,
    "pad_in_loss": PadInLoss,
    "no_causal_mask": NoCausalMask,
}


def faulty(switches: Mapping[str, bool]) -> type[CausalLM]:
    """The module class with the faults that are switched on, in any combination."""
    chosen = [PITFALLS[name] for name, on in switches.items() if on]
    return type("Faulty" + "".join(c.__name__ for c in chosen), tuple(chosen), {})
