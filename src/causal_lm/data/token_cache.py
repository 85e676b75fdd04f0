"""Cache of tokenized corpora, in folders that are written atomically and named by a hash."""

import contextlib
import hashlib
import json
import logging
import os
import shutil
import zlib
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from causal_lm.data.documents import Documents, FileArray

log = logging.getLogger(__name__)

SPLITS, KINDS = ("train", "val", "test"), ("tokens", "offsets", "mask")
ABOUT = "about.json"  # plain data about a corpus, among it the dtype of its tokens
CHECKSUMS = "checksums"  # key of ABOUT, see :func:`checksums`
CHECKED_BLOCKS, BLOCK_BYTES = 256, 1 << 16  # of a file, that its checksum covers at most
CHECKED_OFFSETS = 1 << 16  # at a time, few enough for the processor's cache
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


def build_once(
    folder: Path, build: Callable[[Path], None], damage: Callable[[Path], str] = lambda _: ""
) -> None:
    """Let ``build`` fill ``folder``, unless it exists and ``damage`` finds nothing to name in it.

    Of several processes (ranks, jobs of a sweep) one builds and the others wait; what a killed one
    left is deleted first.
    """
    if folder.exists() and not damage(folder):
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if folder.exists():  # by now, another process may have built it
            if not (found := damage(folder)):
                return
            log.warning(f"{folder} is damaged and is built again: {found}")
        temporary = folder.with_suffix(".building")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            build(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            temporary.rename(folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


class TokenizedChunk(NamedTuple):
    """D tokenized documents end to end, BOS and EOS included."""

    ids: np.ndarray  # (N,) of the smallest unsigned dtype
    lengths: np.ndarray  # (D,) tokens of each document
    loss_mask: np.ndarray | None  # (N,) bool, False at tokens of a prompt; None: without prompts
    splits: np.ndarray  # (D,) index in SPLITS of each document
    ends_mid_document: bool  # the last document goes on in the next chunk
    hashes: list[bytes]  # (D,) of each document's text
    separate: int | None  # split of data that are held out as a whole; None: of other data
    characters: int  # of the text
    unknown: Counter[str]  # characters or words that the vocabulary lacks, with their number
    text_bytes: np.ndarray  # (D,) UTF-8 bytes of the learned text of each document; 0: not known


def write_corpus(folder: Path, chunks: Iterable[TokenizedChunk], dtype: str) -> list[int]:
    """Write the splits, chunk by chunk, and return the number of documents of each."""
    documents, tokens_written = [0] * len(SPLITS), [0] * len(SPLITS)
    with contextlib.ExitStack() as stack:
        tokens, offsets, masks = (
            [stack.enter_context((folder / f"{split}.{kind}").open("wb")) for split in SPLITS]
            for kind in KINDS
        )
        for file in offsets:
            file.write(np.zeros(1, np.int64).tobytes())
        for chunk in chunks:
            for split in np.unique(chunk.splits).tolist():  # those that the chunk has
                in_split = chunk.splits == split
                chosen = np.repeat(in_split, chunk.lengths)
                tokens[split].write(chunk.ids[chosen].astype(dtype).tobytes())
                if chunk.loss_mask is not None:
                    masks[split].write(chunk.loss_mask[chosen].tobytes())
                ends = tokens_written[split] + chunk.lengths[in_split].cumsum()
                tokens_written[split] = int(ends[-1])
                if in_split[-1] and chunk.ends_mid_document:
                    ends = ends[:-1]
                documents[split] += len(ends)
                offsets[split].write(ends.astype(np.int64).tobytes())
    return documents


def write_about(folder: Path, about: dict[str, Any]) -> None:
    """Write :data:`ABOUT`, after the other files of a corpus, with the checksums of all."""
    text = json.dumps(about | {CHECKSUMS: checksums(folder, about)})
    (folder / ABOUT).write_text(text, encoding="utf-8")


def checksums(folder: Path, about: dict[str, Any]) -> dict[str, list[int]]:
    """Bytes and CRC-32 of each file of a corpus, and of ``about``.

    Of a file above 16 MiB the CRC covers :data:`CHECKED_BLOCKS` evenly spaced blocks, so that
    opening a corpus takes milliseconds. Any damage of 1/256 of such a file is found, as cut or
    zeroed files have it; a few flipped bytes may not be. (The collator checks the range of ids.)
    """
    text = json.dumps(about).encode()
    found = {ABOUT: [len(text), zlib.crc32(text)]}
    for name in (f"{split}.{kind}" for split in SPLITS for kind in KINDS):
        with (folder / name).open("rb", buffering=0) as file:
            size, crc = os.fstat(file.fileno()).st_size, 0
            starts = range(0, size, max(BLOCK_BYTES, size // CHECKED_BLOCKS))
            for start in (*starts, max(size - BLOCK_BYTES, 0)):
                file.seek(start)
                crc = zlib.crc32(file.read(BLOCK_BYTES), crc)
        found[name] = [size, crc]
    return found


def find_damage(folder: Path) -> str:
    """What is wrong with a corpus on disk; empty where nothing is found.

    Checks sizes and checksums, and that offsets rise from 0 to the number of tokens.
    """
    try:
        about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        written, found = about.pop(CHECKSUMS), checksums(folder, about)
        if wrong := [name for name in found if written[name] != found[name]]:
            return f"{wrong[0]} is not as it was written"
        for split, documents in zip(SPLITS, read_corpus(folder)[0], strict=True):
            offsets, starts = documents.offsets, range(0, len(documents), CHECKED_OFFSETS)
            rises = all((offsets[i : i + CHECKED_OFFSETS + 1].diff() > 0).all() for i in starts)
            if not rises or [*offsets[:1], *offsets[-1:]] != [0, len(documents.tokens)]:
                return f"{split}.offsets do not rise from 0 to the number of tokens"
        return ""
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        return f"{ABOUT}, or a file that it needs, cannot be read: {error}"


def read_corpus(folder: Path) -> tuple[list[Documents], dict[str, Any]]:
    """The documents of each of :data:`SPLITS`, and the data of :data:`ABOUT`."""
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    kinds = tuple(zip(KINDS, (about["dtype"], "int64", "bool"), strict=True))
    splits, sizes = [], about["text_bytes"]
    for split, size in zip(SPLITS, sizes, strict=True):
        tokens, offsets, mask = (FileArray(folder / f"{split}.{k}", dtype) for k, dtype in kinds)
        splits.append(Documents(tokens, offsets, mask if len(mask) else None, size))
    return splits, about
