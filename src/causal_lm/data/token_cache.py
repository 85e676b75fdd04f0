"""Cache of tokenized corpora, in folders that are written atomically and named by a hash."""

import contextlib
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
ABOUT = "about.json"  # plain data about a corpus, among it the dtype of its tokens
SAMPLE_BYTES = 1 << 16  # bytes at either end of a file that are part of its identity


def default_folder() -> Path:
    """``causal-lm`` in ``$XDG_CACHE_HOME``, or in ``~/.cache``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "causal-lm"


def fingerprint(data: Any) -> str:
    """A hash of plain data, to name a folder by."""
    text = json.dumps(data, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:24]


def file_identity(path: Path) -> list:
    """Plain data that changes whenever the file does, without reading all of it."""
    stat = path.stat()  # a program can reset mtime, but not ctime
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(SAMPLE_BYTES))
        file.seek(max(stat.st_size - SAMPLE_BYTES, 0))
        digest.update(file.read(SAMPLE_BYTES))
    times = [stat.st_mtime_ns, stat.st_ctime_ns]
    return [str(path.resolve()), stat.st_size, *times, digest.hexdigest()]


def build_once(folder: Path, build: Callable[[Path], None]) -> None:
    """Let ``build`` fill ``folder``, unless it exists. Of several processes (ranks, jobs of a
    sweep) one builds and the others wait; what a killed one left is deleted first."""
    if folder.exists():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():
            return
        temporary = folder.with_suffix(".building")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            build(temporary)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class TokenizedChunk(NamedTuple):
    """D tokenized documents end to end, BOS and EOS included."""

    ids: np.ndarray  # (N,) of the smallest unsigned dtype
    lengths: np.ndarray  # (D,) tokens of each document
    loss_mask: np.ndarray | None  # (N,) bool, False at tokens of a prompt; None: without prompts
    is_val: np.ndarray  # (D,) bool, which documents are held out for validation
    ends_mid_document: bool  # the last document goes on in the next chunk
    hashes: list[bytes]  # (D,) of each document's text, or none at all
    characters: int  # of the text
    unknown: Counter[str]  # characters or words that the vocabulary lacks, with their number


def write_corpus(folder: Path, chunks: Iterable[TokenizedChunk], dtype: str) -> list[int]:
    """Write both splits, chunk by chunk, and return the number of documents of each."""
    documents, tokens_written = [0, 0], [0, 0]
    with contextlib.ExitStack() as stack:
        tokens, offsets, masks = (
            [stack.enter_context((folder / f"{split}.{kind}").open("wb")) for split in SPLITS]
            for kind in ("tokens", "offsets", "mask")
        )
        for file in offsets:
            file.write(np.zeros(1, np.int64).tobytes())
        for chunk in chunks:
            for val in np.unique(chunk.is_val).astype(int):  # the splits that the chunk has
                in_split = chunk.is_val == val
                chosen = slice(None) if in_split.all() else np.repeat(in_split, chunk.lengths)
                tokens[val].write(chunk.ids[chosen].astype(dtype).tobytes())
                if chunk.loss_mask is not None:
                    masks[val].write(chunk.loss_mask[chosen].tobytes())
                ends = tokens_written[val] + chunk.lengths[in_split].cumsum()
                tokens_written[val] = int(ends[-1])
                if in_split[-1] and chunk.ends_mid_document:
                    ends = ends[:-1]
                documents[val] += len(ends)
                offsets[val].write(ends.astype(np.int64).tobytes())
    return documents


def read_corpus(folder: Path) -> tuple[Documents, Documents, dict[str, Any]]:
    """The training documents, the validation documents, and the data of :data:`ABOUT`."""
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    kinds = (("tokens", about["dtype"]), ("offsets", "int64"), ("mask", "bool"))
    splits = []
    for split in SPLITS:
        tokens, offsets, mask = (FileArray(folder / f"{split}.{k}", dtype) for k, dtype in kinds)
        splits.append(Documents(tokens, offsets, mask if len(mask) else None))
    return splits[0], splits[1], about
