"""The examples: a model and a callback through whole short runs, and a source of data."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

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
from causal_lm.generation import generate_text
from support import ROOT, command
from support.pages import sections
from support.runs import SHORT, short_run

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


PAGE = {section.title.partition(":")[0]: section for section in sections("docs/extending.md")}
MOST_FILES = {
    "Data in plain text": 0, "A source of data": 2, "A model": 2, "An optimizer": 1,
    "A callback": 1, "A metric": 1, "A logger": 0, "Early stopping": 0,
}  # fmt: skip


@pytest.mark.parametrize("title", MOST_FILES)
def test_the_page_takes_no_more_files_than_it_says(title):
    section = PAGE[title]
    assert len(section.files) == int(re.search(r"(\d) files?$", section.title)[1])
    assert len(section.files) <= MOST_FILES[title]


def run_section(title: str, folder: Path, *more: str) -> Path:
    """Write the files of a section into an empty folder and run its commands there, short."""
    PAGE[title].write(folder)
    assert len([p for p in folder.rglob("*") if p.is_file()]) <= MOST_FILES[title]
    own = ("model.",) if title == "A model" else ("data.source.",) * title.count("ata")
    short = [word for word in SHORT if not (own and word.startswith(own))]
    path = [ROOT / "src", ROOT / "preflight" / "src"]
    for line in PAGE[title].commands:
        command = re.sub("^causal-lm-train", "python -m causal_lm", line)
        command = re.sub(r"^causal-lm-(\w+)", rf"python {ROOT}/scripts/\1.py", command)
        command = command.replace("python", sys.executable, 1)
        if "causal-lm-train" in line:
            command = " ".join([command, *short, *more])
        done = subprocess.run(
            command, shell=True, cwd=folder, capture_output=True, text=True, timeout=300,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (summary,) = folder.glob("runs/**/summary.json")
    return summary


@pytest.mark.slow
@pytest.mark.parametrize("title", MOST_FILES)
def test_the_page_works_as_printed(title, tmp_path):
    more = ["callbacks.stop.patience=1", "+callbacks.stop.min_delta=9", "trainer.max_steps=60"]
    more *= title == "Early stopping"
    path = run_section(title, tmp_path, *more)
    summary, config_text = json.loads(path.read_text()), (path.parent / "config.yaml").read_text()
    assert summary["preflight/faults"] == []
    if title == "Early stopping":
        assert summary["steps"] == 6
    else:
        assert summary["status"] == "finished"
    if title == "A callback":
        assert summary["weights/norm"] > 0
    elif title == "A metric":
        assert 0 < summary["val/top_3"] < 1
    elif title == "A logger":
        assert list(tmp_path.glob("logs/**/metrics.csv"))
    elif title != "Early stopping":
        own = {
            "An optimizer": "signs.SignSGD",
            "A model": "bigram.Bigram",
            "A source of data": "countdown.Countdown",
            "Data in plain text": "zen.txt",
        }
        assert own[title] in config_text


def test_five_lines_of_python_load_a_checkpoint_and_write_text(tmp_path, monkeypatch, capsys):
    short_run(tmp_path / "runs" / "mine", "data.max_length=32")
    monkeypatch.chdir(tmp_path)
    (code,) = PAGE["A checkpoint in Python"].python
    assert len([line for line in code.splitlines() if line]) == 5
    names = {}
    capsys.readouterr()  # of the run
    exec(code, names)
    written = capsys.readouterr().out.splitlines()
    assert len(written) == 3 and all(line.startswith("ab") for line in written)
    again = generate_text(names["module"], names["tokenizer"], "ab", 32, count=3, temperature=0.8)
    assert written == again
    greedy = generate_text(names["module"], names["tokenizer"], "", 5, temperature=0)
    assert len(greedy) == 1
