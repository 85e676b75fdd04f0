"""Tokenized corpora on disk: built once, whole or absent, and never mistaken for another."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from causal_lm.data.documents import Documents, Mapped

SPLITS = ("train", "val")
SAMPLE = 1 << 16
"""Bytes at either end of a file that go into its identity."""


def default_cache() -> Path:
    """``causal-lm`` below ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "causal-lm"


def fingerprint(data: Any) -> str:
    """A name for plain data: equal data, equal name."""
    text = json.dumps(data, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:24]


def identity(path: Path) -> list:
    """Plain data that changes whenever the file does, without reading the whole of it.

    The time of the last change of the inode is part of it, because a program can set the time of
    the last write back, but not this one.
    """
    stat = path.stat()
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(SAMPLE))
        file.seek(max(stat.st_size - SAMPLE, 0))
        digest.update(file.read(SAMPLE))
    times = [stat.st_mtime_ns, stat.st_ctime_ns]
    return [str(path.resolve()), stat.st_size, *times, digest.hexdigest()]


def cached(folder: Path, build: Callable[[Path], None]) -> None:
    """Have ``build`` fill ``folder``, unless somebody did.

    Of several processes (ranks, a sweep's jobs) one builds, and the others wait for it. What a
    process leaves that died over it is cleared away by the next.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        return
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return
        beside = folder.with_suffix(".building")
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir()
        try:
            build(beside)
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)


class Tokens(NamedTuple):
    """Tokenized documents end to end, BOS and EOS included.

    ids     (N,) of the smallest unsigned dtype
    lengths (D,) tokens of each document
    counts  (N,) bool, which are targets; None: all are
    val     (D,) bool, which documents are held out
    ends    False where the last document goes on in the next part
    """

    ids: np.ndarray
    lengths: np.ndarray
    counts: np.ndarray | None
    val: np.ndarray
    ends: bool


def write(folder: Path, parts: Iterable[Tokens], dtype: str) -> tuple[int, int]:
    """Both splits of a corpus, part by part. Returns the documents of training and validation."""
    writers = [_Writer(folder, name, dtype) for name in SPLITS]
    for part in parts:
        for val, writer in enumerate(writers):
            writer.append(part, part.val == bool(val))
    for writer in writers:
        writer.close()
    return writers[0].documents, writers[1].documents


class _Writer:
    """The files of one split: its tokens, where documents begin and end, and which are targets."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self.dtype, self.tokens_written, self.documents = dtype, 0, 0
        self.tokens = (folder / f"{split}.tokens").open("wb")
        self.offsets = (folder / f"{split}.offsets").open("wb")
        self.offsets.write(np.zeros(1, np.int64).tobytes())
        self.mask = (folder / f"{split}.mask").open("wb")

    def append(self, part: Tokens, mine: np.ndarray) -> None:
        """The documents of ``part`` that are ``mine``, (D,) bool."""
        if not mine.any():
            return
        lengths = part.lengths[mine]
        here = slice(None) if mine.all() else np.repeat(mine, part.lengths)
        self.tokens.write(part.ids[here].astype(self.dtype).tobytes())
        if part.counts is not None:
            self.mask.write(part.counts[here].tobytes())
        ends = self.tokens_written + lengths.cumsum()
        self.tokens_written = int(ends[-1])
        if mine[-1] and not part.ends:
            ends = ends[:-1]
        self.documents += len(ends)
        self.offsets.write(ends.astype(np.int64).tobytes())

    def close(self) -> None:
        for file in (self.tokens, self.offsets, self.mask):
            file.close()


def describe(folder: Path, about: dict[str, Any]) -> None:
    """``about.json``: the tokens' dtype, and whatever else is to be kept with them."""
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def read(folder: Path) -> tuple[Documents, Documents, dict[str, Any]]:
    """Training and validation documents, and what ``about.json`` says of them."""
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    train, val = (_documents(folder, split, about["dtype"]) for split in SPLITS)
    return train, val, about


def _documents(folder: Path, split: str, dtype: str) -> Documents:
    mask = folder / f"{split}.mask"
    return Documents(
        Mapped(folder / f"{split}.tokens", dtype),
        Mapped(folder / f"{split}.offsets", "int64"),
        Mapped(mask, "bool") if mask.stat().st_size else None,
    )
