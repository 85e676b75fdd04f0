"""Real libraries, used rightly and wrongly."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from audit_cases.parts import EOS, PAD, Batch, V, ce, full, left, padded, targets
from causal_preflight import preflight

torch.set_num_threads(1)
KNOWN = {"pad_id": PAD, "eos_id": EOS}


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V + 3, n_positions=14, n_embd=16, n_layer=2, n_head=2
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=V, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def shifted(seed: int) -> Batch:
    return {**padded(seed), "labels": targets(padded(seed))}


def pad_counts(seed: int) -> Batch:
    b = padded(seed)
    return {**b, "labels": b["input_ids"].clone()}


def eos_ignored(seed: int) -> Batch:
    b = padded(seed, pad=EOS)
    return {**b, "labels": b["input_ids"].masked_fill(b["input_ids"] == EOS, -100)}


@pytest.mark.extras
@pytest.mark.parametrize("make", [gpt2, llama])
@pytest.mark.parametrize(
    ("batch", "known", "fault"),
    [
        (padded, KNOWN, None),
        (lambda s: padded(s, pad=EOS), {"pad_id": EOS, "eos_id": EOS}, None),
        (shifted, KNOWN, "shift"),
        (pad_counts, KNOWN, "pad"),
        (eos_ignored, {"pad_id": EOS, "eos_id": EOS}, "eos"),
    ],
)
def test_transformers(make: Any, batch: Any, known: dict[str, int], fault: str | None) -> None:
    report = preflight(make(), batch(0), **known)
    assert report.faults == ({fault} if fault else set()), str(report)
    assert "decoding" in report.passed


@pytest.mark.extras
@pytest.mark.parametrize("given", [True, False])
def test_gpt2_padded_on_the_left(given: bool) -> None:
    """GPT-2 counts positions from the first slot unless it is told otherwise."""
    batch = {**left(0), "labels": targets(left(0)).roll(1, 1)}
    if not given:
        del batch["position_ids"]
    report = preflight(gpt2(), batch, **KNOWN)
    assert report.faults == (set() if given else {"position"}), str(report)


@pytest.mark.extras
@pytest.mark.parametrize(("ignore", "faults"), [(PAD, set()), (-100, {"pad"})])
def test_x_transformers_wrapper(ignore: int, faults: set[str]) -> None:
    xt = pytest.importorskip("x_transformers")
    torch.manual_seed(0)
    layers = xt.Decoder(dim=16, depth=2, heads=2, attn_dim_head=8)
    net = xt.TransformerWrapper(num_tokens=V, max_seq_len=14, attn_layers=layers)
    model = xt.AutoregressiveWrapper(net, ignore_index=ignore, pad_value=PAD)
    batch = {"input_ids": padded(0)["input_ids"]}
    report = preflight(model, batch, lambda m, b: m(b["input_ids"]), **KNOWN)
    assert report.faults == faults, str(report)
    assert "future" in report.passed


class Encoder(nn.Module):
    """nn.TransformerEncoder: True = hidden, in both of its masks."""

    def __init__(self, causal: Any, keys: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.tok, self.head = nn.Embedding(V, 16), nn.Linear(16, V)
        self.causal, self.keys = causal, keys

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        ahead = torch.ones(ids.shape[1], ids.shape[1]).triu(1).bool()
        x = self.net(self.tok(ids), self.causal(ahead), self.keys(mask.bool()))
        return self.head(x)


@pytest.mark.parametrize(
    ("causal", "keys", "faults"),
    [
        (lambda m: m, lambda k: ~k, set()),
        (lambda m: ~m, lambda k: ~k, {"causal"}),
        (lambda m: m, lambda k: k, {"pad"}),
    ],
)
def test_transformer_encoder(causal: Any, keys: Any, faults: set[str]) -> None:
    torch.manual_seed(0)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return ce(model(batch["input_ids"], batch["attention_mask"]), targets(batch))

    report = preflight(Encoder(causal, keys), padded(0), loss, **KNOWN)
    assert report.faults == faults, str(report)


@pytest.mark.parametrize("both", [False, True])
def test_gru(both: bool) -> None:
    torch.manual_seed(0)
    tok, head = nn.Embedding(V, 8), nn.Linear(16 if both else 8, V)
    model = nn.ModuleList([tok, nn.GRU(8, 8, batch_first=True, bidirectional=both), head])

    def loss(m: Any, batch: Batch) -> Tensor:
        return ce(m[2](m[1](m[0](batch["input_ids"]))[0]), targets(batch))

    report = preflight(model, full(0), loss)
    assert report.faults == ({"causal"} if both else set()), str(report)
