"""Text files to documents: units, faults and splits; decoding gives the text of the files."""

import contextlib
import csv
import gzip
import json
import logging

import pytest

from causal_lm import config
from causal_lm.data.datamodule import DataModule
from causal_lm.data.sources import file_io, file_reader
from causal_lm.data.sources.text_files import TextFiles


def texts(documents, tokenizer):
    return [tokenizer.decode(documents[i].tokens.tolist()) for i in range(len(documents))]


def source(path, tmp_path, **options):
    options = {"val_share": 0.3, "num_proc": 1, "cache_dir": str(tmp_path / "cache")} | options
    return TextFiles(path=str(path), **options)


def every_text(path, tmp_path, **options):
    """Of both splits, sorted."""
    corpus = source(path, tmp_path, **options).load()
    both = [texts(split, corpus.tokenizer) for split in (corpus.train, corpus.val)]
    assert all(both)
    return sorted([*both[0], *both[1]])


@pytest.fixture
def lines(tmp_path):
    path = tmp_path / "lines.txt"
    path.write_text("".join(f"line {i} é\n" for i in range(40)), encoding="utf-8")
    return path


def test_a_document_is_framed_by_bos_and_eos(lines, tmp_path):
    corpus = source(lines, tmp_path, unit="line").load()
    tokenizer = corpus.tokenizer
    for split in (corpus.train, corpus.val):
        for i in range(len(split)):
            first, *inner, last = split[i].tokens.tolist()
            assert (first, last) == (tokenizer.bos_id, tokenizer.eos_id)
            assert not {first, last} & set(inner)


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", ["", "\ufeff"])
def test_units_of_a_text_file(newline, bom, tmp_path):
    words = ["one", "two", "", "", "three é", "four", "   ", "five"]
    path = tmp_path / "a.txt"
    path.write_bytes((bom + newline.join(words)).encode())
    (tmp_path / "val.txt").write_text("six")  # so that the file is not cut in two

    def found(unit):
        return every_text(path, tmp_path, unit=unit, val_path=str(tmp_path / "val.txt"))

    whole = newline.join(words)
    assert found("file") == sorted([whole, "six"])
    assert found(None) == found("file")
    assert found("line") == sorted(["one", "two", "three é", "four", "five", "six"])
    pairs = [newline.join(["one", "two"]), newline.join(["three é", "four"]), "five", "six"]
    assert found("paragraph") == sorted(pairs)


def test_records(tmp_path):
    rows = [{"text": f"text {i}\nof two lines", "body": f"body {i}"} for i in range(30)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert every_text(path, tmp_path) == sorted(r["text"] for r in rows)
    assert every_text(path, tmp_path, field="body") == sorted(r["body"] for r in rows)
    with pytest.raises(ValueError, match=r"data\.unit=line.*a\.jsonl.*record"):
        source(path, tmp_path, unit="line").load()


def test_csv_and_json(tmp_path):
    rows = [{"text": f'text {i}, "quoted"\nof two lines', "body": f"é {i}"} for i in range(30)]
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["text", "body"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=2))
    (tmp_path / "b.json").write_text("\n".join(map(json.dumps, rows)))
    for name in ("a.csv", "a.json", "b.json"):
        for field in ("text", "body"):
            expected = sorted(row[field] for row in rows)
            assert every_text(tmp_path / name, tmp_path, field=field) == expected
    with pytest.raises(ValueError, match=r"a\.csv, line 3: .*'x'.*text, body"):
        source(tmp_path / "a.csv", tmp_path, field="x").load()
    (tmp_path / "a.json").write_text("[1")
    with pytest.raises(ValueError, match=r"a\.json: "):
        source(tmp_path / "a.json", tmp_path).load()


@pytest.mark.extras
def test_parquet_is_read_as_jsonl_is(tmp_path):
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"text": f"text {i}", "body": f"body {i}"} for i in range(300)]
    path = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    assert every_text(path, tmp_path, field="body") == sorted(r["body"] for r in rows)
    with pytest.raises(ValueError, match=r"a\.parquet.*'x'.*text, body"):
        source(path, tmp_path, field="x").load()
    parquet.write_table(arrow.Table.from_pylist([*rows, {"text": None, "body": ""}]), path)
    with pytest.raises(ValueError, match=r"a\.parquet, row 301: .*'text'"):
        source(path, tmp_path).load()
    parquet.write_table(arrow.Table.from_pylist(rows), path, compression="none")
    whole = path.read_bytes()
    for broken in (b"none", whole[:4] + b"\xff" * (len(whole) // 2) + whole[4 + len(whole) // 2 :]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=r"a\.parquet: "):
            source(path, tmp_path).load()


# ---- faults ----

GOOD = [f"good {i}" for i in range(20)]


def jsonl(*lines):
    good = [json.dumps({"text": text}).encode() for text in GOOD]
    return b"\n".join([good[0], *lines, *good[1:]])


def txt(*lines):
    return b"\n".join([GOOD[0].encode(), *lines, *[g.encode() for g in GOOD[1:]]])


FAULTS = [
    ("a.txt", "line", txt(b"b\xffd"), ["line 2: ", "0xff"], "lines that are not UTF-8"),
    ("a.txt", "paragraph", b"\n\n".join([*(g.encode() for g in GOOD), b"a\nb\n\xc3("]),
     ["line 43: ", "0xc3"], "paragraphs that are not UTF-8"),
    ("a.txt", "line", txt(b"a" * 3000), ["line 2: "], "lines longer than 0 MiB"),
    ("a.txt", "paragraph", b"\n\n".join([*(g.encode() for g in GOOD), b"a\n" * 1500]),
     ["line 41: "], "paragraphs longer than 0 MiB"),
    ("a.jsonl", None, jsonl(b'{"text": "a'), ["line 2: "], "records that are not JSON"),
    ("a.jsonl", None, jsonl(b"", b'{"a": 1, "b": 2}'),
     ["line 3: ", "'text'", "a, b"], "records without a text"),
    ("a.jsonl", None, jsonl(b'{"text": 5}'), ["line 2: ", "'text'", "5"],
     "records without a text"),
    ("a.jsonl", None, jsonl(b"[1]"), ["line 2: "], "records without a text"),
    ("a.jsonl", None, jsonl(b'{"text": "\\ud800"}'), ["line 2: ", "'text'"],
     "records without a text"),
    ("a.jsonl", None, jsonl(b'{"text": "\xe9"}'), ["line 2: ", "0xe9"],
     "records that are not UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "unit", "content", "words", "kind"), FAULTS)
def test_a_fault_is_named_by_file_and_line_or_skipped(
    name, unit, content, words, kind, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(file_reader, "MAX_UNIT_BYTES", 2000)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data\.on_error=skip") as error:
        source(path, tmp_path, unit=unit).load()
    assert all(word in str(error.value) for word in (str(path), *words))
    with caplog.at_level(logging.INFO):
        assert every_text(path, tmp_path, unit=unit, on_error="skip") == sorted(GOOD)
    assert f" 1 {kind};" in caplog.text


def test_faulty_files(tmp_path, caplog):
    folder = tmp_path / "texts"
    folder.mkdir()
    for i, good in enumerate(GOOD):
        (folder / f"{i}.txt").write_text(good)
    (folder / "bad.txt").write_bytes(b"\n" * 3_000_000 + b"\xe2\x28\xa1")
    with pytest.raises(ValueError, match=r"bad\.txt, line 3000001: .*0xe2"):
        source(folder, tmp_path).load()
    (folder / "bad.txt").write_bytes(b"")
    for unit in ("file", "line"):
        with pytest.raises(ValueError, match=r"bad\.txt"):
            source(folder, tmp_path, unit=unit).load()
        assert every_text(folder, tmp_path, unit=unit, on_error="skip") == sorted(GOOD)
    with caplog.at_level(logging.INFO):  # also where tokens come from the cache
        source(folder, tmp_path, unit="line", on_error="skip").load()
    assert " 1 empty files;" in caplog.text


def test_a_paragraph_above_the_limit_is_refused_and_loses_no_line(tmp_path, monkeypatch):
    monkeypatch.setattr(file_reader, "MAX_UNIT_BYTES", 8)
    (tmp_path / "a.txt").write_text("\n12345678\nab\n\ncd")  # the first line alone is at the limit
    with pytest.raises(ValueError, match=r"a\.txt, line 2: .*MiB"):
        source(tmp_path / "a.txt", tmp_path, unit="paragraph").load()


@pytest.mark.slow
def test_a_line_of_50_mb(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(txt(b"x" * 50_000_000))
    with pytest.raises(ValueError, match=r"a\.txt, line 2: .*16 MiB"):
        source(path, tmp_path, unit="line").load()
    assert every_text(path, tmp_path, unit="line", on_error="skip") == sorted(GOOD)
    # The same bytes are a document where the unit is the file.
    assert len(source(path, tmp_path).load().train.tokens) > 34_000_000


def test_missing_and_unknown_files_are_named(tmp_path):
    (tmp_path / "a.xyz").write_text("a,b")
    for path in ("nowhere", "*.jsonl", ".", "*.xyz"):
        with pytest.raises(FileNotFoundError, match=r"data\.path=.*txt, jsonl") as error:
            source(tmp_path / path, tmp_path).load()
        assert ("1 .xyz" in str(error.value)) == (path in (".", "*.xyz"))
    with pytest.raises(ValueError, match=r"data\.format=xyz"):
        source(tmp_path / "a.xyz", tmp_path, format="xyz").load()


def test_hidden_and_other_files_are_counted_and_not_read(tmp_path, caplog):
    folder = tmp_path / "texts"
    for name in ("a.txt", "b.TXT", "c.md", "README", ".hidden.txt", ".ipynb_checkpoints/a.txt"):
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text("".join(f"{name} {i}\n" for i in range(10)))

    def names(path, **options):
        found = every_text(path, tmp_path, unit="line", **options)
        return sorted({text.split()[0] for text in found})

    with caplog.at_level(logging.WARNING):
        assert names(folder) == ["a.txt", "b.TXT"]
    assert "1 .md, 2 hidden, 1 without a suffix" in caplog.text
    assert names(folder / "*") == ["a.txt", "b.TXT"]
    assert names(folder, format="txt") == ["README", "a.txt", "b.TXT", "c.md"]
    for name in ("c.md", "README", ".hidden.txt"):  # a file that is named itself
        assert names(folder / name) == [name]


def test_compressed_files_are_read_as_their_content(tmp_path):
    rows = [{"text": f"text {i} é"} for i in range(200)]
    content = "\n".join(map(json.dumps, rows)).encode()
    (tmp_path / "a.JSONL.gz").write_bytes(gzip.compress(content))
    expected = sorted(row["text"] for row in rows)
    assert every_text(tmp_path, tmp_path) == expected
    book = "".join(f"é {i}\n" for i in range(3000))
    (tmp_path / "book.txt.gz").write_bytes(gzip.compress(book.encode()))
    corpus = source(tmp_path / "book.txt.gz", tmp_path, val_share=0.1).load()
    (head,), (tail,) = (texts(s, corpus.tokenizer) for s in (corpus.train, corpus.val))
    assert head + tail == book and 0.08 < len(tail) / len(book) < 0.12
    (tmp_path / "torn.txt.gz").write_bytes(gzip.compress(book.encode())[:-20])
    for unit in ("line", "file"):
        with pytest.raises(ValueError, match=r"torn\.txt\.gz"):
            source(tmp_path / "torn.txt.gz", tmp_path, unit=unit).load()


@pytest.mark.extras
def test_zstandard_files(tmp_path):
    import zstandard

    content = "\n".join(GOOD).encode()
    (tmp_path / "a.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
    assert every_text(tmp_path / "a.txt.zst", tmp_path, unit="line") == sorted(GOOD)


def test_configuration_says_what_is_missing():
    with pytest.raises(config.ConfigError, match=r"data\.path"):
        config.load(["data=text"])
    with pytest.raises(config.ConfigError, match=r"data\.tokenizer.*bpee"):
        config.load(["data=text", "data.path=x", "data.tokenizer=bpee"])
    with pytest.raises(config.ConfigError, match=r"data\.unit.*page"):
        config.load(["data=text", "data.path=x", "data.unit=page"])


# ---- splits ----


def test_the_split_depends_on_each_text_alone(tmp_path):
    def val(*names):
        corpus = source(tmp_path / "*.txt", tmp_path, unit="line").load()
        return set(texts(corpus.val, corpus.tokenizer))

    (tmp_path / "b.txt").write_text("\n".join(f"b {i}" for i in range(50)))
    first = val()
    (tmp_path / "b.txt").write_text("\n".join(f"b {i}" for i in reversed(range(50))))
    assert val() == first
    (tmp_path / "a.txt").write_text("\n".join(f"a {i}" for i in range(50)))
    second = val()
    assert {t for t in second if t.startswith("b")} == first
    assert 5 <= len(first) <= 25 and len(second) > len(first)


def test_separate_validation_files(lines, tmp_path):
    other = tmp_path / "val.txt"
    other.write_text("held\nout")
    corpus = source(lines, tmp_path, unit="line", val_path=str(other)).load()
    assert len(corpus.train) == 40
    assert texts(corpus.val, corpus.tokenizer) == ["held", "out"]
    with pytest.raises(ValueError, match=r"lines\.txt.*data\.path.*data\.val_path"):
        source(lines, tmp_path, val_path=str(tmp_path)).load()


@pytest.mark.parametrize("content", ["".join(f"é {i}\n" for i in range(3000)), "é" * 30_000])
def test_of_one_long_document_the_last_part_is_held_out(content, tmp_path, monkeypatch):
    monkeypatch.setattr(file_io, "BLOCK_BYTES", 1000)  # so that it comes in many parts
    path = tmp_path / "book.txt"
    path.write_text(content)
    corpus = source(path, tmp_path, val_share=0.1).load()
    assert len(corpus.train) == len(corpus.val) == 1
    (head,), (tail,) = (texts(s, corpus.tokenizer) for s in (corpus.train, corpus.val))
    assert head + tail == content
    assert 0.08 < len(tail) / len(content) < 0.12
    assert head.endswith("\n") or "\n" not in content


def test_an_empty_split_names_the_keys_to_change(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one"}')
    with pytest.raises(ValueError, match=r"data\.val_path") as error:
        source(path, tmp_path, val_share=0.5).load()
    assert "data.unit" not in str(error.value)  # a record cannot be cut


def test_validation_files_that_repeat_the_training_files_are_refused(lines, tmp_path, caplog):
    copy = tmp_path / "copy.txt"
    copy.write_text(lines.read_text(encoding="utf-8"), encoding="utf-8")
    for unit in ("line", "file"):
        with pytest.raises(ValueError, match=r"100\.0%.*data\.max_overlap"):
            source(lines, tmp_path, unit=unit, val_path=str(copy)).load()
    copy.write_text("line 3 é\nnew\nnew too\nand new\n", encoding="utf-8")
    for limit, refused in ((0.5, False), (0.2, True)):  # the second time from the cache
        options = {"unit": "line", "val_path": str(copy), "max_overlap": limit}
        with caplog.at_level(logging.WARNING), contextlib.ExitStack() as stack:
            if refused:
                stack.enter_context(pytest.raises(ValueError, match=r"data\.max_overlap=0\.2"))
            source(lines, tmp_path, **options).load()
    assert "25.0%" in caplog.text


@pytest.mark.parametrize("content", ["\n \n", "a", ""])
def test_a_file_without_text_for_both_splits_is_refused(content, tmp_path):
    (tmp_path / "a.txt").write_text(content)
    for unit in ("file", "line"):
        with pytest.raises(ValueError, match=r"data\.val_path|a\.txt"):
            source(tmp_path / "a.txt", tmp_path, unit=unit).load()


# ---- long documents, windows, prompts ----


def test_windows_hold_every_byte_of_every_document(tmp_path, monkeypatch):
    """Long documents come in several parts and are cut into windows; nothing is lost."""
    monkeypatch.setattr(file_io, "BLOCK_BYTES", 4096)
    contents = {f"{i}.txt": f"{i} – ∂é\n" * (400 * i + 1) for i in range(9)}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    corpus = source(tmp_path, tmp_path).load()
    rebuilt = []
    for split in (corpus.train, corpus.val):
        windows = split.windows(50)
        assert len(windows) == len(windows.lengths)
        document = []
        for i in range(len(windows)):
            window = windows[i].tokens.tolist()
            assert len(window) == windows.lengths[i] <= 50
            if window[0] == corpus.tokenizer.bos_id:
                document = window
            else:
                assert window[0] == document[-1]  # the token that neighboring windows share
                document = document + window[1:]
            if window[-1] == corpus.tokenizer.eos_id:
                rebuilt.append(corpus.tokenizer.decode(document))
        assert int((windows.lengths - 1).sum()) == int((split.lengths - 1).sum())
    assert sorted(rebuilt) == sorted(contents.values())


def test_a_prompt_is_context_and_no_target(tmp_path, caplog):
    rows = [{"q": f"Q{i}?" * (i % 3), "text": f"answer {i}"} for i in range(40)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    corpus = source(path, tmp_path, prompt_field="q").load()
    found = {}
    for split in (corpus.train, corpus.val):
        for i in range(len(split)):
            ids, loss_mask = split[i]
            assert len(ids) == len(loss_mask)
            assert loss_mask[0] and loss_mask[-1]  # BOS, which is never a target, and EOS
            text, prompt = (
                corpus.tokenizer.decode(ids[mask].tolist()) for mask in (loss_mask, ~loss_mask)
            )
            found[text] = prompt
        short = split.windows(5)
        assert len(short[0].loss_mask) == len(short[0].tokens) == 5
        assert len(short[-1].loss_mask) == len(short[-1].tokens) == 0
    assert found == {row["text"]: row["q"] for row in rows}
    assert source(path, tmp_path).load().train[0].loss_mask is None
    with caplog.at_level(logging.WARNING):
        DataModule(source(path, tmp_path, prompt_field="q"), batch_size=2, max_length=4).load()
    assert "data.max_length=4" in caplog.text
    (tmp_path / "b.txt").write_text("b")
    with pytest.raises(ValueError, match=r"data\.prompt_field.*b\.txt"):
        source(tmp_path, tmp_path, prompt_field="q").load()
