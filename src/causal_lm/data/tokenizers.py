"""Text to ids and back. Ids 0, 1, 2 are PAD, BOS, EOS in both tokenizers here; ``subwords.py`` has
those of the ``tokenizers`` library."""

import string
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

PAD, BOS, EOS = 0, 1, 2
SPECIAL = {PAD: "<pad>", BOS: "<bos>", EOS: "<eos>"}


class Tokenizer(Protocol):
    """What the rest of the project asks of a tokenizer."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of ``text`` alone, without BOS and EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens are left out."""

    def token_bytes(self) -> Tensor | None:
        """(V,) UTF-8 bytes per token, 0 for special ones; None where tokens are not text."""

    def state(self) -> dict[str, Any]:
        """Plain data from which :func:`from_state` makes the same tokenizer."""


class TextTokenizer(Tokenizer, Protocol):
    """A tokenizer of text, which comes in large amounts."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts end to end, and how many each has."""


class Bytes:
    """UTF-8 bytes, shifted by three to make room for PAD, BOS and EOS: 259 ids.

    >>> Bytes().encode("né")
    [113, 198, 172]
    >>> Bytes().decode([1, 113, 198, 172, 2])
    'né'
    """

    pad_id, bos_id, eos_id = PAD, BOS, EOS
    vocab_size = 256 + len(SPECIAL)

    def encode(self, text: str) -> list[int]:
        return [byte + len(SPECIAL) for byte in text.encode()]

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = [text.encode() for text in texts]
        ids = np.frombuffer(b"".join(encoded), np.uint8).astype(np.uint16)
        return ids + np.uint16(len(SPECIAL)), np.array([len(e) for e in encoded], np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i - len(SPECIAL) for i in ids if i >= len(SPECIAL)).decode(errors="replace")

    def token_bytes(self) -> Tensor | None:
        return torch.tensor([0] * len(SPECIAL) + [1] * 256)

    def state(self) -> dict[str, Any]:
        return {"name": "bytes"}


class Symbols:
    """One character per symbol of an artificial language; not text, so without bytes."""

    pad_id, bos_id, eos_id = PAD, BOS, EOS
    alphabet = string.ascii_letters + string.digits

    def __init__(self, symbols: int) -> None:
        self.vocab_size = symbols + len(SPECIAL)

    def encode(self, text: str) -> list[int]:
        ids = [self.alphabet.find(character) + len(SPECIAL) for character in text]
        for character, i in zip(text, ids, strict=True):
            if not len(SPECIAL) <= i < self.vocab_size:
                known = self.alphabet[: self.vocab_size - len(SPECIAL)]
                raise ValueError(f"{character!r} is no symbol of this language: it has {known}")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.alphabet[i - len(SPECIAL)] for i in ids if i >= len(SPECIAL))

    def token_bytes(self) -> Tensor | None:
        return None

    def state(self) -> dict[str, Any]:
        return {"name": "symbols", "symbols": self.vocab_size - len(SPECIAL)}


def from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer that wrote ``state``.

    Raises:
        ValueError: the name is not one of ours.
    """
    from causal_lm.data.subwords import Subwords  # which knows the protocol above

    kinds = {"bytes": Bytes, "symbols": Symbols, "subwords": Subwords}
    arguments = dict(state)
    name = arguments.pop("name")
    if name not in kinds:
        raise ValueError(f"unknown tokenizer {name!r}: known are {', '.join(kinds)}")
    return kinds[name](**arguments)


def show(tokenizer: Tokenizer, token: int) -> str:
    """One token as a person reads it: 'a', '<eos>', '\\n'."""
    names = {tokenizer.pad_id: "<pad>", tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>"}
    if token in names:
        return names[token]
    text = tokenizer.decode([token])
    return repr(text)[1:-1] if text.strip() != text or not text.isprintable() else text
