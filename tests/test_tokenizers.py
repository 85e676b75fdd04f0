"""Subword tokenizers: text round-trips, bytes add up, text never makes a special token."""

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from causal_lm.data.sources import base
from causal_lm.data.sources.text_files import TextFiles
from causal_lm.data.tokenizers import ByteTokenizer, from_state

tokenizers = pytest.importorskip("tokenizers")
from causal_lm.data.subwords import WORD, SubwordTokenizer  # noqa: E402
from support.tokenizer_json import (  # noqa: E402
    CHARACTERS,
    SENTENCE,
    SPECIAL,
    gpt2,
    library_of,
)

pytestmark = pytest.mark.extras

LIKE_SPECIAL = "<eos> <pad></s> <|endoftext|>\n<bos>[PAD]<eos>"


@pytest.fixture(scope="module")
def bpe():
    return SubwordTokenizer.train([[SENTENCE * 9], [SENTENCE]], vocab_size=280)


@settings(max_examples=200)
@given(st.lists(st.one_of(st.text(), st.text("ab '\n\r\t\x1c\x85\u2028\xa0.,1é"))))
def test_text_round_trips_and_its_bytes_add_up(batch):
    for tokenizer in RESTORED:
        flat, lengths = tokenizer.encode_batch(batch)
        assert len(lengths) == len(batch)
        sizes = tokenizer.token_bytes()
        for text, ids in zip(batch, np.split(flat, lengths.cumsum()[:-1]), strict=bool(batch)):
            assert tokenizer.decode(ids.tolist()) == text
            assert ids.tolist() == tokenizer.encode(text)
            document = [tokenizer.bos_id, *ids.tolist(), tokenizer.eos_id]
            assert int(sizes[document].sum()) == len(text.encode())
            assert tokenizer.decode(document) == text


CODE = Path(base.__file__).read_text(encoding="utf-8")
BPE = SubwordTokenizer.train([[SENTENCE * 9, CODE]], vocab_size=1000)
GPT2 = SubwordTokenizer.resolve(gpt2(), {})
RESTORED = [from_state(tokenizer.state()) for tokenizer in (BPE, GPT2, ByteTokenizer())]


PIECES = [" ", "\n", "'s", "'ll", "'", "it's", "é", "—", "\u0301", "²", "_", "١", "\u3000", "漢字"]


def examples(quick, slow=20_000):
    """Parametrizes a test with its number of examples, which is larger among the slow tests."""
    return pytest.mark.parametrize("n", [quick, pytest.param(slow, marks=pytest.mark.slow)])


def check(n, *strategies):
    """Calls a function at once, with ``n`` examples."""
    return lambda function: settings(max_examples=n)(given(*strategies)(function))()


def test_a_contraction_before_a_character_beyond_ascii():
    assert WORD.findall("it's—well") == ["it", "'s", "—well"]


@settings(max_examples=500)
@given(
    st.one_of(
        st.text(),
        st.text("ab'sltdmrve '\n\r\t\x1c\x1f\x85\u2028\xa0.,1é—\u0301\u0bbeª²٣ⅷ’İ"),
        st.text(st.characters(codec="ascii")),
        st.lists(st.sampled_from([*CODE.split(" "), *PIECES])).map("".join),
    )
)
def test_word_by_word_is_what_the_library_does(text):
    BPE._cached_words.clear()
    whole = BPE.backend.encode(text, add_special_tokens=False).ids
    assert BPE.encode(text) == whole
    assert BPE._cached_words or not text  # the word cache was used


WHITE = [c for c in map(chr, range(0x3001)) if c.isspace() and not "\x1c" <= c <= "\x1f"]
ASCII = "".join(map(chr, range(128)))
OF_CATEGORIES = (  # a character, or some, of each category of Unicode but surrogates
    "a1.' \n\x85\u2028\u2029\u3000éÉǅʰ漢\u0301\u0bbe\u20dd٢ⅷ²‿—⟮⟯«»·±€¨©\u200b\ue000\u0378"
)
OF_GPT2 = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)


def cuts_of(text: str) -> tuple[set[int], set[int]]:
    """Where WORD cuts a text, and where the library does."""
    words = WORD.findall(text)
    assert "".join(words) == text
    theirs = OF_GPT2.pre_tokenize_str(text)
    return {0, *itertools.accumulate(map(len, words))}, {0, *(stop for _, (_, stop) in theirs)}


def test_words_of_each_three_kinds_of_character_end_where_the_library_ends_some():
    """One character of each category, in each order: no cut depends on luck."""
    for triple in itertools.product(OF_CATEGORIES, repeat=3):
        ours, theirs = cuts_of("".join(triple))
        assert ours <= theirs, triple


@examples(200)
def test_words_end_where_the_library_ends_some(n):
    """Of text with characters of each category of Unicode."""

    @check(n, st.one_of(st.text(), st.text(ASCII + OF_CATEGORIES)))
    def _(text):
        ours, theirs = cuts_of(text)
        assert ours <= theirs


@examples(200)
def test_words_without_letters_beyond_ascii_end_where_those_of_the_library_do(n):
    @check(n, st.one_of(st.text([*ASCII, *WHITE]), st.text(["'", *"strevdlm 1.\n", *WHITE])))
    def _(text):
        ours, theirs = cuts_of(text)
        assert ours == theirs


def test_trained_here(bpe):
    assert bpe.vocab_size == 280
    assert sorted([bpe.pad_id, bpe.bos_id, bpe.eos_id]) == [277, 278, 279]
    assert len(bpe.encode(" the cat")) == 2  # it did learn
    again = SubwordTokenizer.train([[SENTENCE * 9], [SENTENCE]], vocab_size=280)
    assert again.state() == bpe.state()  # on every rank the same


@pytest.mark.parametrize("tokenizer", [BPE, GPT2], ids=["bpe", "gpt2"])
def test_text_that_looks_special_is_text(tokenizer):
    ids = tokenizer.encode(LIKE_SPECIAL)
    assert not {tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert tokenizer.decode(ids) == LIKE_SPECIAL


KINDS = ["Unigram", "WordPiece", "WordLevel", "BPE", "BPE with ignore_merges"]
OF_KINDS = {kind: SubwordTokenizer.resolve(library_of(kind), {}) for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
@examples(100, slow=4000)
def test_no_text_makes_a_special_token(n, kind):
    """<unk> aside, which stands for what the vocabulary lacks."""
    tokenizer = OF_KINDS[kind]
    library = tokenizers.Tokenizer.from_str(tokenizer.json)
    library.encode_special_tokens = True
    like_special = st.sampled_from([*SPECIAL, *CHARACTERS, "ab", " </s> ", "é"])

    @check(n, st.one_of(st.text(), st.lists(like_special).map("".join)))
    def _(text):
        ids = tokenizer.encode(text)
        assert not {0, 1, 2} & set(ids)
        plain = library.encode(text, add_special_tokens=False).ids
        if not {0, 1, 2, 3} & set(plain):  # nothing else changes
            assert ids == plain


@pytest.mark.parametrize("kind", KINDS)
def test_the_library_alone_makes_special_tokens_of_text(kind):
    """Guards the test above: there is something to prevent, in all but a BPE with merges."""
    library = tokenizers.Tokenizer.from_str(library_of(kind))
    library.encode_special_tokens = True
    assert (2 in library.encode("</s>", add_special_tokens=False).ids) == (kind != "BPE")


@pytest.mark.parametrize("kind", KINDS)
def test_what_the_vocabulary_lacks_is_counted(kind):
    unknown = OF_KINDS[kind].unknown(["ab é a", "éé"])
    assert unknown == ({"é": 1, "éé": 1} if kind == "WordLevel" else {"é": 3})
    assert not BPE.unknown(["ab é a \x00"])


def test_a_corpus_with_characters_that_the_vocabulary_lacks(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("\n".join(f"ab ü {'a' * i}" for i in range(50)))
    (tmp_path / "tokenizer.json").write_text(library_of("BPE"))
    options = {"unit": "line", "val_share": 0.2, "cache_dir": str(tmp_path / "cache")}
    for _ in range(2):  # the second time from the cache
        with caplog.at_level(logging.WARNING):
            TextFiles(
                path=str(tmp_path / "a.txt"), tokenizer=str(tmp_path / "tokenizer.json"), **options
            ).load()
        assert "'ü' (50)" in caplog.text
        caplog.clear()


def test_special_tokens_that_text_needs_are_refused():
    for name in ("!", " the"):
        with pytest.raises(ValueError, match="special token"):
            SubwordTokenizer.resolve(BPE.json, {"pad": name.replace(" ", "Ġ")})


def test_an_empty_vocabulary_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizers.Tokenizer(tokenizers.models.BPE()).to_str())
    with pytest.raises(ValueError, match=r"tokenizer\.json.*empty"):
        SubwordTokenizer.from_file(str(path), {})


def test_special_tokens_by_usual_name():
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "<s>", "</s>", "a", "b"])}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="b"))
    found = SubwordTokenizer.resolve(library.to_str(), {})
    assert (found.pad_id, found.bos_id, found.eos_id) == (0, 1, 2)
    assert found.vocab_size == 5
    assert found.token_bytes() is None  # words are not bytes


def test_special_tokens_by_key_or_added(caplog):
    end = json.loads(gpt2())["model"]["vocab"]["<|endoftext|>"]
    named = SubwordTokenizer.resolve(gpt2(), {"pad": "<|endoftext|>", "bos": "<start>"})
    assert named.pad_id == named.eos_id == end
    assert named.bos_id == 280 and named.vocab_size == 281  # added
    bare = json.loads(gpt2())
    bare["added_tokens"], bare["model"]["vocab"] = [], dict(bare["model"]["vocab"])
    bare["model"]["vocab"]["x-endoftext"] = bare["model"]["vocab"].pop("<|endoftext|>")
    with caplog.at_level(logging.WARNING):
        added = SubwordTokenizer.resolve(json.dumps(bare), {})
    assert added.pad_id == added.bos_id == added.eos_id == 280
    assert "<eos>" in caplog.text and "data.special_tokens.eos" in caplog.text


def test_a_token_that_is_special_here_only_is_no_text():
    """Added, but not as a special one: the library would find it in any text."""
    plain = json.loads(gpt2())
    plain["added_tokens"][0]["special"] = False
    tokenizer = SubwordTokenizer.resolve(json.dumps(plain), {})
    assert tokenizer.eos_id not in tokenizer.encode("a <|endoftext|> b")
    assert tokenizer.decode(tokenizer.encode("a <|endoftext|> b")) == "a <|endoftext|> b"


def test_added_tokens_that_are_text_have_their_bytes():
    settings_ = json.loads(gpt2())
    token = settings_["added_tokens"][0] | {"id": 280, "content": "  ∂", "special": False}
    settings_["added_tokens"].append(token)
    tokenizer = SubwordTokenizer.resolve(json.dumps(settings_), {})
    ids = tokenizer.encode("a  ∂b")
    assert 280 in ids
    assert tokenizer.decode(ids) == "a  ∂b"
    assert int(tokenizer.token_bytes()[ids].sum()) == len("a  ∂b".encode())


@pytest.mark.parametrize("name", ["bpe", "gpt2"])
def test_documents_of_subwords(name, tmp_path):
    """PAD = BOS = EOS = one id: documents are told apart by where they end, and come back."""
    lines = [f"{SENTENCE}{i}" for i in range(60)]
    (tmp_path / "a.txt").write_text("\n".join(lines))
    (tmp_path / "tokenizer.json").write_text(gpt2())
    tokenizer = "bpe" if name == "bpe" else str(tmp_path / "tokenizer.json")
    corpus = TextFiles(
        path=str(tmp_path / "a.txt"), unit="line", tokenizer=tokenizer, vocab_size=300,
        cache_dir=str(tmp_path / "cache"), val_share=0.2,
    ).load()  # fmt: skip
    t = corpus.tokenizer
    assert (t.pad_id == t.bos_id == t.eos_id) == (name == "gpt2")
    found = []
    for split in (corpus.train, corpus.val):
        for i in range(len(split)):
            ids = split[i].tokens
            assert ids.dtype == torch.int64
            assert (int(ids[0]), int(ids[-1])) == (t.bos_id, t.eos_id)
            assert int(t.token_bytes()[ids].sum()) == len(t.decode(ids.tolist()).encode())
            found.append(t.decode(ids.tolist()))
    assert sorted(found) == sorted(lines)


def test_a_bpe_learns_from_the_training_part_alone(tmp_path):
    """A word of the held-out documents is no token, however often it occurs there."""
    (tmp_path / "a.txt").write_text("\n".join(f"the cat {i}" for i in range(50)))
    (tmp_path / "val.txt").write_text("zyzzyva " * 500)
    corpus = TextFiles(
        path=str(tmp_path / "a.txt"), val_path=str(tmp_path / "val.txt"), unit="line",
        tokenizer="bpe", vocab_size=300, cache_dir=str(tmp_path / "cache"),
    ).load()  # fmt: skip
    assert len(corpus.tokenizer.encode(" zyzzyva")) == 8
    assert len(corpus.tokenizer.encode(" cat")) == 1


def test_a_file_that_is_no_tokenizer_is_named(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        SubwordTokenizer.from_file(str(path), {})
