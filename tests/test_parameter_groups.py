"""Roles of parameters, told by type, on our own models and on stand-ins for other people's."""

import pytest
import torch
from torch import nn

from causal_lm.optim.parameter_groups import assert_complete, describe_groups, parameter_groups
from support import V, make_model
from support.models import NAMES, make

C = 8


def roles(model):
    """Parameter name -> role."""
    return {name: group["role"] for group in parameter_groups(model) for name, _ in group["params"]}


def names_of(model, role):
    return {name for name, found in roles(model).items() if found == role}


# ---- our own models ----

BLOCKS = {
    "tiny": (
        "blocks.layers",
        ("self_attn.in_proj_", "self_attn.out_proj.", "linear1.", "linear2."),
    ),
    "llama": ("blocks", ("attention.qkv.", "attention.out.", "mlp.gate_up.", "mlp.down.")),
    "llama_tied": ("blocks", ("attention.qkv.", "attention.out.", "mlp.gate_up.", "mlp.down.")),
    "llama_fast": ("blocks", ("attention.qkv.", "attention.out.", "mlp.up.", "mlp.down.")),
}


@pytest.mark.parametrize("name", [*BLOCKS, "gru"])
def test_hidden_matrices_of_our_models(name):
    model = make_model() if name == "tiny" else make(name)
    if name == "gru":
        expected = {f"gru.weight_{kind}_l{i}" for kind in ("ih", "hh") for i in (0, 1)}
    else:
        blocks, matrices = BLOCKS[name]
        expected = {f"{blocks}.{i}.{matrix}weight" for i in (0, 1) for matrix in matrices}
    assert names_of(model, "hidden_matrix") == expected


EVERY = ["tiny", *NAMES]


@pytest.mark.parametrize("name", EVERY)
def test_every_model_decays_matrices_and_not_embeddings_norms_and_biases(name):
    """The head decays where it is not tied to an embedding."""
    model = make_model() if name == "tiny" else make(name)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    expected = {n for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in tables}
    groups = parameter_groups(model)
    assert tables
    assert {n for g in groups if "weight_decay" not in g for n, _ in g["params"]} == expected
    assert {g["weight_decay"] for g in groups if "weight_decay" in g} == {0.0}
    is_tied = name in ("llama_tied", "gpt2", "gpt2_eager")
    assert len(names_of(model, "head")) == (0 if is_tied else 1)


# ---- other people's names and types ----


class Conv1D(nn.Module):
    """As in transformers' GPT-2: a linear layer that holds its matrix transposed."""

    def __init__(self, out, into):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(into, out)), nn.Parameter(torch.ones(out))


class LlamaRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(C))


def linear(out=C, into=C, bias=False):
    return nn.Linear(into, out, bias=bias)


def model_of(parts, head, tied_to=None):
    """A module of these submodules and parameters, by dotted name, that declares its head."""
    root = nn.Module()
    for name, part in parts.items():
        *folders, leaf = name.split(".")
        owner = root
        for folder in folders:
            if not hasattr(owner, folder):
                owner.add_module(folder, nn.Module())
            owner = getattr(owner, folder)
        setattr(owner, leaf, part)
    if tied_to:
        root.get_submodule(head).weight = root.get_submodule(tied_to).weight
    root.__dict__["lm_head"] = root.get_submodule(head)
    return root


def no_decay(*shape):
    parameter = nn.Parameter(torch.ones(*shape))
    parameter._no_weight_decay = True
    return parameter


NANOGPT = {
    "transformer.wte": lambda: nn.Embedding(V, C),
    "transformer.wpe": lambda: nn.Embedding(16, C),
    "transformer.h.0.ln_1": lambda: nn.LayerNorm(C),
    "transformer.h.0.attn.c_attn": lambda: linear(3 * C, bias=True),
    "transformer.h.0.mlp.c_proj": linear,
    "lm_head": lambda: linear(V),
}
NANOGPT_ROLES = {
    "embedding": {"transformer.wte.weight", "transformer.wpe.weight"},
    "hidden_matrix": {"transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_proj.weight"},
    "head": {"lm_head.weight"},
    "norm_or_bias": {"transformer.h.0.ln_1.weight", "transformer.h.0.ln_1.bias",
                     "transformer.h.0.attn.c_attn.bias"},
}  # fmt: skip
STAND_INS = {
    "nanogpt": (NANOGPT, "lm_head", None, NANOGPT_ROLES),
    "nanogpt_tied": (NANOGPT, "lm_head", "transformer.wte", NANOGPT_ROLES | {"head": set()}),
    "litgpt": (
        {
            "lm_head": lambda: linear(V, bias=True),
            "transformer.wte": lambda: nn.Embedding(V, C),
            "transformer.h.0.norm_1": LlamaRMSNorm,
            "transformer.h.0.attn.qkv": linear,
            "transformer.h.0.attn.proj": linear,
            "transformer.h.0.mlp.fc_1": linear,
            "transformer.ln_f": LlamaRMSNorm,
        },
        "lm_head", None,
        {
            "embedding": {"transformer.wte.weight"},
            "hidden_matrix": {"transformer.h.0.attn.qkv.weight", "transformer.h.0.attn.proj.weight",
                              "transformer.h.0.mlp.fc_1.weight"},
            "head": {"lm_head.weight"},
            "norm_or_bias": {"transformer.h.0.norm_1.weight", "transformer.ln_f.weight",
                             "lm_head.bias"},
        },
    ),
    "gpt2": (
        {
            "wte": lambda: nn.Embedding(V, C),
            "h.0.attn.c_attn": lambda: Conv1D(3 * C, C),
            "h.0.mlp.c_fc": lambda: Conv1D(4 * C, C),
            "score": lambda: linear(V),
        },
        "score", "wte",
        {
            "embedding": {"wte.weight"},
            "hidden_matrix": {"h.0.attn.c_attn.weight", "h.0.mlp.c_fc.weight"},
            "norm_or_bias": {"h.0.attn.c_attn.bias", "h.0.mlp.c_fc.bias"},
        },
    ),
    "llama": (
        {
            "model.embed_tokens": lambda: nn.Embedding(V, C),
            "model.layers.0.self_attn.q_proj": linear,
            "model.layers.0.mlp.down_proj": linear,
            "model.layers.0.input_layernorm": LlamaRMSNorm,
            "output": lambda: linear(V),
        },
        "output", None,
        {
            "embedding": {"model.embed_tokens.weight"},
            "hidden_matrix": {"model.layers.0.self_attn.q_proj.weight",
                              "model.layers.0.mlp.down_proj.weight"},
            "head": {"output.weight"},
            "norm_or_bias": {"model.layers.0.input_layernorm.weight"},
        },
    ),
    "mamba": (
        {
            "backbone.embeddings": lambda: nn.Embedding(V, C),
            "backbone.layers.0.mixer.in_proj": linear,
            "backbone.layers.0.mixer.conv1d": lambda: nn.Conv1d(C, C, 4, groups=C),
            "backbone.layers.0.mixer.A_log": lambda: no_decay(C, 4),
            "backbone.layers.0.mixer.D": lambda: no_decay(C),
            "backbone.norm_f": lambda: nn.RMSNorm(C),
            "lm_head": lambda: linear(V),
        },
        "lm_head", "backbone.embeddings",
        {
            "embedding": {"backbone.embeddings.weight"},
            "hidden_matrix": {"backbone.layers.0.mixer.in_proj.weight"},
            "other_weight": {"backbone.layers.0.mixer.conv1d.weight"},
            "norm_or_bias": {f"backbone.layers.0.mixer.{n}" for n in ("A_log", "D", "conv1d.bias")}
            | {"backbone.norm_f.weight"},
        },
    ),
    "names_that_say_nothing": (
        {
            "tok": lambda: nn.Embedding(V, C),
            "emb": linear,
            "proj": lambda: nn.Parameter(torch.ones(C, C)),
            "mixer": lambda: nn.GRU(C, C),
            "attend": lambda: nn.MultiheadAttention(C, 2, bias=False),
            "plane": lambda: nn.LayerNorm((2, C), bias=False),
            "head": linear,
            "decoder": lambda: linear(V),
        },
        "decoder", None,
        {
            "embedding": {"tok.weight"},
            "hidden_matrix": {"emb.weight", "proj", "mixer.weight_ih_l0", "mixer.weight_hh_l0",
                              "attend.in_proj_weight", "attend.out_proj.weight", "head.weight"},
            "head": {"decoder.weight"},
            "norm_or_bias": {"mixer.bias_ih_l0", "mixer.bias_hh_l0", "plane.weight"},
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", STAND_INS)
def test_roles_do_not_depend_on_names(name):
    parts, head, tied_to, expected = STAND_INS[name]
    model = model_of({path: make_part() for path, make_part in parts.items()}, head, tied_to)
    found = {}
    for parameter, role in roles(model).items():
        found.setdefault(role, set()).add(parameter)
    assert found == {role: names for role, names in expected.items() if names}


def test_declared_embeddings_count_where_types_do_not_say():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(V, C))

    class Declares(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.lm_head = Table(), linear(V)

        def embeddings(self):
            return [self.table]

    assert roles(Declares()) == {"table.weight": "embedding", "lm_head.weight": "head"}


@pytest.mark.extras
def test_a_head_with_a_bias_inside_a_model_of_transformers():
    """It is no plain head, so the model declares none; it is still no hidden matrix."""
    transformers = pytest.importorskip("transformers")
    config = transformers.PhiConfig(vocab_size=V, hidden_size=C, intermediate_size=C,
                                    num_hidden_layers=1, num_attention_heads=2)  # fmt: skip
    model = nn.Module()
    model.net = transformers.PhiForCausalLM(config)
    assert names_of(model, "head") == {"net.lm_head.weight"}
    assert roles(model)["net.lm_head.bias"] == "norm_or_bias"


def test_frozen_parameters_are_in_no_group():
    model = make_model()
    model.token_embedding.weight.requires_grad_(False)
    assert names_of(model, "embedding") == {"position_embedding.weight"}
    assert "token_embedding.weight" not in roles(model)


def test_a_parameter_left_out_or_held_twice_is_named():
    model = make_model()
    groups = parameter_groups(model)
    with pytest.raises(AssertionError, match=r"head\.weight \(0 times\)"):
        assert_complete(model, [g for g in groups if g["role"] != "head"])
    with pytest.raises(AssertionError, match=r"head\.weight \(2 times\)"):
        assert_complete(model, [*groups, groups[1]])
    assert_complete(model, torch.optim.SGD(groups, lr=0.1).param_groups)


def test_the_table_of_groups():
    optimizer = torch.optim.AdamW(parameter_groups(make_model()), lr=0.1, weight_decay=0.1)
    head, *rows = (line.split() for line in describe_groups(optimizer).splitlines())
    assert head == ["role", "tensors", "parameters", "decay", "optimizer"]
    assert rows[1] == ["head", "1", str(16 * V), "0.1", "AdamW"]
    assert rows[2] == ["embedding", "2", str(16 * (V + 16)), "0", "AdamW"]
    assert {row[0] for row in rows} == {"hidden_matrix", "head", "embedding", "norm_or_bias"}
