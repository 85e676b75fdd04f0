"""Models and tokenizers to ``transformers`` and back, through its own save and load functions.

:func:`export` writes a folder that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load, with the
same logits and the same token ids. :func:`read_weights` reads a Llama from such a folder.
"""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from causal_lm import extras
from causal_lm.data.subwords import SubwordTokenizer
from causal_lm.data.tokenizers import SPECIAL, ByteTokenizer, SymbolTokenizer, Tokenizer

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
SPECIAL_ROLES = ("pad", "bos", "eos")


def _transformers() -> Any:
    library = extras.load("transformers", "huggingface")
    library.utils.logging.disable_progress_bar()  # log files have no use for progress bars
    return library


def _llama_config(sizes: Sizes, **more: Any) -> Any:
    """The ``LlamaConfig`` of our decoder; ValueError for options that Llama does not have."""
    for key, expected in LLAMA_OPTIONS.items():
        if sizes[key] != expected:
            problem = f"model.{key}={_yaml(sizes[key])} has no counterpart in transformers"
            raise ValueError(f"{problem}: only model.{key}={_yaml(expected)} can be converted")
    return _transformers().LlamaConfig(**{k: sizes[ours] for ours, k in LLAMA_KEYS.items()}, **more)


def _weight_names(n_layers: int) -> dict[str, list[str]]:
    return WEIGHTS | {
        f"blocks.{i}.{ours}": [f"model.layers.{i}.{name}" for name in theirs]
        for i in range(n_layers)
        for ours, theirs in BLOCK_WEIGHTS.items()
    }


def _to_llama(state: Mapping[str, Tensor], sizes: Sizes, max_length: int) -> Any:
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
        todo = "set these keys, use the tokenizer of that model, or use model=huggingface"
        raise ValueError(f"{source} has {theirs}, but this run has {ours}: {todo}")
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


def export(model: Any, tokenizer: Tokenizer, max_length: int, folder: Path, merge=False) -> Path:
    """Write ``model``, trained on rows of up to ``max_length`` tokens, and ``tokenizer`` into a new
    ``folder``, completely or not at all. Of a model with LoRA adapters these alone are written, as
    peft does, or with ``merge`` the whole model. Raises FileExistsError where the folder is not
    empty, ModuleNotFoundError without the extra ``huggingface``, and ValueError where the model or
    the tokenizer has no counterpart in transformers."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        written = Path(temporary) / "written"
        written.mkdir()
        if (adapted := getattr(model, "peft_models", None)) and not merge:
            adapted[0].save_pretrained(written, save_embedding_layers=False)
        else:
            write_model(model, tokenizer, max_length, written)
        write_tokenizer(tokenizer, max_length, written)
        written.replace(folder)  # an empty folder is replaced
    return folder


def write_model(model: Any, tokenizer: Tokenizer, max_length: int, folder: Path) -> None:
    """Write weights and configuration with ``save_pretrained``.

    Any model may have a method ``to_transformers()``, which returns a ``PreTrainedModel`` with the
    same logits. Without one, our decoder (told by its ``sizes``) is written as a Llama, and a model
    of transformers (the attribute ``net``) as it is, with adapters merged into a copy.
    """
    if hasattr(model, "to_transformers"):
        net = model.to_transformers()
    elif LLAMA_KEYS.keys() | LLAMA_OPTIONS.keys() <= getattr(model, "sizes", {}).keys():
        net = _to_llama(model.state_dict(), model.sizes, max_length)
    elif hasattr(getattr(model, "net", None), "save_pretrained"):
        adapted = getattr(model, "peft_models", None)
        net = copy.deepcopy(adapted[0]).merge_and_unload() if adapted else model.net
    else:
        problem = f"a {type(model).__name__} has no counterpart in transformers"
        todo = "export model=llama or model=huggingface, or give the class a to_transformers()"
        raise ValueError(f"{problem}: {todo}")
    ids = {f"{role}_token_id": getattr(tokenizer, f"{role}_id") for role in SPECIAL_ROLES}
    net.config.update(ids)
    net.generation_config.update(**ids)
    net.save_pretrained(folder)


def write_tokenizer(tokenizer: Tokenizer, max_length: int, folder: Path) -> None:
    """Write a ``PreTrainedTokenizerFast`` with the same ids; it puts BOS in front of a text."""
    library, fast = extras.load("tokenizers", "huggingface"), _to_hf_tokenizer(tokenizer)
    ids = {role: getattr(tokenizer, f"{role}_id") for role in SPECIAL_ROLES}
    tokens = {f"{role}_token": fast.id_to_token(i) for role, i in ids.items()}
    bos = tokens["bos_token"]
    fast.post_processor = library.processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    template = getattr(tokenizer, "chat_template", None)
    # Split: "<eos>" in a text is five characters; but a chat template writes special tokens.
    options = {"split_special_tokens": template is None, "chat_template": template} | tokens
    options["clean_up_tokenization_spaces"] = False
    make = _transformers().PreTrainedTokenizerFast
    make(tokenizer_object=fast, model_max_length=max_length, **options).save_pretrained(folder)


def _to_hf_tokenizer(tokenizer: Tokenizer) -> Any:
    """A tokenizer of the library ``tokenizers`` with the ids of ours."""
    library = extras.load("tokenizers", "huggingface")
    if isinstance(tokenizer, SubwordTokenizer):
        return library.Tokenizer.from_str(tokenizer.json)
    vocabulary = {text: i for i, text in SPECIAL.items()}
    if isinstance(tokenizer, ByteTokenizer):  # without characters, all text falls back to bytes
        vocabulary |= {f"<0x{byte:02X}>": byte + len(SPECIAL) for byte in range(256)}
        decoders = [library.decoders.ByteFallback(), library.decoders.Fuse()]
    elif isinstance(tokenizer, SymbolTokenizer):
        symbols = SymbolTokenizer.alphabet[: tokenizer.vocab_size - len(SPECIAL)]
        vocabulary |= {symbol: i for i, symbol in enumerate(symbols, start=len(SPECIAL))}
        decoders = [library.decoders.Fuse()]
    else:
        raise ValueError(f"a {type(tokenizer).__name__} has no counterpart in transformers")
    fast = library.Tokenizer(library.models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    fast.decoder = library.decoders.Sequence(decoders)
    return fast
