"""Tokenized corpora on disk: each is built once, is complete or absent, and has a name that changes
with whatever it was made from."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from causal_lm.data.documents import Documents, FileArray

SPLITS = ("train", "val")
SAMPLE_BYTES = 1 << 16
"""Bytes at either end of a file that are part of its identity."""


def default_folder() -> Path:
    """``causal-lm`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "causal-lm"


def fingerprint(data: Any) -> str:
    """A hash of plain data, to name a folder by."""
    text = json.dumps(data, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:24]


def file_identity(path: Path) -> list:
    """Plain data that changes whenever the file does, without reading all of it.

    The inode's time of change is part of it: a program can reset the time of the last write, but
    not that one.
    """
    stat = path.stat()
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(SAMPLE_BYTES))
        file.seek(max(stat.st_size - SAMPLE_BYTES, 0))
        digest.update(file.read(SAMPLE_BYTES))
    times = [stat.st_mtime_ns, stat.st_ctime_ns]
    return [str(path.resolve()), stat.st_size, *times, digest.hexdigest()]


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Let ``build`` fill ``folder``, unless it exists.

    Of several processes (ranks, jobs of a sweep) one builds and the others wait for it. What a
    killed process left unfinished is deleted first.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        return
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return
        unfinished = folder.with_suffix(".building")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir()
        try:
            build(unfinished)
            unfinished.rename(folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)


class TokenizedChunk(NamedTuple):
    """D tokenized documents end to end, BOS and EOS included.

    ids        (N,) of the smallest unsigned dtype
    lengths    (D,) tokens of each document
    loss_mask  (N,) bool, False at tokens of a prompt; None: there are no prompts
    val        (D,) bool, which documents are held out for validation
    continued  the last document goes on in the next chunk
    hashes     (D,) of each document's text, or none at all
    characters number of characters of the text
    unknown    characters or words that the vocabulary lacks, with their number
    """

    ids: np.ndarray
    lengths: np.ndarray
    loss_mask: np.ndarray | None
    val: np.ndarray
    continued: bool
    hashes: list[bytes]
    characters: int
    unknown: Counter[str]


def write(folder: Path, chunks: Iterable[TokenizedChunk], dtype: str) -> tuple[int, int]:
    """Write both splits, chunk by chunk, and return the number of documents of each."""
    writers = [_SplitWriter(folder, split, dtype) for split in SPLITS]
    for chunk in chunks:
        for val, writer in enumerate(writers):
            writer.append(chunk, chunk.val == bool(val))
    for writer in writers:
        writer.close()
    return writers[0].documents, writers[1].documents


class _SplitWriter:
    """Writes the files of one split: its tokens, the documents' offsets, and the loss mask."""

    def __init__(self, folder: Path, split: str, dtype: str) -> None:
        self.dtype, self.tokens_written, self.documents = dtype, 0, 0
        self.tokens = (folder / f"{split}.tokens").open("wb")
        self.offsets = (folder / f"{split}.offsets").open("wb")
        self.offsets.write(np.zeros(1, np.int64).tobytes())
        self.mask = (folder / f"{split}.mask").open("wb")

    def append(self, chunk: TokenizedChunk, own: np.ndarray) -> None:
        """Write the documents that belong to this split. own: (D,) bool."""
        if not own.any():
            return
        lengths = chunk.lengths[own]
        tokens = slice(None) if own.all() else np.repeat(own, chunk.lengths)
        self.tokens.write(chunk.ids[tokens].astype(self.dtype).tobytes())
        if chunk.loss_mask is not None:
            self.mask.write(chunk.loss_mask[tokens].tobytes())
        ends = self.tokens_written + lengths.cumsum()
        self.tokens_written = int(ends[-1])
        if own[-1] and chunk.continued:
            ends = ends[:-1]
        self.documents += len(ends)
        self.offsets.write(ends.astype(np.int64).tobytes())

    def close(self) -> None:
        for file in (self.tokens, self.offsets, self.mask):
            file.close()


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write ``about.json``: the tokens' dtype and other plain data about the corpus."""
    (folder / "about.json").write_text(json.dumps(about), encoding="utf-8")


def read(folder: Path) -> tuple[Documents, Documents, dict[str, Any]]:
    """The training documents, the validation documents, and the data of ``about.json``."""
    about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    train, val = (_documents(folder, split, about["dtype"]) for split in SPLITS)
    return train, val, about


def _documents(folder: Path, split: str, dtype: str) -> Documents:
    mask = folder / f"{split}.mask"
    return Documents(
        FileArray(folder / f"{split}.tokens", dtype),
        FileArray(folder / f"{split}.offsets", "int64"),
        FileArray(mask, "bool") if mask.stat().st_size else None,
    )
