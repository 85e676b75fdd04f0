"""Tokenizers of the ``tokenizers`` library: a BPE trained here, or anybody's ``tokenizer.json``."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causal_lm import extras

USUAL = {
    "eos": ("<eos>", "</s>", "[EOS]", "<|endoftext|>", "<|end_of_text|>", "[SEP]"),
    "bos": ("<bos>", "<s>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
}
"""Role -> the names it goes by, the likeliest first."""

SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
NOT_BEFORE = r"(?![^\0-\x7f])"
WORD = re.compile(
    rf"'(?:[sdmt]|ll|ve|re){NOT_BEFORE}"
    rf"| ?[A-Za-z]++{NOT_BEFORE}| ?[0-9]++{NOT_BEFORE}"
    rf"| ?[^{SPACE}A-Za-z0-9\x80-\U0010ffff]++{NOT_BEFORE}"
    rf"| ?[^{SPACE}]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"
)
"""Cuts where GPT-2's pattern cuts, though not everywhere: from the first character beyond ASCII on,
a word goes as far as the next space, since Python's letters are not quite Unicode's."""
WORDS_KEPT = 300_000
"""Words whose ids are remembered."""


class Subwords:
    """A tokenizer of the library, given as its own JSON, with PAD, BOS and EOS told apart.

    Text is text: what looks like a special token in it (``<eos>``) is spelled out in ordinary
    ones. PAD, BOS and EOS may be one and the same id, as in GPT-2.

    Args:
        json: what ``tokenizers.Tokenizer.to_str`` writes.
        pad, bos, eos: their ids.
    """

    def __init__(self, json: str, pad: int, bos: int, eos: int) -> None:
        self.json, self.pad_id, self.bos_id, self.eos_id = json, pad, bos, eos
        self.library = extras.load("tokenizers", "huggingface").Tokenizer.from_str(json)
        self.library.no_truncation()
        self.library.no_padding()
        self.library.encode_special_tokens = True  # as text, that is
        self.vocab_size = max(self.library.get_vocab().values()) + 1
        self._dtype = np.min_scalar_type(self.vocab_size - 1)
        self._spelling = _spelling(self.library, json)
        self._by_word, self._known = _cuts_at_words(json), dict[str, bytes]()

    @classmethod
    def train(cls, texts: Iterable[Sequence[str]], vocab_size: int) -> "Subwords":
        """Byte-level BPE on batches of texts: 256 bytes, then the commonest pairs, then PAD, BOS
        and EOS. (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; bytes as in GPT-2.)"""
        tokenizers = extras.load("tokenizers", "huggingface")
        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - len(USUAL),
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        library.train_from_iterator(texts, trainer)
        names = {role: f"<{role}>" for role in ("pad", "bos", "eos")}
        return cls.resolve(library.to_str(), names)

    @classmethod
    def from_file(cls, path: str, names: Mapping[str, str | None]) -> "Subwords":
        """A ``tokenizer.json``, as :meth:`resolve` reads it.

        Raises:
            ValueError: the file is no such JSON.
        """
        try:
            return cls.resolve(Path(path).read_text(encoding="utf-8"), names)
        except ImportError:
            raise
        except Exception as error:  # the library raises Exception itself
            raise ValueError(f"{path} cannot be read as a tokenizer.json: {error}") from error

    @classmethod
    def resolve(cls, text: str, names: Mapping[str, str | None]) -> "Subwords":
        """Find PAD, BOS and EOS in a tokenizer's JSON.

        A name that is given and not in the vocabulary is added to it. Where none is given, the
        usual ones are tried; failing these, EOS is added as ``<eos>``, and BOS and PAD are EOS.
        """
        library = extras.load("tokenizers", "huggingface").Tokenizer.from_str(text)
        ids: dict[str, int] = {}
        for role in ("eos", "bos", "pad"):
            usual = next((n for n in USUAL[role] if library.token_to_id(n) is not None), None)
            name = names.get(role) or usual
            if name is None and role != "eos":
                ids[role] = ids["eos"]
                continue
            name = name or "<eos>"
            library.add_special_tokens([name])  # marks it, where it is there already
            ids[role] = library.token_to_id(name)
        settings = json.loads(library.to_str())
        for token in settings["added_tokens"]:  # those that were added, but not as special ones
            token["special"] |= token["id"] in ids.values()
        return cls(json.dumps(settings, ensure_ascii=False), **ids)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        pieces = self._encode_words(texts) if self._by_word else self._encode(texts)
        lengths = np.array([len(piece) for piece in pieces], np.int64) // self._dtype.itemsize
        return np.frombuffer(b"".join(pieces), self._dtype), lengths

    def _encode(self, texts: Sequence[str]) -> list[bytes]:
        encodings = self.library.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self._dtype).tobytes() for encoding in encodings]

    def _encode_words(self, texts: Sequence[str]) -> list[bytes]:
        """Word by word, each asked of the library once: three times as fast on source code."""
        known = self._known if len(self._known) < WORDS_KEPT else {}
        split = [WORD.findall(text) for text in texts]
        new = list({word for words in split for word in words if word not in known})
        known.update(zip(new, self._encode(new), strict=True))
        self._known = known
        return [b"".join([known[word] for word in words]) for words in split]

    def decode(self, ids: Iterable[int]) -> str:
        if self._spelling is None:
            return self.library.decode(list(ids), skip_special_tokens=True)
        return b"".join(self._spelling.get(i, b"") for i in ids).decode(errors="replace")

    def token_bytes(self) -> Tensor | None:
        if self._spelling is None:
            return None
        return torch.tensor([len(self._spelling.get(i, b"")) for i in range(self.vocab_size)])

    def state(self) -> dict[str, Any]:
        ids = {"pad": self.pad_id, "bos": self.bos_id, "eos": self.eos_id}
        return {"name": "subwords", "json": self.json} | ids


def _spelling(library: Any, text: str) -> dict[int, bytes] | None:
    """Id -> the bytes it stands for, special tokens left out; None where tokens are not bytes.

    A byte-level vocabulary writes each byte as one printable character.
    """
    settings = json.loads(text)
    if '"ByteLevel"' not in json.dumps(settings["decoder"]):
        return None
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable}
    byte_of |= {chr(256 + i): byte for i, byte in enumerate(others)}
    spelling = {
        i: bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode()
        for token, i in library.get_vocab(with_added_tokens=False).items()
    }
    for token in settings["added_tokens"]:
        spelling[token["id"]] = b"" if token["special"] else token["content"].encode()
    return spelling


def _cuts_at_words(text: str) -> bool:
    """Is a text's encoding that of its words, put together? So it is with GPT-2's settings."""
    settings = json.loads(text)
    pre = settings["pre_tokenizer"] or {}
    return (
        settings["normalizer"] is None
        and settings["model"]["type"] == "BPE"
        and pre.get("type") == "ByteLevel"
        and pre.get("use_regex", True)
        and not pre["add_prefix_space"]
        and all(token["special"] for token in settings["added_tokens"])
    )
