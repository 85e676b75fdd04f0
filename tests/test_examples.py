"""The examples: a model and a callback through whole short runs, and a source of data."""

import json

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from causal_lm import config
from causal_lm.build import restore
from causal_lm.data.datamodule import DataModule
from causal_lm.data.documents import Corpus, Documents
from causal_lm.data.tokenizers import ByteTokenizer
from causal_lm.evaluate import evaluate
from causal_lm.fit import run
from support import ROOT, command
from support.runs import SHORT

SEARCH = f"hydra.searchpath=[file://{ROOT / 'examples' / 'configs'}]"
OWN_MODEL = [*(word for word in SHORT if not word.startswith("model.")), SEARCH,
             "model=conv", "model.width=16", "model.layers=2"]  # fmt: skip
CLASS = "examples.bring_your_own_model.ConvLM"


def test_a_model_of_ones_own_trains_resumes_and_evaluates(tmp_path):
    first = run(config.load([*OWN_MODEL, "trainer.max_steps=4"]), tmp_path)
    assert first["preflight/faults"] == [] and first["steps"] == 4
    more = run(config.load([*OWN_MODEL, "ckpt_path=auto"]), tmp_path)
    assert more["steps"] == 6
    path = tmp_path / "checkpoints" / "last.ckpt"
    with pytest.raises(ValueError, match=CLASS):
        restore(path)
    module, _, _ = restore(path, trust=[CLASS])
    assert type(module.model).__name__ == "ConvLM"
    data = [word for word in OWN_MODEL if word.startswith("data.")]
    found = evaluate(str(path), ["data=synthetic", *data], trust=[CLASS])
    assert found["loss"] == pytest.approx(more["val/loss"], rel=1e-5)
    # The scripts find the class from the project root, whose examples they do not have on the path.
    done = command("scripts/generate.py", str(path), "--count=1", "--trust", CLASS)
    assert done.returncode == 0, done.stderr
    done = command("scripts/export.py", str(path), str(tmp_path / "out"), "--trust", CLASS)
    assert done.returncode == 1 and "ConvLM" in done.stderr and "--trust" not in done.stderr
    done = command("scripts/generate.py", str(path), "--trust", f"{CLASS}s")
    assert done.returncode == 1 and f"{CLASS}s" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_callback_of_ones_own_is_in_the_summary(tmp_path):
    words = [*SHORT, SEARCH, "+callbacks=token_accuracy", "callbacks.token_accuracy.k=43"]
    summary = run(config.load(words), tmp_path)
    assert summary["val/accuracy_43"] == 1.0  # all tokens of the vocabulary
    assert json.loads((tmp_path / "summary.json").read_text())["val/accuracy_43"] == 1.0


@pytest.fixture
def sums(monkeypatch):
    """The DataModule of ``data=sums``, composed as the command line would."""
    monkeypatch.syspath_prepend(str(ROOT))
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("train", overrides=[SEARCH, "data=sums", "data.source.largest=20"])
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
