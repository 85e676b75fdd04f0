"""Our objective on other people's models: the number is theirs, where theirs is right."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from causal_lm import objective
from causal_lm.objective import IGNORE, LossConfig
from support import V, make_batch

pytestmark = pytest.mark.extras


def ours(logits, batch, loss):
    weights, over = objective.token_weights(batch.labels, batch.document_ids, loss)
    return objective.weighted_nll(logits, batch.labels, weights) / over


def test_transformers_causal_loss():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2
    )
    model, batch = transformers.GPT2LMHeadModel(config).eval(), make_batch((5, 3, 7))
    real = batch.document_ids >= 0
    out = model(
        input_ids=batch.input_ids, attention_mask=real.long(),
        labels=batch.input_ids.masked_fill(~real, IGNORE),
    )  # fmt: skip
    torch.testing.assert_close(
        ours(out.logits, batch, LossConfig()), out.loss, rtol=1e-6, atol=1e-6
    )


def test_x_transformers_autoregressive_loss():
    x = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    net = x.TransformerWrapper(
        num_tokens=V, max_seq_len=16, attn_layers=x.Decoder(dim=16, depth=1, heads=2)
    ).eval()
    batch = make_batch((5, 3, 7))
    ids = batch.input_ids.masked_fill(batch.document_ids < 0, IGNORE)
    theirs = x.AutoregressiveWrapper(net)(ids)
    logits = net(batch.input_ids)
    torch.testing.assert_close(ours(logits, batch, LossConfig()), theirs, rtol=1e-6, atol=1e-6)


def test_x_transformers_equal_loss_weight_batch():
    """Their mean of row means. Their ``lens`` counts inputs, and we give it the targets."""
    x = pytest.importorskip("x_transformers")
    batch = make_batch((5, 3, 7))
    logits = torch.randn(3, 7, V, generator=torch.Generator().manual_seed(0))

    class Net(nn.Module):
        max_seq_len, probabilistic = 16, False

        def forward(self, ids, mask=None):
            return logits[:, :-1]

    def nll(out, target):
        return F.cross_entropy(out.transpose(1, 2), target, reduction="none")[..., None]

    for equal, loss in ((True, LossConfig("sequence")), (False, LossConfig("token"))):
        wrapper = x.ContinuousAutoregressiveWrapper(Net(), nll, equal_loss_weight_batch=equal)
        theirs = wrapper(batch.input_ids, lens=batch.lengths - 1)
        torch.testing.assert_close(ours(logits, batch, loss), theirs, rtol=1e-6, atol=1e-6)
