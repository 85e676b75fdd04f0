"""examples/bring_your_own_source.py, composed from its YAML as the command line would."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from causal_lm.data.datamodule import DataModule
from causal_lm.data.documents import Corpus, Documents
from causal_lm.data.tokenizers import ByteTokenizer
from support import ROOT


@pytest.fixture
def sums(monkeypatch):
    """The DataModule of ``data=sums``."""
    monkeypatch.syspath_prepend(str(ROOT))
    searchpath = f"hydra.searchpath=[file://{ROOT / 'examples' / 'configs'}]"
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=[searchpath, "data=sums", "data.source.largest=20"])
    return instantiate(cfg.data, _convert_="all")


def test_a_source_of_ones_own_gives_batches(sums):
    corpus = sums.load()
    decode = corpus.tokenizer.decode
    assert len(corpus.train) + len(corpus.val) == 21 * 21
    assert len(corpus.val) == 44
    seen = set()
    for loader in (sums.train_dataloader(), sums.val_dataloader()):
        for batch in loader:
            for ids, mask in zip(batch.input_ids, batch.loss_mask, strict=True):
                question, answer = decode(ids.tolist()).split("=")
                assert eval(question) == int(answer)
                assert decode(ids[mask].tolist()) == answer
                seen.add(question)
    assert len(seen) == 21 * 21


def test_any_object_with_load_is_a_source():
    class Source:
        def load(self):
            documents = Documents.from_lists([[1, 5, 2], [1, 6, 7, 2]])
            return Corpus(documents, documents, ByteTokenizer())

    data = DataModule(Source(), batch_size=2, max_length=8)
    data.setup()
    assert next(iter(data.val_dataloader())).input_ids.shape == (2, 4)
    with pytest.raises(TypeError, match=r"Source.*depth"):
        DataModule(Source(), batch_size=2, max_length=8, depth=3)
    assert DataModule(lambda depth: depth, batch_size=2, max_length=8, depth=3).source == 3
