"""Data sets of the `datasets` library, local ones: read, cached, and never stale."""

import json
import os
import sys

import pytest

from causal_lm import config
from causal_lm.build import instantiate
from causal_lm.data.sources.huggingface import HuggingFaceDataset

datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.extras

ROWS = [{"text": f"text {i} é", "q": f"why {i}?", "n": i} for i in range(60)]


def lines_of(split, tokenizer):
    return sorted(tokenizer.decode(split[i].tokens.tolist()) for i in range(len(split)))


def every_text(corpus):
    both = [lines_of(split, corpus.tokenizer) for split in (corpus.train, corpus.val)]
    assert all(both)
    return sorted([*both[0], *both[1]])


@pytest.fixture
def make(tmp_path):
    def make(path, **options):
        options = {"val_share": 0.2, "cache_dir": str(tmp_path / "cache"), "num_proc": 1} | options
        return HuggingFaceDataset(path=str(path), **options)

    return make


@pytest.fixture
def saved(tmp_path):
    """One of each kind, all with the same rows."""
    made = datasets.Dataset.from_list(ROWS)
    made.to_json(tmp_path / "a.jsonl")
    made.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("\n".join(row["text"] for row in ROWS))
    made.save_to_disk(tmp_path / "disk")
    parts = {"train": made.select(range(50)), "test": made.select(range(50, 60))}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "parts")
    (tmp_path / "folder").mkdir()
    made.to_parquet(tmp_path / "folder" / "train.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt", "disk", "folder"])
def test_all_kinds_hold_the_same_text(name, saved, make, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", saved / "hf")
    first = make(saved / name).load()
    assert every_text(first) == sorted(row["text"] for row in ROWS)
    left = {p.suffix for p in (saved / "cache").iterdir()}
    assert left == {"", ".lock"}  # the tokens, and nothing of what they were made from
    monkeypatch.setitem(sys.modules, "datasets", None)  # the second start does not need it
    assert every_text(make(saved / name).load()) == every_text(first)


def test_separate_validation_data(saved, make):
    expected = sorted(row["text"] for row in ROWS[50:])
    corpus = make(saved / "parts", val_split="test").load()
    assert len(corpus.train) == 50
    assert lines_of(corpus.val, corpus.tokenizer) == expected
    (saved / "val.txt").write_text("\n".join(expected))
    corpus = make(saved / "parts", val_path=str(saved / "val.txt")).load()
    assert len(corpus.train) == 50
    assert lines_of(corpus.val, corpus.tokenizer) == expected


def test_a_file_has_no_split_to_validate_on(saved, make):
    with pytest.raises(ValueError, match=r"data\.val_split=test.*a\.jsonl"):
        make(saved / "a.jsonl", val_split="test")


def test_a_prompt_is_no_target(saved, make):
    corpus = make(saved / "a.jsonl", prompt_field="q").load()
    ids, mask = corpus.val[0]
    text = corpus.tokenizer.decode(ids[mask].tolist())
    prompt = corpus.tokenizer.decode(ids[~mask].tolist())
    assert {"text": text, "q": prompt, "n": int(text.split()[1])} in ROWS


def test_a_changed_file_is_read_again(saved, make):
    path = saved / "a.jsonl"
    before, stat = every_text(make(path).load()), path.stat()
    path.write_text("".join(json.dumps(r | {"text": f"tert {r['n']} é"}) + "\n" for r in ROWS))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert every_text(make(path).load()) == [line.replace("text", "tert") for line in before]


def test_another_tokenizer_is_another_corpus(saved, make):
    bytes_, bpe = (make(saved / "a.jsonl", tokenizer=t).load() for t in ("bytes", "bpe"))
    assert bytes_.tokenizer.vocab_size == 259 < bpe.tokenizer.vocab_size
    assert every_text(bytes_) == every_text(bpe)
    assert len(bpe.train.tokens) < len(bytes_.train.tokens)


def test_rows_without_a_text_are_skipped(tmp_path, make):
    path = tmp_path / "disk"
    datasets.Dataset.from_list([*ROWS, {"text": None, "q": "", "n": 0}]).save_to_disk(path)
    source = make(path, on_error="skip")
    assert every_text(source.load()) == sorted(row["text"] for row in ROWS)
    assert sum(source.skipped.values()) == 1


def test_faults_are_named(saved, make):
    for name in ("a.jsonl", "disk"):
        with pytest.raises(ValueError, match=rf"{name}.* 'body'.* text, q, n"):
            make(saved / name, field="body").load()
        with pytest.raises(ValueError, match=rf"{name}.* 1: .*'n'.* 0"):
            make(saved / name, field="n").load()
    with pytest.raises(ValueError, match=r"data\.path=.*parts.*dev"):
        make(saved / "parts", split="dev").load()


def test_without_the_extra_it_is_named(saved, make, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"pip install -e '\.\[huggingface\]'"):
        make(saved / "disk").load()


def test_by_configuration(saved):
    cfg = config.load(["data=huggingface", f"data.path={saved / 'a.parquet'}", "data.num_proc=2"])
    data = instantiate(cfg.data)
    data.setup()
    assert next(iter(data.train_dataloader())).input_ids.shape[0] == 8
