"""A decoder of ours to a Llama of ``transformers`` and back, with the same logits.

``scripts/export.py`` writes a folder that transformers loads; :func:`read_weights` reads one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causal_lm import extras

Sizes = Mapping[str, Any]  # arguments of ``Decoder`` that determine its architecture
LLAMA_KEYS = {
    "vocab_size": "vocab_size", "d_model": "hidden_size", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "n_layers": "num_hidden_layers",
    "d_ff": "intermediate_size", "rope_theta": "rope_theta", "norm_eps": "rms_norm_eps",
    "tied": "tie_word_embeddings",
}  # fmt: skip
"""Argument of ``Decoder`` -> key of ``LlamaConfig``."""
LLAMA_OPTIONS = {"mlp": "swiglu", "qk_norm": False, "token_smear": 0}
"""Options of ``Decoder`` with which it is a Llama."""
WEIGHTS = {
    "token_embedding.weight": ["model.embed_tokens.weight"],
    "final_norm.weight": ["model.norm.weight"],
    "lm_head.weight": ["lm_head.weight"],
}
BLOCK_WEIGHTS = {
    "attention_norm.weight": ["input_layernorm.weight"],
    "attention.qkv.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "attention.out.weight": ["self_attn.o_proj.weight"],
    "mlp_norm.weight": ["post_attention_layernorm.weight"],
    "mlp.gate_up.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "mlp.down.weight": ["mlp.down_proj.weight"],
}
"""Weight of ``Decoder`` -> Llama weights that are concatenated (dimension 0) to it."""


def _transformers() -> Any:
    library = extras.load("transformers", "huggingface")
    library.utils.logging.disable_progress_bar()  # log files have no use for progress bars
    return library


def _llama_config(sizes: Sizes, **more: Any) -> Any:
    """The ``LlamaConfig`` of our decoder; ValueError for options that Llama does not have."""
    for key, expected in LLAMA_OPTIONS.items():
        if sizes[key] != expected:
            given = f"model.{key}={_yaml(sizes[key])}"
            raise ValueError(f"transformers has no {given}, only model.{key}={_yaml(expected)}")
    return _transformers().LlamaConfig(**{k: sizes[ours] for ours, k in LLAMA_KEYS.items()}, **more)


def _weight_names(n_layers: int) -> dict[str, list[str]]:
    return WEIGHTS | {
        f"blocks.{i}.{ours}": [f"model.layers.{i}.{name}" for name in theirs]
        for i in range(n_layers)
        for ours, theirs in BLOCK_WEIGHTS.items()
    }


def to_llama(state: Mapping[str, Tensor], sizes: Sizes, max_length: int) -> Any:
    """A ``LlamaForCausalLM`` with the weights ``state`` of our decoder."""
    config = _llama_config(sizes, max_position_embeddings=max_length)
    with torch.random.fork_rng():  # the new model draws weights, which are replaced at once
        net = _transformers().LlamaForCausalLM(config)
    shapes, weights = net.state_dict(), dict[str, Tensor]()
    for ours, names in _weight_names(sizes["n_layers"]).items():
        rows = [len(shapes[name]) for name in names]
        weights |= zip(names, state[ours].split(rows), strict=True)
    net.load_state_dict(weights)
    return net


def read_weights(folder: str | Path, sizes: Sizes) -> dict[str, Tensor]:
    """The weights of a Llama in ``folder``, as a state dict of ``Decoder``. Raises ValueError for
    another kind of model, other sizes or missing weights (named), or options of no Llama,
    FileNotFoundError for a missing file, ModuleNotFoundError without the extra ``huggingface``."""
    config, library = _llama_config(sizes), _transformers()
    path, source = Path(folder) / "config.json", f"model.init_from={folder}"
    if not path.is_file():
        raise FileNotFoundError(f"{source}: no {path.name}; give a Llama saved by transformers")
    saved = library.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    found, expected = _architecture(saved), _architecture(config)
    if different := [key for key in expected if found[key] != expected[key]]:
        theirs = " ".join(f"{key}={_yaml(found[key])}" for key in different)
        ours = ", ".join(_yaml(expected[key]) for key in different)
        raise ValueError(f"{source} has {theirs}, not {ours}: set these keys, or model=pretrained")
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        with torch.random.fork_rng():  # it draws weights before it loads them
            llama = library.LlamaForCausalLM
            net, info = llama.from_pretrained(folder, dtype=torch.float32, **options)
    except OSError as error:
        raise FileNotFoundError(f"{source}: {str(error).splitlines()[0]}") from error
    if missing := ", ".join(sorted(info["missing_keys"])):
        raise ValueError(f"{source} has no weight {missing}: is the download complete?")
    weights = net.state_dict()
    return {
        ours: torch.cat([weights[name] for name in names])
        for ours, names in _weight_names(sizes["n_layers"]).items()
    }


def _architecture(config: Any) -> dict[str, Any]:
    """What tells one ``LlamaConfig`` from another, by our configuration keys where there is one."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    theta = rope.get("rope_theta") or getattr(config, "rope_theta", None)
    values = config.to_dict() | {"rope_theta": theta, "rope_type": rope.get("rope_type", "default")}
    others = ("model_type", "hidden_act", "attention_bias", "mlp_bias", "head_dim", "rope_type")
    sizes = {f"model.{ours}": values.get(key) for ours, key in LLAMA_KEYS.items()}
    return sizes | {key: values.get(key) for key in others}


def _yaml(value: Any) -> str:
    return str(value).lower()
