"""Export a checkpoint into a folder that transformers loads: weights, sizes, tokenizer.

python scripts/export.py runs/…/checkpoints/best.ckpt exported
python scripts/export.py runs/…/checkpoints/best.ckpt exported --merge     (a run with model.lora)

``AutoModelForCausalLM`` and ``AutoTokenizer`` then give the same logits and the same token ids.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

from causal_lm import cli, extras

SPECIAL_ROLES = ("pad", "bos", "eos")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", help="a file that train.py wrote")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument(
        "--merge", action="store_true", help="merge LoRA adapters, which are written alone if not"
    )
    cli.add_trust(parser)
    args = parser.parse_args()

    from causal_lm.build import restore  # loads torch

    module, tokenizer, config = restore(args.checkpoint, args.trust)
    max_length = config["data"]["max_length"]
    print(f"written to {export(module.model, tokenizer, max_length, args.folder, args.merge)}")


def export(model: Any, tokenizer: Any, max_length: int, folder: Path, merge=False) -> Path:
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


def write_model(model: Any, tokenizer: Any, max_length: int, folder: Path) -> None:
    """Write weights and configuration with ``save_pretrained``.

    Any model may have a method ``to_transformers()``, which returns a ``PreTrainedModel`` with the
    same logits. Without one, our decoder is written as a Llama, and a model of transformers (the
    attribute ``net``) as it is, with adapters merged into a copy.
    """
    from causal_lm.models.decoder import Decoder
    from causal_lm.models.hf_conversion import to_llama

    if hasattr(model, "to_transformers"):
        net = model.to_transformers()
    elif isinstance(model, Decoder):
        net = to_llama(model.state_dict(), model.sizes, max_length)
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


def write_tokenizer(tokenizer: Any, max_length: int, folder: Path) -> None:
    """Write a ``PreTrainedTokenizerFast`` with the same ids; it puts BOS in front of a text."""
    library, fast = extras.load("tokenizers", "huggingface"), to_library(tokenizer)
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
    make = extras.load("transformers", "huggingface").PreTrainedTokenizerFast
    make(tokenizer_object=fast, model_max_length=max_length, **options).save_pretrained(folder)


def to_library(tokenizer: Any) -> Any:
    """A tokenizer of the library ``tokenizers`` with the ids of ours."""
    from causal_lm.data.subwords import SubwordTokenizer
    from causal_lm.data.tokenizers import SPECIAL, ByteTokenizer, SymbolTokenizer

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


if __name__ == "__main__":
    with cli.one_line_errors():
        main()
