"""Text to token ids and back, by bytes or by symbols (``subwords.py`` has the other tokenizers)."""

import string
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from causal_lm.data.subwords import SubwordTokenizer

PAD, BOS, EOS = 0, 1, 2
SPECIAL = {PAD: "<pad>", BOS: "<bos>", EOS: "<eos>"}


class Tokenizer(Protocol):
    """What the project needs of a tokenizer."""

    vocab_size: int
    pad_id: int
    bos_id: int
    eos_id: int

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, without BOS and EOS."""

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; special tokens are dropped."""

    def token_bytes(self) -> Tensor | None:
        """(V,) UTF-8 bytes of each token, 0 for special ones; None where they are not a text's."""

    def state(self) -> dict[str, Any]:
        """Plain data from which :func:`from_state` makes the same tokenizer."""


class TextTokenizer(Tokenizer, Protocol):
    """A tokenizer that can encode many texts at once."""

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all texts end to end, and the number of ids of each text."""

    def unknown(self, texts: Sequence[str]) -> Counter[str]:
        """Characters (or words) that the vocabulary lacks, and how often each is in ``texts``."""


class ByteTokenizer:
    """UTF-8 bytes, shifted by three for PAD, BOS and EOS: 259 ids.

    >>> ByteTokenizer().encode("né")
    [113, 198, 172]
    >>> ByteTokenizer().decode([1, 113, 198, 172, 2])
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

    def unknown(self, texts: Sequence[str]) -> Counter[str]:
        return Counter()

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i - len(SPECIAL) for i in ids if i >= len(SPECIAL)).decode(errors="replace")

    def token_bytes(self) -> Tensor | None:
        return torch.tensor([0] * len(SPECIAL) + [1] * 256)

    def state(self) -> dict[str, Any]:
        return {"name": "bytes"}


class SymbolTokenizer:
    """One character per symbol of the synthetic language, of ``a … z A … Z 0 … 9`` the first
    ``symbols``. Symbols have no bytes, so bits per byte are undefined."""

    pad_id, bos_id, eos_id = PAD, BOS, EOS
    alphabet = string.ascii_letters + string.digits

    def __init__(self, symbols: int) -> None:
        if symbols not in range(1, len(self.alphabet) + 1):
            raise ValueError(f"{symbols} symbols: there are from 1 to {len(self.alphabet)}")
        self.vocab_size = symbols + len(SPECIAL)

    def encode(self, text: str) -> list[int]:
        """Raises ValueError on a character that is not in the alphabet, and names it."""
        known = self.alphabet[: self.vocab_size - len(SPECIAL)]
        for character in text:
            if character not in known:
                raise ValueError(f"{character!r} is not a symbol of this language ({known})")
        return [known.index(character) + len(SPECIAL) for character in text]

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.alphabet[i - len(SPECIAL)] for i in ids if i >= len(SPECIAL))

    def token_bytes(self) -> Tensor | None:
        return None

    def state(self) -> dict[str, Any]:
        return {"name": "symbols", "symbols": self.vocab_size - len(SPECIAL)}


def from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a :meth:`Tokenizer.state`. Raises ValueError for an unknown name."""
    classes = {"bytes": ByteTokenizer, "symbols": SymbolTokenizer, "subwords": SubwordTokenizer}
    name = state["name"]
    if name not in classes:
        raise ValueError(f"unknown tokenizer {name!r}: known are {', '.join(classes)}")
    return classes[name](**{key: value for key, value in state.items() if key != "name"})


def show_token(tokenizer: Tokenizer, token: int) -> str:
    """One token in readable form: ``a``, ``<eos>``, ``\\n``."""
    names = {tokenizer.pad_id: "<pad>", tokenizer.bos_id: "<bos>", tokenizer.eos_id: "<eos>"}
    if token in names:
        return names[token]
    text = tokenizer.decode([token])
    return repr(text)[1:-1] if text.strip() != text or not text.isprintable() else text
