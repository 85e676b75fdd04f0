"""Any value on any key, any bytes in any file, any texts: a run, or one clear line."""

import functools
import tempfile
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf, open_dict

from causal_lm import config
from causal_lm.build import restore
from causal_lm.data import token_cache
from causal_lm.data.collate import Collate
from causal_lm.data.sources.text_files import TextFiles
from causal_lm.data.tokenize_corpus import TRAIN, VAL, Chunk, tokenize
from causal_lm.data.tokenizers import ByteTokenizer
from causal_lm.objective import IGNORE
from causal_lm.run_dir import RunDir
from causal_lm.schema import RULES, rule_of
from support import ROOT, command
from support.runs import short_run

QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
BASES = (("data=synthetic",), ("data=text", "data.path=x", "model=llama", "optimizer=muon"),
         ("model=huggingface", "scheduler=cosine_restarts"))  # fmt: skip


def examples(quick):
    """Parametrizes a test with its number of examples: ten times more among the slow tests."""
    return pytest.mark.parametrize("n", [quick, pytest.param(10 * quick, marks=pytest.mark.slow)])


def fuzz(n, *strategies):
    """Calls a function at once, with ``n`` examples."""
    quiet = settings(max_examples=n, deadline=None, suppress_health_check=QUIET)
    return lambda function: quiet(given(*strategies)(function))()


# ---- configuration ----


@functools.cache
def composed(base):
    return config.load(base)


KEYS = sorted(
    {key for base in BASES for key, _ in config.leaves(composed(base))}
    | {".".join(key.split(".")[:-1]) for key in RULES if "*" not in key and "." in key}
    | {key for key in RULES if "*" not in key}
)
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20),
    st.integers(-3, 70), st.sampled_from([2**31, -(2**63), 10**26, 10**400, 1e300, 1e-300, "???"]),
    st.sampled_from(["${seed}", "${nope}", "${nope:1}", "${oc.env:HOME}", "${hydra:runtime.cwd}",
                     "${data}", "auto", "x" * 5000, "a\0b", "\ud800", "..", "/", "causal_lm.nope",
                     "_target_", "1e-3", "0", "true", "null"]),
)  # fmt: skip
NAMES = st.text("abc_.", min_size=1, max_size=8)
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(NAMES, v, max_size=2), max_leaves=4
)


def is_one_line(error):
    text = str(error)
    return bool(text.strip()) and len(text) < 1500 and len(text.splitlines()) == 1


@examples(150)
def test_any_value_on_any_key_of_the_configuration(n):
    @fuzz(n, st.sampled_from(BASES), st.sampled_from(KEYS), VALUES, st.booleans())
    def check(base, key, value, merge):
        cfg = composed(base).copy()
        try:
            with open_dict(cfg), config.as_config_error():
                OmegaConf.update(cfg, key, value, merge=merge, force_add=True)
            config.validate(cfg)
        except config.ConfigError as error:
            assert is_one_line(error)  # noqa: PT017
        else:
            values = dict(config.leaves(cfg))
            assert set(config.REQUIRED) <= values.keys()
            if key in values and key in RULES and values[key] is not config.UNRESOLVED:
                assert values[key] == {} or rule_of(key).accepts(values[key])


@examples(15)
def test_any_text_as_an_override(n):
    odd = st.sampled_from(["{}", "[]", "{a: 1}", "a,b", "range(1,3)", "'"])
    signs = st.sampled_from(["", "+", "++", "~"])

    @fuzz(n, st.sampled_from(KEYS), signs, st.text(max_size=12) | odd)
    def check(key, sign, text):
        try:
            config.load([f"{sign}{key}={text}"])
        except config.ConfigError as error:
            assert is_one_line(error)  # noqa: PT017


@pytest.mark.slow
def test_any_text_on_the_command_line(tmp_path):
    """The command ends with exit code 2 and one line; what could start a run is left out."""

    @fuzz(10, st.sampled_from(KEYS), st.text(st.characters(exclude_characters="\0"), max_size=9))
    def check(key, text):
        override = f"{key}={text}"
        try:
            config.load([override])
        except (config.ConfigError, UnicodeEncodeError):
            text.encode(errors="surrogateescape")
            done = command(str(ROOT / "train.py"), override, cwd=tmp_path)
            assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
            assert not list(tmp_path.iterdir())


def test_overrides_are_read_by_the_grammar_of_hydra():
    """The guard of the tests above: an update is what an override of the command line does."""
    value = OverridesParser.create().parse_override("optimizer.lr=0.5").value()
    cfg = composed(BASES[0]).copy()
    OmegaConf.update(cfg, "optimizer.lr", value)
    assert cfg == config.load(["optimizer.lr=0.5"])


# ---- files ----


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    short_run(folder, "trainer.max_steps=3")
    return folder


def damages(size):
    """Cuts, and changes of a few bytes."""
    place = st.integers(0, size - 1)
    changes = st.dictionaries(place, st.integers(0, 255), min_size=1, max_size=8)
    return st.tuples(st.just(size) | place, changes)


def damage(content, change):
    keep, changes = change
    damaged = bytearray(content)
    for at, byte in changes.items():
        damaged[at] = byte
    return bytes(damaged[:keep])


@examples(60)
def test_any_bytes_of_a_checkpoint(n, trained, tmp_path):
    content = (trained / "checkpoints" / "last.ckpt").read_bytes()
    path, outcomes = tmp_path / "last.ckpt", Counter()

    @fuzz(n, damages(len(content)))
    def check(change):
        path.write_bytes(damage(content, change))
        try:
            module, _, _ = restore(path)
            outcomes["read"] += 1
            assert sum(p.numel() for p in module.parameters()) > 0
        except ValueError as error:
            outcomes["refused"] += 1
            assert str(path) in str(error)  # noqa: PT017

    assert outcomes["refused"]


@examples(60)
def test_any_bytes_of_a_summary(n, trained, tmp_path):
    content = (trained / "summary.json").read_bytes()

    @fuzz(n, damages(len(content)))
    def check(change):
        (tmp_path / "summary.json").write_bytes(damage(content, change))
        found = RunDir(tmp_path).finished_summary(OmegaConf.create({"trainer": {"max_steps": 3}}))
        assert found is None or found["steps"] >= 3


@examples(60)
def test_any_bytes_of_a_cached_corpus(n, tmp_path):
    texts = tmp_path / "a.txt"
    texts.write_text("\n".join(f"line {i}" for i in range(60)))

    def load():
        source = TextFiles(path=str(texts), unit="line", val_share=0.3, cache_dir=str(tmp_path))
        corpus = source.load()
        both = (corpus.train, corpus.val)
        return [split[i].tokens.tolist() for split in both for i in range(len(split))]

    expected = load()
    (folder,) = (path.parent for path in tmp_path.glob("*/about.json"))
    contents = {path: path.read_bytes() for path in folder.iterdir() if path.stat().st_size}

    @fuzz(n, st.sampled_from(sorted(contents)).flatmap(
        lambda path: st.tuples(st.just(path), damages(len(contents[path])))))  # fmt: skip
    def check(damaged):
        path, change = damaged
        path.write_bytes(damage(contents[path], change))
        assert load() == expected
        assert {p: p.read_bytes() for p in contents} == contents


# ---- documents ----


@examples(60)
def test_any_texts_become_batches_that_keep_every_target(n):
    tokenizer = ByteTokenizer()
    layouts = [{}, {"padding_side": "left"}, {"row_length": 12}]
    texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)

    @fuzz(n, st.lists(texts, min_size=1, max_size=8), st.integers(3, 12), st.sampled_from(layouts))
    def check(documents, max_length, layout):
        chunk = Chunk([(text,) for text in documents], False, TRAIN, None)
        tokenized = tokenize(chunk, tokenizer)
        with tempfile.TemporaryDirectory() as name:
            folder, other = Path(name), Chunk([("held out",)], False, VAL, None)
            chunks = [tokenized, tokenize(other, tokenizer)]
            assert token_cache.write_corpus(folder, chunks, "uint16") == [len(documents), 1, 0]
            token_cache.write_about(folder, {"dtype": "uint16", "text_bytes": [0, 0, 0]})
            assert token_cache.find_damage(folder) == ""
            (train, val, _), _ = token_cache.read_corpus(folder)
            windows = train.windows(max_length)
            rows = [windows[i] for i in range(len(windows))]
            batch = Collate(0, tokenizer.vocab_size, **layout)(rows)
            assert tokenizer.decode(val[0].tokens.tolist()) == "held out"
        wanted = Counter()
        for text in documents:
            wanted.update(pairwise([1, *tokenizer.encode(text), 2]))
        counts = batch.labels != IGNORE
        found = zip(batch.input_ids[counts].tolist(), batch.labels[counts].tolist(), strict=True)
        assert Counter(found) == wanted
        assert int(np.sum([len(text.encode()) + 1 for text in documents])) == int(counts.sum())
