"""Small tokenizers as JSON: like GPT-2's, Llama's and T5's, and one of each type of model."""

import json

import pytest

tokenizers = pytest.importorskip("tokenizers")

SENTENCE = "The cat sat on the mat; the café's cat didn't. <eos> ∂ 12 "
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
CHARACTERS = "abps</> "


def gpt2(**changes) -> str:
    """The JSON of a tokenizer made like GPT-2's: one special token, for everything."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280, show_progress=False, special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    library.train_from_iterator([SENTENCE], trainer)
    return json.dumps(json.loads(library.to_str()) | changes)


def library_of(kind: str) -> str:
    """The JSON of a small tokenizer whose vocabulary holds its special tokens."""
    models, pre = tokenizers.models, tokenizers.pre_tokenizers
    ids = {token: i for i, token in enumerate([*SPECIAL, *CHARACTERS, "ab"])}
    if kind == "Unigram":
        scores = [(token, -float(i > 3)) for token, i in ids.items()]
        library = tokenizers.Tokenizer(models.Unigram(scores, unk_id=3))
    elif kind == "WordPiece":
        ids |= {f"##{token}": 50 + i for token, i in ids.items()}
        library = tokenizers.Tokenizer(models.WordPiece(ids, unk_token="<unk>"))
    elif kind == "WordLevel":
        library = tokenizers.Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    else:
        whole = kind == "BPE with ignore_merges"
        bpe = models.BPE(ids, [("a", "b")], unk_token="<unk>", ignore_merges=whole)
        library = tokenizers.Tokenizer(bpe)
    if kind in ("WordLevel", "BPE with ignore_merges"):
        library.pre_tokenizer = pre.WhitespaceSplit()
    library.add_special_tokens(SPECIAL)
    return library.to_str()


SCHEMES = ["prepended", "always", "first", "never", "byte level"]


def with_prefix_space(scheme: str, **changes) -> str:
    """The JSON of a tokenizer with ByteFallback, as Llama's, or of one like GPT-2's; both put a
    space before each text, but for the scheme ``never``."""
    if scheme == "byte level":
        pre = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True}
        return gpt2(pre_tokenizer=pre | {"use_regex": True}, **changes)
    pieces = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abc", "▁a"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    options = {"unk_token": "<unk>", "byte_fallback": True}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [("▁", "a")], **options))
    if scheme == "prepended":
        steps = tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")
        library.normalizer = tokenizers.normalizers.Sequence(list(steps))
    else:
        library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    library.decoder = tokenizers.decoders.ByteFallback()
    library.add_special_tokens(SPECIAL)
    return json.dumps(json.loads(library.to_str()) | changes)


def like_t5() -> str:
    """The JSON of a Unigram model of pieces, without bytes, as T5's: it changes some characters."""
    scores = [(token, -float(i > 3)) for i, token in enumerate([*SPECIAL, *"▁abc\né", "▁a"])]
    library = tokenizers.Tokenizer(tokenizers.models.Unigram(scores, unk_id=3))
    library.normalizer = tokenizers.normalizers.NFKC()
    library.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    library.decoder = tokenizers.decoders.Metaspace()
    library.add_special_tokens(SPECIAL)
    return library.to_str()
