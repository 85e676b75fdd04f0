import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from causal_lm.data.collate import Collate, pack
from causal_lm.data.datamodule import DataModule
from causal_lm.data.documents import Corpus, Document, Documents
from causal_lm.data.sampler import DocumentSampler
from causal_lm.data.sources.docstrings import Docstrings
from causal_lm.data.tokenizers import ByteTokenizer, SymbolTokenizer, from_state, show_token

documents_of = st.lists(
    st.lists(st.integers(0, 9), min_size=2, max_size=12), min_size=1, max_size=6
)


# ---- collation ----


@given(documents_of)
def test_collate_by_loop(documents):
    """PAD is decided by length: token 0, which is PAD's id, also occurs inside documents."""
    batch = Collate(0, 10)([Document(torch.tensor(d)) for d in documents])
    width = max(map(len, documents))
    assert batch.input_ids.shape == (len(documents), width)
    for row, document in enumerate(documents):
        n = len(document)
        assert batch.input_ids[row].tolist() == document + [0] * (width - n)
        assert batch.position_ids[row].tolist() == [*range(width)]
        assert batch.document_ids[row].tolist() == [0] * n + [-1] * (width - n)
    assert batch.lengths.tolist() == [len(d) for d in documents]


@given(documents_of, st.integers(12, 20), st.sampled_from(["left", "right"]))
def test_packing_loses_nothing_and_mixes_nothing(documents, capacity, side):
    """Every document stands whole in one row, with its own number, positions from 0, no overlap."""
    batch = Collate(0, 10, row_length=capacity, padding_side=side)(
        [Document(torch.tensor(d)) for d in documents]
    )
    assert batch.input_ids.shape[1] <= capacity
    found = []
    for ids, positions, numbers in zip(
        *(part.tolist() for part in (batch.input_ids, batch.position_ids, batch.document_ids)),
        strict=True,
    ):
        real = [n for n in numbers if n >= 0]
        assert real == sorted(real)
        assert (numbers[-1] if side == "left" else numbers[0]) >= 0  # PAD is on the other side
        for number in set(real):
            slots = [t for t, n in enumerate(numbers) if n == number]
            assert slots == list(range(slots[0], slots[-1] + 1))
            assert [positions[t] for t in slots] == list(range(len(slots)))
            found.append([ids[t] for t in slots])
    assert sorted(found) == sorted(documents)


def test_packing_fills_rows():
    lengths = np.random.default_rng(0).integers(2, 64, size=200).tolist()
    rows, _, _ = pack(lengths, 64)
    fewest = -(-sum(lengths) // 64)
    assert fewest <= int(rows.max()) + 1 <= 11 / 9 * fewest + 1


def test_a_document_longer_than_a_row_is_refused():
    with pytest.raises(ValueError, match="document of 9 tokens does not fit a row of 8"):
        Collate(0, 10, row_length=8)([Document(torch.ones(9))])


def test_a_batch_of_fillers_is_all_pad_in_every_layout():
    filler = Document(torch.tensor([], dtype=torch.int64))
    for layout in ({}, {"row_length": 8}, {"padding_side": "left"}):
        assert (Collate(0, 10, **layout)([filler, filler]).document_ids == -1).all()


def test_left_padding_starts_positions_at_the_document():
    batch = Collate(0, 10, padding_side="left")(
        [Document(torch.tensor([5, 6])), Document(torch.tensor([7, 8, 9]))]
    )
    assert batch.input_ids.tolist() == [[0, 5, 6], [7, 8, 9]]
    assert batch.position_ids.tolist() == [[0, 0, 1], [0, 1, 2]]
    assert batch.document_ids.tolist() == [[-1, 0, 0], [0, 0, 0]]


def test_collate_refuses_an_empty_batch_and_foreign_ids():
    collate = Collate(0, 10)
    with pytest.raises(ValueError, match="at least one document"):
        collate([])
    with pytest.raises(ValueError, match=r"document 1 .* id 10.* vocabulary of 10"):
        collate([Document(torch.tensor([1, 2])), Document(torch.tensor([3, 10]))])
    with pytest.raises(ValueError, match=r"document 0 .* id -1"):
        collate([Document(torch.tensor([-1, 2]))])


def test_a_filler_row_is_all_pad():
    batch = Collate(0, 10)(
        [Document(torch.tensor([], dtype=torch.int64)), Document(torch.tensor([1, 2]))]
    )
    assert batch.document_ids.tolist() == [[-1, -1], [0, 0]]


# ---- documents ----


@given(documents_of, st.integers(2, 7))
def test_windows_keep_every_target_once(documents, max_length):
    whole = Documents.from_lists(documents)
    windows = whole.windows(max_length)
    pairs = [
        (windows.span(i).start + t, int(windows[i].tokens[t + 1]))
        for i in range(len(windows))
        for t in range(len(windows[i].tokens) - 1)
    ]
    assert all(len(windows[i].tokens) <= max_length for i in range(len(windows)))
    assert len(pairs) == sum(len(d) - 1 for d in documents) == len(set(pairs))


def test_a_document_of_one_token_is_refused():
    with pytest.raises(ValueError, match="document 1 "):
        Documents.from_lists([[1, 2], [1], [1, 2, 3]])


def test_an_empty_split_is_named():
    class Nothing:
        def load(self):
            full = Documents.from_lists([[1, 2]])
            return Corpus(full, Documents.from_lists([]), ByteTokenizer())

    with pytest.raises(ValueError, match="val"):
        DataModule(Nothing(), batch_size=1, max_length=8).setup()


# ---- sampler ----


@given(st.integers(1, 40), st.integers(1, 5), st.booleans(), st.integers(0, 3))
def test_ranks_see_every_document_once_in_equal_steps(size, world, shuffle, epoch):
    seen = []
    for rank in range(world):
        sampler = DocumentSampler(size, shuffle=shuffle, rank=rank, world_size=world)
        own = list(sampler.remaining_indices(epoch * len(sampler)))
        assert len(own) == len(sampler) == -(-size // world)
        seen += own
    assert sorted(i for i in seen if i >= 0) == list(range(size))


def test_order_changes_with_epoch_and_seed_and_nothing_else():
    def order(seed, epoch):
        return list(DocumentSampler(100, shuffle=True, seed=seed).remaining_indices(100 * epoch))

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


# ---- tokenizers ----


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = from_state(ByteTokenizer().state())
    ids = tokenizer.encode(text)
    assert tokenizer.decode([tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
    assert int(tokenizer.token_bytes()[ids].sum()) == len(text.encode())


def test_symbols_round_trip_and_foreign_characters():
    tokenizer = from_state(SymbolTokenizer(5).state())
    assert tokenizer.vocab_size == 8
    assert tokenizer.decode(tokenizer.encode("abcde")) == "abcde"
    with pytest.raises(ValueError, match=r"'f'.*abcde"):
        tokenizer.encode("abf")
    with pytest.raises(ValueError, match="'words'"):
        from_state({"name": "words"})


def test_show_token():
    tokenizer = ByteTokenizer()
    ids = [1, *tokenizer.encode("a \n"), 2, 0]
    assert [show_token(tokenizer, i) for i in ids] == ["<bos>", "a", " ", "\\n", "<eos>", "<pad>"]


@given(
    st.lists(st.integers(2, 50), min_size=1, max_size=300),
    st.integers(1, 4),
    st.integers(1, 3),
    st.booleans(),
    st.integers(0, 3),
    st.sampled_from([{"by_length": True}, {"row_length": 64}]),
)
def test_groups_hold_each_document_once(lengths, batch_size, world_size, shuffle, epoch, kind):
    seen = []
    for rank in range(world_size):
        sampler = DocumentSampler(
            len(lengths), shuffle=shuffle, rank=rank, world_size=world_size,
            lengths=lambda: np.array(lengths), batch_size=batch_size, **kind,
        )  # fmt: skip
        batches = -(-len(sampler) // batch_size)
        seen.append(list(sampler.remaining_indices(epoch * batches)))
        for done in range(batches):  # an epoch that is resumed after so many batches
            rest = list(sampler.remaining_indices(epoch * batches + done))
            assert rest == seen[-1][done * batch_size :]
    assert len({len(indices) for indices in seen}) == 1
    real = [i for indices in seen for i in indices if i >= 0]
    assert sorted(real) == list(range(len(lengths)))


def test_buckets_put_like_lengths_together_and_are_shuffled():
    lengths = np.random.default_rng(0).integers(2, 500, size=5000)

    def batches(epoch, **kind):
        sampler = DocumentSampler(5000, shuffle=True, batch_size=10, **kind)
        return np.array(list(sampler.remaining_indices(500 * epoch))).reshape(-1, 10)

    def pad_fraction(batches):
        return 1 - lengths[batches].sum() / (10 * lengths[batches].max(axis=1)).sum()

    by_length = {"by_length": True, "lengths": lambda: lengths}
    bucketed = batches(0, **by_length)
    assert pad_fraction(batches(0)) > 0.4
    assert pad_fraction(bucketed) < 0.05
    means = lengths[bucketed].mean(axis=1)
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2  # batches are not sorted
    sets = [{frozenset(b) for b in batches(e, **by_length).tolist()} for e in (0, 1)]
    assert not sets[0] & sets[1]  # no batch occurs in both epochs


@pytest.mark.parametrize("world_size", [1, 2])
def test_packed_batches_fill_their_rows(world_size):
    """At least 99 % of the slots, where batches of arbitrary documents leave 4 % and more."""
    lengths = np.minimum(np.random.default_rng(0).geometric(1 / 150, size=12_000) + 2, 256)

    def filled(**kind):
        real = slots = 0
        for rank in range(world_size):
            sampler = DocumentSampler(
                len(lengths), shuffle=True, rank=rank, world_size=world_size, batch_size=32,
                lengths=lambda: lengths, **kind,
            )  # fmt: skip
            for batch in np.array([i for i in sampler if i >= 0])[: 32 * 180].reshape(-1, 32):
                rows, _, first = pack(lengths[batch].tolist(), 256)
                slots += (int(rows.max()) + 1) * int((first.numpy() + lengths[batch]).max())
                real += int(lengths[batch].sum())
        return real / slots

    assert filled() < 0.96
    assert filled(row_length=256) >= 0.99


# ---- docstrings ----


@pytest.fixture(scope="module")
def stdlib():
    return Docstrings(val_share=0.05).load()


def test_docstrings_are_real_text_split_without_overlap(stdlib):
    texts = [
        {tuple(split[i].tokens.tolist()) for i in range(len(split))}
        for split in (stdlib.train, stdlib.val)
    ]
    assert len(texts[0]) == len(stdlib.train)  # no duplicates within
    assert not texts[0] & texts[1]  # nor across
    assert len(stdlib.train) + len(stdlib.val) > 5000
    assert 0.03 < len(stdlib.val) / (len(stdlib.train) + len(stdlib.val)) < 0.07
    first = stdlib.train[0].tokens.tolist()
    assert first[0] == stdlib.tokenizer.bos_id
    assert first[-1] == stdlib.tokenizer.eos_id
    lengths = torch.cat([stdlib.train.lengths, stdlib.val.lengths]) - 2
    assert 40 < float(lengths.float().median()) < 200
    assert int(lengths.max()) > 20 * float(lengths.float().median())  # a heavy tail


def test_docstrings_split_does_not_move_when_others_are_added(tmp_path):
    def texts(split):
        return {ByteTokenizer().decode(split[i].tokens.tolist()) for i in range(len(split))}

    for name in ("a.py", "b.py"):
        body = "\n".join(f'def f{i}():\n    """{name} {i}"""' for i in range(50))
        (tmp_path / name).write_text(body)
        corpus = Docstrings(val_share=0.3, root=str(tmp_path)).load()
        if name == "a.py":
            first = texts(corpus.val)
    assert first
    assert {t for t in texts(corpus.val) if t.startswith("a.py")} == first


def test_hidden_files_have_no_docstrings_that_are_read(tmp_path):
    names = ("a.py", ".b.py", ".ipynb_checkpoints/a.py", "c/.venv/lib/d.py", "tests/e.py", "c/f.py")
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(f'"""{name}"""')
    assert Docstrings(root=str(tmp_path)).texts == ["a.py", "c/f.py"]


def test_a_folder_without_docstrings_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        Docstrings(val_share=0.1, root=str(tmp_path)).load()
