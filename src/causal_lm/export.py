"""A checkpoint as a folder that ``transformers`` loads: weights, sizes, tokenizer."""

import shutil
from pathlib import Path
from typing import Any

from causal_lm import extras
from causal_lm.build import restore
from causal_lm.data.subwords import Subwords
from causal_lm.data.tokenizers import SPECIAL, Bytes, Symbols, Tokenizer
from causal_lm.models import hf_conversion
from causal_lm.models.decoder import Llama
from causal_lm.models.external import Transformers
from causal_lm.report.files import write_json

SPECIAL_ROLES = ("pad", "bos", "eos")


def export(checkpoint: str | Path, folder: Path) -> Path:
    """Write ``checkpoint`` into a new ``folder``, whole or not at all.

    Raises:
        FileExistsError: the folder is there and holds something.
        FileNotFoundError, ValueError: see :func:`causal_lm.build.restore`; or the kind of model or
            tokenizer has no counterpart in transformers.
    """
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: name another folder")
    module, tokenizer, config = restore(checkpoint)
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        write_model(module.model, tokenizer, config["data"]["max_length"], beside)
        write_tokenizer(tokenizer, config["data"]["max_length"], beside)
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return folder


def write_model(model: Any, tokenizer: Tokenizer, max_length: int, folder: Path) -> None:
    """``model.safetensors`` and ``config.json``."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in SPECIAL_ROLES}
    if isinstance(model, Llama):
        more = ids | {"max_position_embeddings": max_length}
        hf_conversion.write(folder, model.state_dict(), model.sizes, **more)
    elif isinstance(model, Transformers):
        model.net.config.update(ids)
        model.net.generation_config.update(**ids)
        model.net.save_pretrained(folder)
    else:
        raise ValueError(
            f"a {type(model).__name__} has no counterpart in transformers: model=llama and "
            f"model=huggingface can be exported"
        )


def write_tokenizer(tokenizer: Tokenizer, max_length: int, folder: Path) -> None:
    """``tokenizer.json``, with the same ids, and ``tokenizer_config.json``."""
    library = extras.load("tokenizers", "huggingface")
    same = _same(library, tokenizer)
    names = {role: same.id_to_token(getattr(tokenizer, f"{role}_id")) for role in SPECIAL_ROLES}
    # A prompt begins a document, as in training.
    bos = names["bos"]
    same.post_processor = library.processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_id)]
    )
    same.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{role}_token": name for role, name in names.items()},
            "model_max_length": max_length,
            "split_special_tokens": True,  # "<eos>" in a text is five characters, not an end
            "clean_up_tokenization_spaces": False,
        },
    )


def _same(library: Any, tokenizer: Tokenizer) -> Any:
    """The library's tokenizer of the same ids."""
    special = {text: i for i, text in SPECIAL.items()}
    if isinstance(tokenizer, Subwords):
        return library.Tokenizer.from_str(tokenizer.json)
    if isinstance(tokenizer, Bytes):  # it knows no character, so falls back to bytes throughout
        bytes_ = {f"<0x{byte:02X}>": byte + len(special) for byte in range(256)}
        model = library.models.BPE(vocab=special | bytes_, merges=[], byte_fallback=True)
        same = library.Tokenizer(model)
        parts = [library.decoders.ByteFallback(), library.decoders.Fuse()]
        same.decoder = library.decoders.Sequence(parts)
        return same
    if isinstance(tokenizer, Symbols):
        letters = Symbols.alphabet[: tokenizer.vocab_size - len(special)]
        symbols = {letter: i for i, letter in enumerate(letters, start=len(special))}
        same = library.Tokenizer(library.models.BPE(vocab=special | symbols, merges=[]))
        same.decoder = library.decoders.Fuse()
        return same
    raise ValueError(f"a {type(tokenizer).__name__} tokenizer has no counterpart in transformers")
