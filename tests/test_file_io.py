"""Where files are looked for."""

import csv
import json

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from causal_lm import config
from causal_lm.data.sources import file_io
from causal_lm.data.sources.huggingface import HuggingFaceDataset
from causal_lm.data.sources.text_files import TextFiles
from support import ROOT, command


@pytest.mark.parametrize("kind", [TextFiles, HuggingFaceDataset])
def test_under_hydra_job_chdir_a_path_is_of_where_the_command_was_typed(
    kind, tmp_path, monkeypatch
):
    (tmp_path / "run").mkdir()
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{i}"}}\n' for i in range(20)))
    monkeypatch.chdir(tmp_path / "run")
    source = kind(path="a.jsonl", val_share=0.3, num_proc=1, cache_dir=str(tmp_path / "cache"))
    if kind is TextFiles:
        with pytest.raises(FileNotFoundError, match=r"data\.path=a\.jsonl"):
            source.load()
    cfg = OmegaConf.create({"hydra": {"runtime": {"cwd": str(tmp_path)}}})
    monkeypatch.setattr(HydraConfig.instance(), "cfg", cfg)
    corpus = source.load()
    assert len(corpus.train) + len(corpus.val) == 20
    assert file_io.find_files(str(tmp_path / "*.jsonl"), "data.path") == [tmp_path / "a.jsonl"]


def test_under_hydra_job_chdir_other_paths_are_too(tmp_path, monkeypatch):
    given = {"ckpt_path": "a.ckpt", "data.tokenizer": "t.json", "data.cache_dir": "cache"}
    for name in ("a.ckpt", "t.json"):
        (tmp_path / name).touch()
    (tmp_path / "run").mkdir()
    monkeypatch.chdir(tmp_path)
    words = ["data=text", "data.path=a.txt", *(f"{k}={v}" for k, v in given.items())]
    cfg = config.load(words)
    assert {key: OmegaConf.select(cfg, key) for key in given} == given  # nothing has moved
    other = config.load(["data=text", "data.path=a.txt"])
    monkeypatch.chdir(tmp_path / "run")
    runtime = {"cwd": str(tmp_path), "output_dir": "here"}
    node = OmegaConf.create({"hydra": {"runtime": runtime}})
    monkeypatch.setattr(HydraConfig.instance(), "cfg", node)
    for _ in range(2):  # a second time it changes nothing
        config.validate(cfg)
        found = {key: OmegaConf.select(cfg, key) for key in given}
        assert found == {key: str(tmp_path / name) for key, name in given.items()}
    config.validate(other)
    assert (other.ckpt_path, other.data.tokenizer, other.data.cache_dir) == (None, "bytes", None)


@pytest.mark.slow
def test_under_hydra_job_chdir_a_command_reads_where_it_was_typed(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "text {i}"}}\n' for i in range(40)))
    words = [
        "data=text", "data.path=a.jsonl", "data.val_share=0.3", "hydra.job.chdir=true",
        "model.d_ff=16", "model.d_model=16", "trainer=cpu", "preflight.on_fault=off",
        "samples.count=0",
        "samples.self_check.count=1", "trainer.val_check_interval=2",
    ]  # fmt: skip
    for steps, more in ((2, []), (4, ["ckpt_path=runs/2/checkpoints/last.ckpt"])):
        sizes = [f"trainer.max_steps={steps}", f"hydra.run.dir=runs/{steps}"]
        done = command(str(ROOT / "train.py"), *words, *more, *sizes, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        summary = json.loads((tmp_path / "runs" / str(steps) / "summary.json").read_text())
        assert (summary["steps"], summary["status"]) == (steps, "finished")
    assert {path.name for path in tmp_path.iterdir()} == {"a.jsonl", "runs"}
    with (tmp_path / "runs" / "4" / "metrics.csv").open() as file:
        trained = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert trained == [2, 3]  # numbers from 0: it goes on from the first run


@pytest.mark.parametrize(
    ("pattern", "found", "hidden"),
    [("", "a.txt b/c.txt", 4), ("*", "a.txt", 1), ("**/*.txt", "a.txt b/c.txt", 4),
     ("b/*.txt", "b/c.txt", 1), ("*/*.txt", "b/c.txt", 2), (".d/*", ".d/e.txt", 0)],
)  # fmt: skip
def test_hidden_files_are_left_out_and_counted(pattern, found, hidden, tmp_path, caplog):
    for name in ("a.txt", ".a.txt", "b/c.txt", "b/.c.txt", ".d/e.txt", "b/.f/g.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    paths = file_io.find_files(str(tmp_path / pattern), "data.path")
    assert [str(path.relative_to(tmp_path)) for path in paths] == found.split()
    said = [record.getMessage() for record in caplog.records]
    assert [f"not read: {hidden} hidden" in line for line in said] == [True] * bool(hidden)
