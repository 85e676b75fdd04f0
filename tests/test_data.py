import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from causal_lm.data.collate import PaddedCollate
from causal_lm.data.datamodule import DataModule
from causal_lm.data.documents import Corpus, Documents
from causal_lm.data.sampler import DocumentSampler
from causal_lm.data.sources.docstrings import Docstrings
from causal_lm.data.tokenizers import Bytes, Symbols, from_state, show

documents_of = st.lists(
    st.lists(st.integers(0, 9), min_size=2, max_size=12), min_size=1, max_size=6
)


# ---- collation ----


@given(documents_of)
def test_collate_by_loop(documents):
    """PAD is decided by length: token 0, which is PAD's id, also occurs inside documents."""
    batch = PaddedCollate(0, 10)([torch.tensor(d) for d in documents])
    width = max(map(len, documents))
    assert batch.input_ids.shape == (len(documents), width)
    for row, document in enumerate(documents):
        n = len(document)
        assert batch.input_ids[row].tolist() == document + [0] * (width - n)
        assert batch.position_ids[row].tolist() == [*range(width)]
        assert batch.document_ids[row].tolist() == [0] * n + [-1] * (width - n)
    assert batch.lengths.tolist() == [len(d) for d in documents]


def test_collate_refuses_an_empty_batch_and_foreign_ids():
    collate = PaddedCollate(0, 10)
    with pytest.raises(ValueError, match="at least one document"):
        collate([])
    with pytest.raises(ValueError, match=r"row 1 .* id 10.* vocabulary of 10"):
        collate([torch.tensor([1, 2]), torch.tensor([3, 10])])
    with pytest.raises(ValueError, match=r"row 0 .* id -1"):
        collate([torch.tensor([-1, 2])])


def test_a_filler_row_is_all_pad():
    batch = PaddedCollate(0, 10)([torch.tensor([], dtype=torch.int64), torch.tensor([1, 2])])
    assert batch.document_ids.tolist() == [[-1, -1], [0, 0]]


# ---- documents ----


@given(documents_of, st.integers(2, 7))
def test_windows_keep_every_target_once(documents, max_length):
    whole = Documents.from_lists(documents)
    rows = whole.windows(max_length)
    pairs = [
        (int(start) + t, int(row[t + 1]))
        for start, row in zip(rows.starts, (rows[i] for i in range(len(rows))), strict=True)
        for t in range(len(row) - 1)
    ]
    assert all(len(rows[i]) <= max_length for i in range(len(rows)))
    assert len(pairs) == sum(len(d) - 1 for d in documents) == len(set(pairs))


def test_a_document_of_one_token_is_refused():
    with pytest.raises(ValueError, match="document 1 has 1 token"):
        Documents.from_lists([[1, 2], [1], [1, 2, 3]])


def test_an_empty_split_is_named():
    class Nothing:
        def load(self):
            full = Documents.from_lists([[1, 2]])
            return Corpus(full, Documents.from_lists([]), Bytes())

    with pytest.raises(ValueError, match="val split of the corpus is empty"):
        DataModule(Nothing(), batch_size=1, max_length=8).setup()


# ---- sampler ----


@given(st.integers(1, 40), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_ranks_see_every_document_once_in_equal_steps(size, world, shuffle, epoch):
    seen = []
    for rank in range(world):
        sampler = DocumentSampler(size, shuffle=shuffle, rank=rank, world_size=world)
        sampler.set_epoch(epoch)
        mine = list(sampler)
        assert len(mine) == len(sampler) == -(-size // world)
        seen += mine
    assert sorted(i for i in seen if i >= 0) == list(range(size))


def test_order_changes_with_epoch_and_seed_and_nothing_else():
    def order(seed, epoch):
        sampler = DocumentSampler(100, shuffle=True, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


# ---- tokenizers ----


@given(st.text())
def test_bytes_give_any_text_back(text):
    tokenizer = from_state(Bytes().state())
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())


def test_symbols_round_trip_and_foreign_characters():
    tokenizer = from_state(Symbols(5).state())
    assert tokenizer.vocab_size == 8
    assert tokenizer.decode(tokenizer.encode("abcde")) == "abcde"
    with pytest.raises(ValueError, match="'f' is no symbol of this language: it has abcde"):
        tokenizer.encode("abf")
    with pytest.raises(ValueError, match="unknown tokenizer 'words'"):
        from_state({"name": "words"})


def test_tokens_as_a_person_reads_them():
    tokenizer = Bytes()
    ids = [1, *tokenizer.encode("a \n"), 2, 0]
    assert [show(tokenizer, i) for i in ids] == ["<bos>", "a", " ", "\\n", "<eos>", "<pad>"]


# ---- docstrings ----


@pytest.fixture(scope="module")
def stdlib():
    return Docstrings(val_share=0.05).load()


def test_docstrings_are_real_text_split_without_overlap(stdlib):
    texts = [
        {tuple(split[i].tolist()) for i in range(len(split))}
        for split in (stdlib.train, stdlib.val)
    ]
    assert len(texts[0]) == len(stdlib.train)  # no duplicates within
    assert not texts[0] & texts[1]  # nor across
    assert len(stdlib.train) + len(stdlib.val) > 5000
    assert 0.03 < len(stdlib.val) / (len(stdlib.train) + len(stdlib.val)) < 0.07
    first = stdlib.train[0].tolist()
    assert first[0] == stdlib.tokenizer.bos_id
    assert first[-1] == stdlib.tokenizer.eos_id
    lengths = torch.cat([stdlib.train.lengths, stdlib.val.lengths]) - 2
    assert 40 < float(lengths.float().median()) < 200
    assert int(lengths.max()) > 20 * float(lengths.float().median())  # a heavy tail


def test_docstrings_split_does_not_move_when_others_are_added(tmp_path):
    def texts(split):
        return {Bytes().decode(split[i].tolist()) for i in range(len(split))}

    for name in ("a.py", "b.py"):
        body = "\n".join(f'def f{i}():\n    """{name} {i}"""' for i in range(50))
        (tmp_path / name).write_text(body)
        corpus = Docstrings(val_share=0.3, root=str(tmp_path)).load()
        if name == "a.py":
            first = texts(corpus.val)
    assert first
    assert {t for t in texts(corpus.val) if t.startswith("a.py")} == first


def test_no_docstrings_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no docstring in any \.py file"):
        Docstrings(val_share=0.1, root=str(tmp_path)).load()


def test_flat_storage_is_small(stdlib):
    assert stdlib.train.tokens.numpy().dtype == np.int32
