"""A model class from outside causal_lm, and checkpoints that name code."""

import pytest
import torch

from causal_lm.build import restore
from causal_lm.checkpoint_file import CONFIG
from causal_lm.evaluate import evaluate
from support import ROOT, command
from support.outside import Model
from support.runs import SHORT, short_run

TARGET = "support.outside.Model"
NAMED = f"model._target_={TARGET}"
DATA = ["data=synthetic", *[word for word in SHORT if word.startswith("data.source")]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outside")
    return folder, short_run(folder, NAMED)


@pytest.fixture
def path(trained):
    return str(trained[0] / "checkpoints" / "last.ckpt")


def test_it_trains_and_resumes(trained, path, tmp_path):
    assert trained[1]["status"] == "finished"
    more = short_run(tmp_path, NAMED, f"ckpt_path={path}", "trainer.max_steps=8")
    assert more["steps"] == 8
    with pytest.raises(ValueError, match=r"model\._target_=support\.outside\.Model"):
        short_run(tmp_path / "other", f"ckpt_path={path}")


def test_it_is_opened_where_the_caller_names_it(trained, path):
    with pytest.raises(ValueError, match=f"--trust {TARGET}"):
        restore(path)
    with pytest.raises(ValueError, match=f"--trust {TARGET}"):
        restore(path, trust=["support.outside.Figure"])
    module, _, _ = restore(path, trust=[TARGET])
    assert type(module.model) is Model
    with pytest.raises(ValueError, match=f"--trust {TARGET}"):
        evaluate(path, DATA)
    for found in (evaluate(path, [*DATA, NAMED]), evaluate(path, DATA, trust=[TARGET])):
        assert found["loss"] == pytest.approx(trained[1]["val/loss"], rel=1e-5)


def test_another_name_of_the_same_class_is_the_class(path, monkeypatch):
    import support

    monkeypatch.setattr(support, "Renamed", Model, raising=False)
    module, _, _ = restore(path, trust=["support.Renamed"])
    assert type(module.model) is Model


@pytest.mark.parametrize("trust", [pytest.param((), marks=pytest.mark.slow), ("--trust", TARGET)])
def test_the_command_samples_from_it(trust, path):
    where = f"{ROOT}/src:{ROOT}/preflight/src:{ROOT}/tests"
    done = command("scripts/generate.py", path, "--count", "2", *trust, PYTHONPATH=where)
    assert done.returncode == (0 if trust else 1), done.stderr
    assert (f"--trust {TARGET}" in done.stderr) is not bool(trust)
    assert done.stdout.count("---") == (2 if trust else 0)


WRITE = {"_target_": "builtins.open", "mode": "w"}  # leaves a file where it is called
TINY, HUGGINGFACE = "causal_lm.models.tiny.Tiny", "causal_lm.models.external.huggingface"


@pytest.mark.parametrize(
    "changes",
    [
        {"_target_": TINY, "dropout": WRITE},
        {"_target_": TARGET, "dropout": WRITE},
        {"_target_": TARGET, "dropout": [[0.0, WRITE]]},
        {"_target_": HUGGINGFACE, "config": {"model_type": "gpt2", "n_embd": WRITE}},
        {"_target_": HUGGINGFACE, "config": {"model_type": "gpt2", "auto_map": {"a": "b--c.d"}}},
        {"_target_": HUGGINGFACE, "config": {"attn_implementation": "somebody/kernel"}},
        {"_target_": HUGGINGFACE, "init_from": "somebody/model"},
        {"_target_": "builtins.open", "mode": "w"},
        {"_target_": "pathlib.Path.touch"},
        {"_target_": "causal_lm.models.external.torch.hub.load"},
        {"_target_": "causal_lm.models.tiny.masks.torch.load"},
        {"_target_": f"{TINY}.__init__"},
        {"_target_": None},
        {"_target_": WRITE},
        {"_target_": [TINY]},
        {"_target_": TINY, "d_model": "${oc.env:HOME}"},
        {"_target_": TINY, "_args_": [WRITE]},
        {"_target_": TINY, "_partial_": True},
    ],
    ids=str,
)
def test_a_checkpoint_does_not_say_what_runs(changes, path, tmp_path):
    """Each would have left the file ``ran``, had its values been instantiated or called."""
    saved, marker = torch.load(path, weights_only=True), tmp_path / "ran"

    def named(value):
        if isinstance(value, dict):
            more = {"file": str(marker)} if value.get("_target_") == "builtins.open" else {}
            return {k: named(v) for k, v in value.items()} | more
        return [named(v) for v in value] if isinstance(value, list) else value

    saved[CONFIG]["model"] |= named(changes)
    torch.save(saved, tmp_path / "bad.ckpt")
    with pytest.raises(ValueError, match=r"--trust|names code|must be"):
        restore(tmp_path / "bad.ckpt", trust=[TARGET])
    assert not marker.exists()
    open(file=str(marker), mode="w").close()  # the guard: that call does leave the file
    assert marker.exists()
