"""What the tests of trainers share: a tokenizer, a Llama, documents, the blocks of recipes.md."""

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

WORDS = ["<pad>", "<bos>", "<eos>", *(f"w{i}" for i in range(26))]
PAD, BOS, EOS = 0, 1, 2
PAGE = (Path(__file__).parents[1] / "docs/recipes.md").read_text(encoding="utf-8")
RECIPES = dict(re.findall(r"^## (.+?)\n.*?^```python\n(.*?)^```", PAGE, re.M | re.S))


def run_recipe(recipe: str, **names: Any) -> Any:
    """Run a block with these names defined; the report, also where its assertion fails."""
    try:
        exec(RECIPES[recipe], names)
    except AssertionError:
        assert not names["report"].clean
    return names.get("report")


def tokenizer() -> Any:
    """One token a word; a chat template that marks what the assistant says."""
    import tokenizers
    import transformers

    ids = {word: i for i, word in enumerate(WORDS)}
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel(ids, unk_token="<pad>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)


def llama(**settings: Any) -> nn.Module:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS, **settings,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def documents(count: int, shortest: int = 4) -> list[list[int]]:
    """Token ids of documents of unequal length, each BOS … EOS."""
    gen = torch.Generator().manual_seed(0)
    sizes = [shortest + (3 * i) % 7 for i in range(count)]
    return [[BOS, *torch.randint(3, 29, (n,), generator=gen).tolist(), EOS] for n in sizes]
