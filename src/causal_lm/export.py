"""A checkpoint as a folder that ``transformers`` loads: weights, sizes, tokenizer."""

import shutil
from pathlib import Path
from typing import Any

from causal_lm import extras
from causal_lm.data.tokenizers import SPECIAL, Bytes, Symbols, Tokenizer
from causal_lm.models import exchange
from causal_lm.models.external import Transformers
from causal_lm.models.llama import Llama
from causal_lm.report.files import write_json
from causal_lm.run import restore


def export(checkpoint: str | Path, folder: Path) -> Path:
    """Write ``checkpoint`` into a new ``folder``, whole or not at all.

    Raises:
        FileExistsError: the folder is there and holds something.
        FileNotFoundError, ValueError: see :func:`causal_lm.run.restore`; or the kind of model or
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
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_id") for name in ("pad", "bos", "eos")}
    if isinstance(model, Llama):
        more = ids | {"max_position_embeddings": max_length}
        exchange.write(folder, model.state_dict(), model.sizes, **more)
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
    special = {text: i for i, text in SPECIAL.items()}
    same = library.Tokenizer(_model(library, tokenizer, special))
    if isinstance(tokenizer, Bytes):
        same.decoder = library.decoders.Sequence(
            [library.decoders.ByteFallback(), library.decoders.Fuse()]
        )
    else:
        same.decoder = library.decoders.Fuse()
    # A prompt begins a document, as in training.
    same.post_processor = library.processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", special["<bos>"])]
    )
    same.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{f"{text[1:-1]}_token": text for text in special},
            "model_max_length": max_length,
            "split_special_tokens": True,  # "<eos>" in a text is five characters, not an end
            "clean_up_tokenization_spaces": False,
        },
    )


def _model(library: Any, tokenizer: Tokenizer, special: dict[str, int]) -> Any:
    if isinstance(tokenizer, Bytes):  # it knows no character, so falls back to bytes throughout
        bytes_ = {f"<0x{byte:02X}>": byte + len(special) for byte in range(256)}
        return library.models.BPE(vocab=special | bytes_, merges=[], byte_fallback=True)
    if isinstance(tokenizer, Symbols):
        letters = Symbols.alphabet[: tokenizer.vocab_size - len(special)]
        symbols = {letter: i for i, letter in enumerate(letters, start=len(special))}
        return library.models.BPE(vocab=special | symbols, merges=[])
    raise ValueError(f"a {type(tokenizer).__name__} tokenizer has no counterpart in transformers")
