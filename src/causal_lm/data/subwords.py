"""Tokenizers of the ``tokenizers`` library: a BPE trained here, or any ``tokenizer.json``."""

import logging
import re
import secrets
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from json import dumps, loads
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from causal_lm import extras
from causal_lm.schema import MAX_VOCABULARY

log = logging.getLogger(__name__)

USUAL_NAMES = {  # of special tokens by role, in the order in which they are tried
    "eos": ("<eos>", "</s>", "[EOS]", "<|endoftext|>", "<|end_of_text|>", "[SEP]"),
    "bos": ("<bos>", "<s>", "[BOS]", "<|begin_of_text|>", "<|startoftext|>", "[CLS]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
}

# Unicode white space, for a character class.
SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
NOT_BEFORE = r"(?![^\0-\x7f])"  # not before a non-ASCII character
WORD = re.compile(
    rf"'(?:[sdmt]|ll|ve|re)"
    rf"| ?[A-Za-z]++{NOT_BEFORE}| ?[0-9]++{NOT_BEFORE}"
    rf"| ?[^{SPACE}A-Za-z0-9\x80-\U0010ffff]++{NOT_BEFORE}"
    rf"| ?[^{SPACE}]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"
)
"""Splits a text at a subset of GPT-2's split points, so that words can be cached. A word with a
non-ASCII character extends to the next space (``re`` has no ``\\p{L}``); the library splits it."""
PROBE = "İİﬁ e\u0301  x\n漢①\u3000"  # has characters that tokenizers change
MAX_CACHED_WORDS = 300_000  # words whose ids are remembered


class SubwordTokenizer:
    """A tokenizer of the ``tokenizers`` library, made from its JSON and its special tokens' ids,
    which may be one (GPT-2). Text never produces a special token: ``<eos>`` is encoded as ordinary
    tokens. Raises ValueError where a special token is also part of ordinary text."""

    def __init__(
        self, json: str, pad: int, bos: int, eos: int, chat_template: str | None = None
    ) -> None:
        self.json, self.pad_id, self.bos_id, self.eos_id = json, pad, bos, eos
        self.chat_template, settings = chat_template, loads(json)  # in Jinja, as of transformers
        added = settings["added_tokens"]
        self.special_tokens = {token["id"]: token["content"] for token in added if token["special"]}
        self.backend = _backend(dumps(_hide_special_tokens(settings)))
        self.backend.no_truncation()
        self.backend.no_padding()
        self.vocab_size = max(self.backend.get_vocab().values()) + 1
        if not all(0 <= i < self.vocab_size for i in (pad, bos, eos)):
            ids = f"pad={pad}, bos={bos}, eos={eos}"
            raise ValueError(f"{ids}: not all are below the vocabulary of {self.vocab_size} ids")
        self._dtype = np.min_scalar_type(self.vocab_size - 1)
        self._bytes_of_token, self._is_byte_level = _spelling(settings), _is_byte_level(settings)
        model = settings["model"]
        spellings = set((self._bytes_of_token or {}).values())
        self._has_all_bytes = all(bytes([byte]) in spellings for byte in range(256))
        self._has_words, self._is_known = model["type"] == "WordLevel", dict[str, bool]()
        unk = model.get("unk_token")
        self._unk_id = model.get("unk_id") if unk is None else model["vocab"].get(unk)
        self._word_by_word, self._cached_words = _encodes_word_by_word(settings), dict[str, bytes]()

    @classmethod
    def train(cls, texts: Iterable[Sequence[str]], vocab_size: int) -> "SubwordTokenizer":
        """Train a byte-level BPE on batches of texts: 256 bytes, the most frequent pairs, and PAD,
        BOS and EOS. (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; bytes as in GPT-2.)"""
        tokenizers = extras.load("tokenizers", "huggingface")
        backend = tokenizers.Tokenizer(tokenizers.models.BPE())
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = tokenizers.decoders.ByteLevel()
        alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=vocab_size - len(USUAL_NAMES), initial_alphabet=alphabet, show_progress=False
        )
        backend.train_from_iterator(texts, trainer)
        backend.add_special_tokens(["<eos>", "<bos>", "<pad>"])
        return cls.resolve(backend.to_str(), {})

    @classmethod
    def from_file(cls, path: str, names: Mapping[str, str | None]) -> "SubwordTokenizer":
        """Read a ``tokenizer.json``, or raise ValueError; ``names`` as in :meth:`resolve`."""
        with extras.reading(f"{path} cannot be read as a tokenizer.json"):
            beside = _transformers_settings(Path(path).parent)
            return cls.resolve(Path(path).read_text(encoding="utf-8"), names, beside)

    @classmethod
    def resolve(
        cls, text: str, names: Mapping[str, str | None], beside: Mapping[str, Any] | None = None
    ) -> "SubwordTokenizer":
        """Find the ids of PAD, BOS and EOS in a tokenizer's JSON.

        ``names`` are of the roles ``pad``, ``bos`` and ``eos``. A name that the vocabulary lacks is
        added to it. A role without a name takes that of ``beside`` (``eos_token`` and others
        of a tokenizer_config.json) or the first of its usual names that is in the vocabulary;
        otherwise EOS is added as ``<eos>``, and BOS and PAD share EOS's id.
        Raises ValueError for an empty vocabulary, or a special token that is part of ordinary text.
        """
        backend, beside = _backend(text), beside or {}
        ids: dict[str, Any] = {}
        for role, usual_names in USUAL_NAMES.items():
            own = beside.get(f"{role}_token") or ""
            likely = (own["content"] if isinstance(own, dict) else own, *usual_names)
            usual = next((n for n in likely if backend.token_to_id(n) is not None), None)
            name = names.get(role) or usual or ("<eos>" if role == "eos" else None)
            if name is None:
                ids[role] = ids["eos"]
                continue
            if backend.token_to_id(name) is None:
                hint = f"if another token has that role, set data.special_tokens.{role}"
                log.warning(f"{name!r}, which the tokenizer lacks, was added as {role}; {hint}")
            backend.add_special_tokens([name])  # marks it as special where it is there already
            ids[role] = backend.token_to_id(name)
        settings = loads(backend.to_str())
        for token in settings["added_tokens"]:  # some were added before, but not as special ones
            token["special"] |= token["id"] in ids.values()
        template = beside.get("chat_template")
        return cls(dumps(settings, ensure_ascii=False), **ids, chat_template=template)

    def encode(self, text: str) -> list[int]:
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encoded = self._encode_words(texts) if self._word_by_word else self._encode(texts)
        lengths = np.array([len(ids) for ids in encoded], np.int64) // self._dtype.itemsize
        return np.frombuffer(b"".join(encoded), self._dtype), lengths

    def _encode(self, texts: Sequence[str]) -> list[bytes]:
        encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, self._dtype).tobytes() for encoding in encodings]

    def _encode_words(self, texts: Sequence[str]) -> list[bytes]:
        """Encode word by word, each new word once: three times as fast on source code."""
        cached = self._cached_words if len(self._cached_words) < MAX_CACHED_WORDS else {}
        split = [WORD.findall(text) for text in texts]
        new = list({word for words in split for word in words if word not in cached})
        cached.update(zip(new, self._encode(new), strict=True))
        self._cached_words = cached
        return [b"".join([cached[word] for word in words]) for words in split]

    @cached_property
    def _with_special_tokens(self) -> Any:
        """The library's tokenizer, which finds special tokens in a text."""
        return _backend(self.json)

    def encode_rendered(self, segments: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of what the chat template wrote, special tokens among them, and which of them are
        learned: those of each second segment."""
        encoding = self._with_special_tokens.encode("".join(segments), add_special_tokens=False)
        starts, stops = np.array(encoding.offsets).T
        edges, learned = np.cumsum([*map(len, segments)]), np.zeros(len(starts), bool)
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            learned |= (stops > start) & (starts < stop)
        return np.array(encoding.ids, self._dtype), learned

    def unknown(self, texts: Sequence[str]) -> Counter[str]:
        """Characters (words, for a WordLevel model) that are encoded as nothing or as <unk>."""
        found: Counter[str] = Counter()
        for text in [] if self._has_all_bytes else texts:
            for unit in set(text.split() if self._has_words else text):
                if unit not in self._is_known:
                    ids = self.backend.encode(unit, add_special_tokens=False).ids
                    known = bool(ids) and self._unk_id not in ids
                    self._is_known[unit] = known or unit.isspace()
                if not self._is_known[unit]:
                    found[unit] += text.count(unit)
        return found

    def decode(self, ids: Iterable[int]) -> str:
        if self._bytes_of_token is None or not self._is_byte_level:
            return self.backend.decode(list(ids), skip_special_tokens=True)
        return b"".join(self._bytes_of_token.get(i, b"") for i in ids).decode(errors="replace")

    def token_bytes(self) -> Tensor | None:
        bytes_of = self._bytes_of_token or {}
        sizes = torch.tensor([len(bytes_of.get(i, b"")) for i in range(self.vocab_size)])
        # A tokenizer may change some characters, or add a space before each text.
        return sizes if int(sizes[self.encode(PROBE)].sum()) == len(PROBE.encode()) else None

    def state(self) -> dict[str, Any]:
        ids = {"pad": self.pad_id, "bos": self.bos_id, "eos": self.eos_id}
        template = {"chat_template": self.chat_template} if self.chat_template else {}
        return {"name": "subwords", "json": self.json} | ids | template


def _transformers_settings(folder: Path) -> dict[str, Any]:
    """What transformers keeps beside a ``tokenizer.json``: special tokens and the chat template."""
    config, template = folder / "tokenizer_config.json", folder / "chat_template.jinja"
    found = loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
    if template.is_file():
        found["chat_template"] = template.read_text(encoding="utf-8")
    elif isinstance(named := found.get("chat_template"), list):
        found["chat_template"] = {t["name"]: t["template"] for t in named}.get("default")
    return found


def _backend(json: str) -> Any:
    """The library's tokenizer. Raises ValueError for an empty vocabulary, or for an id so large
    that lists by id would fill the memory (the library makes some, too)."""
    backend = extras.load("tokenizers", "huggingface").Tokenizer.from_str(json)
    largest = max(backend.get_vocab().values(), default=None)
    if largest is None:
        raise ValueError("its vocabulary is empty")
    if largest >= MAX_VOCABULARY:
        raise ValueError(f"id {largest:,} is above the limit of {MAX_VOCABULARY:,} ids")
    return backend


def _hide_special_tokens(settings: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer's JSON with special tokens renamed, at random, to names that no text contains.

    The library can be told not to look for special tokens in a text, but a model that has them in
    its vocabulary (Unigram, WordLevel, WordPiece, BPE with ``ignore_merges``) finds them still.
    """
    suffix, model, added = secrets.token_hex(16), settings["model"], settings["added_tokens"]
    special = {token["content"] for token in added if token["special"]}
    needed = {part for merge in model.get("merges", ()) for part in (*merge, "".join(merge))}
    needed |= set(_byte_of_character() if _is_byte_level(settings) else ())
    if clash := special & needed:
        hint = "choose another token in data.special_tokens, such as <eos>"
        raise ValueError(f"special token {min(clash)!r} is part of ordinary text: {hint}")
    new_names = {token: f"{token}{suffix}" for token in special}
    vocab: Any = model["vocab"]
    if isinstance(vocab, dict):
        vocab = {new_names.get(token, token): i for token, i in vocab.items()}
    else:
        vocab = [[new_names.get(token, token), score] for token, score in vocab]
    unk = model.get("unk_token")
    model = model | {"vocab": vocab} | ({"unk_token": new_names[unk]} if unk in new_names else {})
    added = [t | {"content": new_names.get(t["content"], t["content"])} for t in added]
    return settings | {"model": model, "added_tokens": added, "post_processor": None}


def _is_byte_level(settings: dict[str, Any]) -> bool:
    return '"ByteLevel"' in dumps(settings["decoder"])


def _byte_of_character() -> dict[str, int]:
    """Printable character -> byte, as in byte-level vocabularies (GPT-2)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _spelling(settings: dict[str, Any]) -> dict[int, bytes] | None:
    """The bytes of each id, none for special tokens; None where text may lack a spelling."""
    vocab, byte_of = settings["model"]["vocab"], _byte_of_character()
    is_byte_level = _is_byte_level(settings)

    def spell(token: str) -> bytes:
        if is_byte_level and all(c in byte_of for c in token):
            return bytes(byte_of[c] for c in token)
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", token)
        return bytes.fromhex(token[3:5]) if is_byte else token.replace("▁", " ").encode()

    if not is_byte_level and '"ByteFallback"' not in dumps(settings["decoder"]):
        return None
    pairs = vocab.items() if isinstance(vocab, dict) else ((t, i) for i, (t, _) in enumerate(vocab))
    bytes_of = {i: spell(token) for token, i in pairs}
    for token in settings["added_tokens"]:
        bytes_of[token["id"]] = b"" if token["special"] else token["content"].encode()
    return bytes_of


def _encodes_word_by_word(settings: dict[str, Any]) -> bool:
    """Whether the ids of a text are those of its words, one after the other, as for GPT-2."""
    pre, model = settings["pre_tokenizer"] or {}, settings["model"]
    byte_level = pre.get("type") == "ByteLevel" and pre.get("use_regex", True)
    unchanged = byte_level and not pre["add_prefix_space"] and settings["normalizer"] is None
    is_bpe = model["type"] == "BPE" and not model.get("dropout")
    return unchanged and is_bpe and all(token["special"] for token in settings["added_tokens"])
