"""A checkpoint on any data, with nothing but the checkpoint."""

import json
import math
import shutil

import pytest

from causal_lm import config
from causal_lm.evaluate import evaluate
from causal_lm.fit import run
from support import command

SHORT = [
    "trainer=cpu", "trainer.max_steps=4", "trainer.val_check_interval=4", "data.batch_size=4",
    "trainer.enable_progress_bar=false", "data.max_length=32", "model.d_model=16",
    "model.d_ff=16", "samples.self_check.count=2", "preflight.on_fault=off",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint that stands alone, the text it saw, and the summary of its run."""
    folder = tmp_path_factory.mktemp("trained")
    path = folder / "a.txt"
    path.write_text("\n".join(f"line {i} of – the text" * (i % 4 + 1) for i in range(200)))
    overrides = ["data=text", f"data.path={path}", "data.unit=line", "data.val_share=0.2"]
    summary = run(config.load([*SHORT, *overrides]), folder / "run")
    shutil.move(folder / "run" / "checkpoints" / "last.ckpt", folder / "alone.ckpt")
    shutil.rmtree(folder / "run")
    return str(folder / "alone.ckpt"), overrides, summary


def test_the_figures_are_those_of_validation(trained):
    checkpoint, overrides, summary = trained
    found = evaluate(checkpoint, overrides)
    for name in ("loss", "ppl", "bpb"):
        assert found[name] == pytest.approx(summary[f"val/{name}"], rel=1e-5)
    assert found["bpb"] == pytest.approx(
        found["loss"] * found["tokens"] / math.log(2) / found["bytes"]
    )


def test_splits_add_up(trained):
    checkpoint, overrides, _ = trained
    val, train, both = (evaluate(checkpoint, overrides, split=s) for s in ("val", "train", "all"))
    assert train["tokens"] > val["tokens"] > 0
    assert both["tokens"] == train["tokens"] + val["tokens"]
    nats = train["loss"] * train["tokens"] + val["loss"] * val["tokens"]
    assert both["loss"] == pytest.approx(nats / both["tokens"], rel=1e-5)
    shorter = evaluate(checkpoint, [*overrides, "data.max_length=8"])
    assert (shorter["tokens"], shorter["bytes"]) == (val["tokens"], val["bytes"])


def test_what_cannot_be_evaluated(trained):
    checkpoint, overrides, _ = trained
    with pytest.raises(config.ConfigError, match="data="):
        evaluate(checkpoint, [])
    with pytest.raises(config.ConfigError, match=r"data\.max_length=33.* 32"):
        evaluate(checkpoint, [*overrides, "data.max_length=33"])
    with pytest.raises(ValueError, match="tokenizer"):
        evaluate(checkpoint, ["data=synthetic"])
    with pytest.raises(FileNotFoundError, match=r"data\.path=nowhere"):
        evaluate(checkpoint, ["data=text", "data.path=nowhere"])


def test_the_command(trained):
    checkpoint, overrides, _ = trained
    done = command("scripts/evaluate.py", checkpoint, *overrides, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["loss"] == pytest.approx(
        evaluate(checkpoint, overrides)["loss"], rel=1e-6
    )


@pytest.mark.extras
def test_the_checkpoints_tokenizer_reads_whatever_the_data_group_says(trained, tmp_path):
    _, overrides, _ = trained
    more = ["data.tokenizer=bpe", "data.vocab_size=300"]
    summary = run(config.load([*SHORT, *overrides, *more]), tmp_path / "run")
    checkpoint = str(shutil.move(tmp_path / "run" / "checkpoints" / "last.ckpt", tmp_path))
    shutil.rmtree(tmp_path / "run")
    for tokenizer in ("bytes", "bpe"):
        found = evaluate(checkpoint, [*overrides, f"data.tokenizer={tokenizer}"])
        assert found["bpb"] == pytest.approx(summary["val/bpb"], rel=1e-5)
    done = command("scripts/generate.py", checkpoint, "--prompt", "line <eos>", "--top-k", "5")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("line <eos>") == 4
