"""Three guards on the model and the batch in hand: the shift, the mask, PAD in the loss.

Each returns None, or a finding: what is wrong and the key to change. They look at the tensors that
training will use and, for the mask, at what the logits in fact depend on.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from causal_lm.data.collate import Batch
from causal_lm.data.tokenizers import Tokenizer, show
from causal_lm.module import CausalLM
from causal_lm.objective import IGNORE, make_labels, token_nll


class Fault(NamedTuple):
    label: str
    """``shift``, ``causal`` or ``pad``."""
    seen: str
    key: str
    """The configuration key to change."""


def shift(module: CausalLM, batch: Batch) -> Fault | None:
    """Every counted label is the next input: ``inputs[:, 1:] == labels[:, :-1]`` on real tokens."""
    labels = make_labels(module.targets(batch), module.counted(batch))
    counted = (labels[:, :-1] != IGNORE) & (batch.document_ids[:, :-1] >= 0)
    wrong = counted & (batch.input_ids[:, 1:] != labels[:, :-1])
    if not wrong.any():
        return None
    row, t = wrong.nonzero()[0].tolist()
    return Fault(
        "shift",
        f"{int(wrong.sum())} of {int(counted.sum())} labels are not the next token; the first at "
        f"row {row}, position {t}: input {int(batch.input_ids[row, t])}, label "
        f"{int(labels[row, t])}, next token {int(batch.input_ids[row, t + 1])}",
        "pitfalls.unshifted_labels",
    )


@torch.no_grad()
def causal_mask(module: CausalLM, batch: Batch) -> Fault | None:
    """The mask is bool (B, T, T) with nothing above the diagonal, and no logit sees its future."""
    mask, (rows, length) = module.may_attend(batch), batch.input_ids.shape
    key = "pitfalls.no_causal_mask"
    if mask.dtype != torch.bool or mask.shape != (rows, length, length):
        return Fault("causal", f"the mask is {mask.dtype} {tuple(mask.shape)}", key)
    above = int(mask.triu(1).sum())
    if above:
        row, t, s = mask.triu(1).nonzero()[0].tolist()
        return Fault("causal", f"row {row}: position {t} may attend to position {s}, its future "
                               f"({above} such pairs)", key)  # fmt: skip
    row = int(batch.lengths.argmax())
    last = int(batch.lengths[row]) - 1
    changed = batch.input_ids.clone()
    changed[row, last] = 3 if changed[row, last] != 3 else 4
    if last > 0:
        before, after = (
            module.model(ids, batch.position_ids, mask)[row, :last]
            for ids in (batch.input_ids, changed)
        )
        moved = float((before - after).abs().max())
        if moved > 1e-4 * float(before.abs().max().clamp(min=1e-6)):
            return Fault("causal", f"changing token {last} of row {row} moves an earlier logit by "
                                   f"{moved:.2g}", "model")  # fmt: skip
    return None


@torch.no_grad()
def pad_in_loss(module: CausalLM, batch: Batch) -> Fault | None:
    """PAD has no share of the loss."""
    labels = make_labels(module.targets(batch), module.counted(batch))
    pad = (batch.document_ids < 0) & (labels != IGNORE)
    if not pad.any():
        return None
    logits = module.model(batch.input_ids, batch.position_ids, module.may_attend(batch))
    nll = token_nll(logits, labels)
    share = float(nll[pad].sum() / nll.sum())
    return Fault(
        "pad",
        f"PAD is {int(pad.sum())} of {int((labels != IGNORE).sum())} counted targets and "
        f"{share:.0%} of the loss",
        "pitfalls.pad_in_loss",
    )


def pairs(module: CausalLM, batch: Batch, tokenizer: Tokenizer, most: int = 8) -> str:
    """The first trained pairs of row 0, as a person reads them: input → label."""
    labels: Tensor = make_labels(module.targets(batch), module.counted(batch))[0]
    shown = [
        f"{show(tokenizer, i)} → {show(tokenizer, y)}"
        for i, y in zip(batch.input_ids[0].tolist(), labels.tolist(), strict=True)
        if y != IGNORE
    ]
    return ",  ".join(shown[:most])


GUARDS = (shift, causal_mask, pad_in_loss)
