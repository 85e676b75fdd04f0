"""Tokens on disk: never stale, never incomplete, built once, read piece by piece."""

import itertools
import json
import multiprocessing
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from causal_lm import config
from causal_lm.build import instantiate
from causal_lm.data import documents, token_cache
from causal_lm.data.documents import Documents, FileArray
from causal_lm.data.sources import base
from causal_lm.data.sources.docstrings import Docstrings
from causal_lm.data.sources.text_files import TextFiles


def lines_of(corpus):
    decode = corpus.tokenizer.decode
    both = (corpus.train, corpus.val)
    return sorted(decode(split[i].tokens.tolist()) for split in both for i in range(len(split)))


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n".join(f"line {i}" for i in range(100)))
    return path


@pytest.fixture
def make(path, tmp_path):
    def make(**options):
        options = {"unit": "line", "val_share": 0.2, "cache_dir": str(tmp_path / "cache")} | options
        return TextFiles(path=str(path), **options)

    return make


@pytest.fixture
def built(monkeypatch):
    """The folders that were built rather than found."""
    folders = []
    build_ = base.TextSource._build

    def count(self, folder):
        folders.append(folder)
        build_(self, folder)

    monkeypatch.setattr(base.TextSource, "_build", count)
    return folders


# ---- never stale ----


def test_the_second_start_reads_nothing(make, built, monkeypatch):
    first = lines_of(make().load())
    monkeypatch.setattr(TextFiles, "parts", None)
    assert lines_of(make().load()) == first
    assert len(built) == 1


@pytest.mark.parametrize(
    "change",
    [{"unit": "paragraph", "val_share": 0.5}, {"val_share": 0.3}, {"on_error": "skip"}],
    ids=str,
)
def test_other_settings_are_another_corpus(change, make, built, path):
    path.write_text("\n\n".join(path.read_text().splitlines()))
    make().load()
    make(**change).load()
    assert len(built) == 2


def test_a_changed_file_is_read_again(make, built, path):
    before = lines_of(make().load())
    stat = path.stat()
    path.write_text(path.read_text().replace("line", "mine"))  # as long as it was
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # and as old as it was
    after = lines_of(make().load())
    assert len(built) == 2
    assert after == [line.replace("line", "mine") for line in before]


def test_a_change_in_the_middle_of_a_large_file_is_seen(tmp_path):
    path = tmp_path / "large"
    content = bytearray(b"a" * 4 * token_cache.SAMPLE_BYTES)
    path.write_bytes(content)
    before, stat = token_cache.file_identity(path), path.stat()
    assert token_cache.file_identity(path) == before
    time.sleep(0.05)  # the clock of a file system has ticks
    content[2 * token_cache.SAMPLE_BYTES] = ord("b")
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert token_cache.file_identity(path) != before


@pytest.mark.extras
def test_another_tokenizer_is_another_corpus(make, built, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    sizes = []
    for size in (280, 290):
        sizes.append(make(tokenizer="bpe", vocab_size=size).load().tokenizer.vocab_size)
    assert len(built) == len(set(sizes)) == 2
    file = tmp_path / "tokenizer.json"
    for character in "ab":  # the same path, another content
        library = tokenizers.Tokenizer(tokenizers.models.WordLevel({character: 0}, character))
        library.save(str(file))
        assert character in make(tokenizer=str(file)).load().tokenizer.state()["json"]
    assert len(built) == 4
    assert lines_of(make().load()) == sorted(f"line {i}" for i in range(100))


def test_docstrings_are_read_again_where_a_file_changed(tmp_path, built):
    file = tmp_path / "a.py"
    for name in ("one", "two", "two"):
        file.write_text("\n".join(f'def f{i}():\n    """{name} {i}"""' for i in range(50)))
        corpus = Docstrings(root=str(tmp_path), val_share=0.3, cache_dir=str(tmp_path)).load()
        assert lines_of(corpus) == sorted(f"{name} {i}" for i in range(50))
    assert len(built) == 3  # a file that was written again counts as changed


# ---- whole or absent, built once ----


def test_what_fails_leaves_nothing(make, path, tmp_path):
    path.write_bytes(path.read_bytes() + b"\n\xff")
    with pytest.raises(ValueError, match="line 101"):
        make().load()
    assert [p.suffix for p in (tmp_path / "cache").iterdir()] in ([], [".lock"])


def test_what_a_killed_process_left_is_cleared(make, tmp_path):
    make().load()
    (folder,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    folder.rename(folder.with_suffix(".building"))
    (folder.with_suffix(".building") / "train.tokens").write_bytes(b"half")
    assert len(lines_of(make().load())) == 100
    assert not folder.with_suffix(".building").exists()


# ---- damaged: built again ----


def change(path, at, values=b"\xff\xff\xff\xff"):
    """Overwrite bytes of a file, from ``at`` on."""
    content = bytearray(path.read_bytes())
    content[at : at + len(values)] = values
    path.write_bytes(content)


def cut(path, size):
    path.write_bytes(path.read_bytes()[:size])


DAMAGES = [
    ("train.tokens", lambda p: cut(p, 100)),
    ("train.tokens", lambda p: cut(p, 101)),
    ("train.tokens", lambda p: p.write_bytes(b"")),
    ("train.tokens", lambda p: p.write_bytes(p.read_bytes() + b"\0")),
    ("train.tokens", lambda p: change(p, 200)),  # an id of 65,535
    ("val.tokens", lambda p: change(p, 20, b"\4\0")),  # a valid id, but another one
    ("val.tokens", lambda p: p.unlink()),
    ("train.offsets", lambda p: change(p, 80, np.int64(2**60).tobytes())),
    ("train.offsets", lambda p: change(p, 80, np.int64(-5).tobytes())),
    ("train.offsets", lambda p: p.write_bytes(b"")),
    ("val.offsets", lambda p: cut(p, 12)),
    ("val.mask", lambda p: p.write_bytes(b"\1")),
    ("about.json", lambda p: cut(p, 20)),
    ("about.json", lambda p: p.write_bytes(b"\x80")),
    ("about.json", lambda p: p.write_text("[]")),
    ("about.json", lambda p: p.write_text(p.read_text().replace("uint16", "uint32"))),
    ("about.json", lambda p: p.write_text(p.read_text().replace('"bytes"', '"words"'))),
    ("about.json", lambda p: p.unlink()),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGES)
def test_a_damaged_entry_is_built_again(name, damage, make, built, tmp_path, caplog):
    expected = lines_of(make().load())
    (folder,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    damage(folder / name)
    assert lines_of(make().load()) == expected
    assert len(built) == 2
    assert [name in m and str(folder) in m for m in caplog.messages] == [True]
    assert lines_of(make().load()) == expected
    assert len(built) == 2  # and whole again


def test_offsets_are_checked_where_the_checksum_does_not_look(tmp_path, monkeypatch):
    """Sixteen blocks of 256 bytes are covered; the offsets of 10,000 documents are 80 kB."""
    monkeypatch.setattr(token_cache, "CHECKED_BLOCKS", 16)
    monkeypatch.setattr(token_cache, "BLOCK_BYTES", 256)
    monkeypatch.setattr(token_cache, "CHECKED_OFFSETS", 1000)
    for split in token_cache.SPLITS:
        np.zeros(30_000, np.uint8).tofile(tmp_path / f"{split}.tokens")
        np.arange(0, 30_001, 3).astype(np.int64).tofile(tmp_path / f"{split}.offsets")
        (tmp_path / f"{split}.mask").touch()
    token_cache.write_about(tmp_path, {"dtype": "uint8", "text_bytes": [0, 0, 0]})
    path, sums = tmp_path / "train.offsets", token_cache.checksums(tmp_path, {})
    assert token_cache.find_damage(tmp_path) == ""
    change(path, 8 * 2000 + 6, b"\x01")
    assert token_cache.checksums(tmp_path, {}) == sums
    assert token_cache.find_damage(tmp_path).startswith("train.offsets")


@pytest.mark.parametrize("blocks", [4, 16])
def test_the_checksum_covers_evenly_spaced_blocks(blocks, tmp_path, monkeypatch):
    """Zeros over one part in ``blocks`` of a file are found wherever they are."""
    monkeypatch.setattr(token_cache, "CHECKED_BLOCKS", blocks)
    monkeypatch.setattr(token_cache, "BLOCK_BYTES", 16)
    for name in (f"{split}.{kind}" for split in token_cache.SPLITS for kind in token_cache.KINDS):
        (tmp_path / name).write_bytes(b"\1" * 1000)
    sums, path = token_cache.checksums(tmp_path, {}), tmp_path / "val.tokens"
    part = -(-1000 // blocks) + 16
    for start in range(0, 1000, 7):
        whole = path.read_bytes()
        change(path, start, bytes(min(part, 1000 - start)))
        assert start > 1000 - part or token_cache.checksums(tmp_path, {}) != sums
        path.write_bytes(whole)
    change(path, 999, b"\0")  # the end is always covered
    assert token_cache.checksums(tmp_path, {}) != sums


def damaged_by_name(folder):
    return "" if (folder / "whole").exists() else "not whole"


def start_damaged(folder):
    token_cache.build_once(folder, build_slowly, damaged_by_name)
    return (folder / "whole").exists()


def test_of_several_processes_one_builds_a_damaged_entry_again(tmp_path):
    (tmp_path / "corpus").mkdir()
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert all(pool.map(start_damaged, [tmp_path / "corpus"] * 3, chunksize=1))
    assert (tmp_path / "built").read_text() == "x"


def test_a_failed_rebuild_leaves_no_entry_half_written(make, path, tmp_path):
    make().load()
    (folder,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    cut(folder / "train.tokens", 100)
    damaged = sorted(p.name for p in folder.iterdir())
    with pytest.raises(RuntimeError, match="no space"):
        token_cache.build_once(folder, fail, token_cache.find_damage)
    assert sorted(p.name for p in folder.iterdir()) == damaged
    assert not folder.with_suffix(".building").exists()


def fail(folder):
    (folder / "train.tokens").write_bytes(b"half")
    raise RuntimeError("no space")


def build_slowly(folder):
    with (folder.parent / "built").open("a") as file:
        file.write("x")
    time.sleep(0.3)
    (folder / "whole").touch()


def start(folder):
    token_cache.build_once(folder, build_slowly)
    return (folder / "whole").exists()


def test_of_several_processes_one_builds_and_the_others_wait(tmp_path):
    with multiprocessing.get_context("fork").Pool(3) as pool:
        assert all(pool.map(start, [tmp_path / "corpus"] * 3, chunksize=1))
    assert (tmp_path / "built").read_text() == "x"


# ---- the same, however it is made ----


def test_several_processes_make_the_same_tokens(make, path, tmp_path, monkeypatch):
    path.write_text("\n".join(f"line {i} " * 20 for i in range(3000)))
    alone = make(num_proc=1).load()
    monkeypatch.setattr(base, "SINGLE_PROCESS_BYTES", 0)
    monkeypatch.setattr(base, "CHUNK_CHARACTERS", 10_000)  # 50 chunks
    several = make(num_proc=2, cache_dir=str(tmp_path / "other")).load()
    for one, other in ((alone.train, several.train), (alone.val, several.val)):
        assert torch.equal(one.tokens[:], other.tokens[:])
        assert torch.equal(one.offsets[:], other.offsets[:])


def test_every_document_once_per_epoch_in_full(path, tmp_path):
    path.write_text("\n".join(f"line {i} " * (i % 30 + 1) for i in range(200)))
    cfg = config.load([
        "data=text", f"data.path={path}", "data.unit=line", "data.max_length=40",
        f"data.cache_dir={tmp_path / 'cache'}", "data.val_share=0.2",
    ])  # fmt: skip
    data = instantiate(cfg.data)
    data.setup()
    pairs = []  # every (input, target) of an epoch
    for batch in data.train_dataloader():
        for ids, n in zip(batch.input_ids, batch.lengths.tolist(), strict=True):
            pairs += list(zip(ids[: n - 1].tolist(), ids[1:n].tolist(), strict=True))
    expected = []
    for i in range(len(data.corpus.train)):
        ids = data.corpus.train[i].tokens.tolist()
        expected += itertools.pairwise(ids)
    assert len(data.train_windows) > len(data.corpus.train) > 100
    assert sorted(pairs) == sorted(expected)


# ---- reading ----


def test_tokens_take_the_smallest_dtype(make, tmp_path):
    corpus = make().load()
    assert corpus.train.tokens.dtype == "uint16"  # 259 ids
    file = next((tmp_path / "cache").glob("*/train.tokens"))
    assert file.stat().st_size == 2 * len(corpus.train.tokens)
    assert corpus.train[0].tokens.dtype == torch.int64


def test_a_file_array_is_pickled_by_name(make):
    train = make().load().train
    copy = pickle.loads(pickle.dumps(train))
    assert len(pickle.dumps(train)) < 2000
    assert torch.equal(copy[3].tokens, train[3].tokens)


def resident():
    """MiB of files in this process's memory."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssFile")) / 1024


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="reads /proc")
def test_reading_all_of_a_file_keeps_none_of_it(tmp_path):
    np.zeros(30 << 20, np.uint16).tofile(tmp_path / "tokens")  # 60 MiB
    tokens = FileArray(tmp_path / "tokens", "uint16")
    before = resident()
    for first in range(0, len(tokens), 1000):
        tokens[first : first + 1000]
    assert resident() - before < 10
    mapped = np.memmap(tmp_path / "tokens", np.uint16)
    mapped.sum()
    assert resident() - before > 50  # the figure would show pages that are kept


@pytest.mark.parametrize("limit", [documents.MAX_PREAD_VALUES, 0])
def test_slices_of_a_file_are_those_of_the_array(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "MAX_PREAD_VALUES", limit)
    values = np.random.default_rng(0).integers(0, 60_000, 100).astype(np.uint16)
    values.tofile(tmp_path / "tokens")
    tokens = FileArray(tmp_path / "tokens", "uint16")
    assert len(tokens) == 100
    for piece in (slice(None), slice(3, 9), slice(5, 5), slice(None, -1), slice(90, 200)):
        assert tokens[piece].tolist() == values[piece].tolist()


def test_threads_may_read_at_once(make):
    train = make().load().train
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: train[i % len(train)].tokens.tolist(), range(4000)))
    assert all(found[i] == train[i % len(train)].tokens.tolist() for i in range(4000))


@given(st.lists(st.integers(2, 30), min_size=1, max_size=8), st.integers(2, 9))
def test_windows_by_loop(lengths, max_length):
    whole = Documents.from_lists([list(range(n)) for n in lengths])
    expected = []
    for first, n in zip(np.cumsum([0, *lengths]).tolist(), lengths, strict=False):
        begin = 0
        while True:
            end = min(begin + max_length, n)
            expected.append((first + begin, end - begin, list(range(begin, end))))
            if end == n:
                break
            begin = end - 1
    windows = whole.windows(max_length)
    found = [windows[i].tokens.tolist() for i in range(len(windows))]
    starts, sizes = [windows.span(i).start for i in range(len(windows))], windows.lengths.tolist()
    assert list(zip(starts, sizes, found, strict=True)) == expected


def test_about_is_plain_json(make, tmp_path):
    make().load()
    about = json.loads(next((tmp_path / "cache").glob("*/about.json")).read_text())
    assert about["tokenizer"] == {"name": "bytes"}
