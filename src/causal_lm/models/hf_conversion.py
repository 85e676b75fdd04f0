"""A Llama of ours in the format of ``transformers``, and back: a folder with weights and sizes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causal_lm import extras
from causal_lm.report.files import write_json

Sizes = Mapping[str, Any]

SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "n_layers": "num_hidden_layers",
    "d_ff": "intermediate_size",
    "rope_theta": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}
"""Our name of a size -> theirs."""

WHOLE = {
    "token_embedding.weight": ("model.embed_tokens.weight",),
    "final_norm.weight": ("model.norm.weight",),
    "lm_head.weight": ("lm_head.weight",),
}
BLOCK = {
    "attention_norm.weight": ("input_layernorm.weight",),
    "attention.qkv.weight": (
        "self_attn.q_proj.weight",
        "self_attn.k_proj.weight",
        "self_attn.v_proj.weight",
    ),
    "attention.out.weight": ("self_attn.o_proj.weight",),
    "mlp_norm.weight": ("post_attention_layernorm.weight",),
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.down.weight": ("mlp.down_proj.weight",),
}
"""Our weight -> theirs; several of theirs lie one below the other in ours."""


def check_plain(sizes: Sizes) -> None:
    """
    Raises:
        ValueError: an option makes it another model than a Llama of theirs (named).
    """
    for key, plain in (("mlp", "swiglu"), ("qk_norm", False), ("token_smear", 0)):
        if sizes[key] != plain:
            raise ValueError(
                f"a model with model.{key}={str(sizes[key]).lower()} has no counterpart in "
                f"transformers: only model.{key}={str(plain).lower()} goes to and from them"
            )


def names(n_layers: int) -> dict[str, tuple[str, ...]]:
    """Of every weight, our name -> theirs."""
    return WHOLE | {
        f"blocks.{i}.{ours}": tuple(f"model.layers.{i}.{name}" for name in theirs)
        for i in range(n_layers)
        for ours, theirs in BLOCK.items()
    }


def to_transformers(state: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Our weights under their names. A tied head is left out, as the embedding has it."""
    head = sizes["d_model"] // sizes["n_heads"]
    rows = {
        3: [sizes["n_heads"] * head, sizes["n_kv_heads"] * head, sizes["n_kv_heads"] * head],
        2: [sizes["d_ff"], sizes["d_ff"]],
    }
    out: dict[str, Tensor] = {}
    for ours, theirs in names(sizes["n_layers"]).items():
        if sizes["tied"] and ours == "lm_head.weight":
            continue
        parts = state[ours].split(rows[len(theirs)]) if len(theirs) > 1 else [state[ours]]
        # Parts of one tensor share its memory, which safetensors refuses.
        out |= {name: part.clone() for name, part in zip(theirs, parts, strict=True)}
    return out


def from_transformers(weights: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Their weights under our names.

    Raises:
        KeyError: one is missing.
    """
    tied = {"lm_head.weight": "model.embed_tokens.weight"} if sizes["tied"] else {}
    return {
        ours: torch.cat([weights[tied.get(name, name)] for name in theirs])
        for ours, theirs in names(sizes["n_layers"]).items()
    }


def write(folder: Path, state: Mapping[str, Tensor], sizes: Sizes, **more: Any) -> None:
    """``model.safetensors`` and ``config.json`` into a folder that exists.

    Args:
        more: further entries of ``config.json``.

    Raises:
        ValueError: it is no plain Llama.
    """
    check_plain(sizes)
    safetensors = extras.load("safetensors.torch", "huggingface")
    weights = to_transformers(state, sizes)
    safetensors.save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    theirs = {name: sizes[ours] for ours, name in SIZES.items()}
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    write_json(folder / "config.json", kind | theirs | more)


def read(folder: str | Path, sizes: Sizes) -> dict[str, Tensor]:
    """The weights of a folder under our names.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it holds another kind of model, or other sizes (each named); or these sizes are
            not those of a plain Llama.
    """
    check_plain(sizes)
    folder = Path(folder)
    config = json.loads(_file(folder, "config.json").read_text(encoding="utf-8"))
    _check(folder, config, sizes)
    safetensors = extras.load("safetensors.torch", "huggingface")
    index = folder / "model.safetensors.index.json"
    files = ["model.safetensors"]
    if index.is_file():  # a large model lies in several files
        files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    weights: dict[str, Tensor] = {}
    for file in files:
        weights |= safetensors.load_file(_file(folder, file))
    try:
        return from_transformers(weights, sizes)
    except KeyError as error:
        raise ValueError(f"{folder} holds no weight {error}: is the download whole?") from error


def _file(folder: Path, name: str) -> Path:
    if not (folder / name).is_file():
        raise FileNotFoundError(
            f"model.init_from={folder}: there is no {name} in it; give a folder that holds a Llama "
            f"as transformers saves it"
        )
    return folder / name


def _check(folder: Path, config: dict[str, Any], sizes: Sizes) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    config = {
        "num_key_value_heads": config.get("num_attention_heads"),
        "rope_theta": rope.get("rope_theta", 10_000.0),
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "head_dim": None,
    } | config
    d_head = sizes["d_model"] // sizes["n_heads"]
    unlike = {
        "model_type": config.get("model_type") != "llama",
        "attention_bias": config.get("attention_bias", False),
        "mlp_bias": config.get("mlp_bias", False),
        "hidden_act": config.get("hidden_act", "silu") != "silu",
        "rope_type": rope.get("rope_type", rope.get("type", "default")) != "default",
    }
    for key, differs in unlike.items():
        if differs:
            raise ValueError(
                f"model.init_from={folder}: its {key} in config.json is not that of a plain Llama; "
                f"model=huggingface takes any model of transformers"
            )
    vocabulary = config["vocab_size"]
    if vocabulary != sizes["vocab_size"]:
        raise ValueError(
            f"model.init_from={folder} has a vocabulary of {vocabulary} tokens, but the tokenizer "
            f"of this run has {sizes['vocab_size']}: use the tokenizer that it was trained with"
        )
    differ = [key for key, theirs in SIZES.items() if config[theirs] != sizes[key]]
    if differ:
        wanted = " ".join(f"model.{key}={str(config[SIZES[key]]).lower()}" for key in differ)
        here = ", ".join(str(sizes[key]).lower() for key in differ)
        raise ValueError(f"model.init_from={folder} needs {wanted}, but this run has {here}")
    if config["head_dim"] not in (None, d_head):
        raise ValueError(
            f"model.init_from={folder} has heads of width {config['head_dim']}, where "
            f"d_model / n_heads is {d_head}: model=huggingface takes any model of transformers"
        )
