"""Example for scripts/preflight.py: a small GRU with a correct and an unshifted loss.

python scripts/preflight.py examples/audit_me.py:correct --pad-id 0 --eos-id 2
"""

import torch
import torch.nn.functional as F
from torch import nn

PAD, BOS, EOS, V = 0, 1, 2, 20


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, 32)
        self.gru = nn.GRU(32, 32, batch_first=True)
        self.head = nn.Linear(32, V)

    def forward(self, input_ids):
        return self.head(self.gru(self.embed(input_ids))[0])


def correct_loss(model, batch):
    """Logits at t on token t + 1; PAD ignored."""
    ids = batch["input_ids"]
    labels = ids[:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return F.cross_entropy(model(ids)[:, :-1].transpose(1, 2), labels)


def unshifted_loss(model, batch):
    """Logits at t on token t, which the model has just read: the fault `shift`."""
    ids = batch["input_ids"]
    labels = ids.masked_fill(batch["attention_mask"] == 0, -100)
    return F.cross_entropy(model(ids).transpose(1, 2), labels)


def make_batch():
    ids = torch.tensor([[BOS, 5, 9, 7, 12, EOS], [BOS, 8, 4, EOS, PAD, PAD]])
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def correct():
    return Net(), make_batch(), correct_loss


def unshifted():
    return Net(), make_batch(), unshifted_loss
