"""The wheel alone, in an environment that knows nothing of the checkout: every console command."""

import json
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from support import ROOT, command
from support.runs import SHORT

pytestmark = pytest.mark.slow
SOURCES = ("src", "configs", "scripts", "preflight", "setup.py", "MANIFEST.in", "pyproject.toml",
           "README.md", "LICENSE")  # fmt: skip
IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The wheels of this project, made from its source distribution, and of the preflight."""
    folder = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=IGNORED)
        else:
            shutil.copy(ROOT / name, folder / name)
    pack = "from setuptools import build_meta; print(build_meta.build_sdist('.'))"
    done = command("-c", pack, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    sources = done.stdout.split()[-1]
    build = ("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", "dist")
    done = command(*build, sources, "./preflight", cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return sorted((folder / "dist").glob("*.whl"))


@pytest.fixture(scope="module")
def run(wheels, tmp_path_factory):
    """Runs a command of a fresh environment in an empty directory; libraries are those of here."""
    folder = tmp_path_factory.mktemp("elsewhere")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    bin_folder = folder / "venv" / "bin"
    install = ("--python", str(bin_folder / "python"), "install", "-q", "--no-deps", "--no-index")
    done = command("-m", "pip", *install, *map(str, wheels))
    assert done.returncode == 0, done.stderr[-2000:]
    (site,) = (folder / "venv").glob("lib/*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib"))
    (folder / "work").mkdir()

    def run(name: str, *args: str, exit_code: int = 0) -> str:
        done = subprocess.run(
            [bin_folder / name, *args], cwd=folder / "work", capture_output=True, text=True,
            env={"HOME": str(folder), "PATH": str(bin_folder), "OMP_NUM_THREADS": "1"},
            timeout=300,
        )  # fmt: skip
        assert done.returncode == exit_code, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    run.folder = folder / "work"
    return run


def test_the_wheel_holds_all_code_configurations_and_types(wheels):
    packed = {name for wheel in wheels for name in zipfile.ZipFile(wheel).namelist()}
    code = {str(p.relative_to(ROOT / "src")) for p in (ROOT / "src").rglob("*.py")}
    configs = {f"causal_lm/{p.relative_to(ROOT)}" for p in (ROOT / "configs").rglob("*.yaml")}
    assert len(configs) > 10 and code | configs | {"causal_lm/py.typed"} <= packed
    assert not [name for name in packed if name.startswith(("tests/", "configs/", "scripts/"))]


def test_nothing_comes_from_the_checkout(run):
    show = (
        "import causal_lm, causal_preflight; print(causal_lm.__file__, causal_preflight.__file__)"
    )
    for path in run("python", "-c", show).split():
        assert Path(path).is_relative_to(run.folder.parent)


@pytest.fixture(scope="module")
def checkpoint(run):
    """Of a short run of the console command, in the directory where the command was typed."""
    run("causal-lm-train", *SHORT, "model=llama")
    (summary,) = run.folder.glob("runs/fix/*/summary.json")
    assert json.loads(summary.read_text())["steps"] == 6
    assert (summary.parent / "train.log").exists()
    return str(summary.parent / "checkpoints" / "last.ckpt")


def test_evaluate_and_generate(run, checkpoint):
    data = [word for word in SHORT if word.startswith("data.")]
    figures = json.loads(run("causal-lm-evaluate", checkpoint, "data=synthetic", *data, "--json"))
    summary = json.loads((Path(checkpoint).parents[1] / "summary.json").read_text())
    assert figures["loss"] == pytest.approx(summary["val/loss"], rel=1e-5)
    texts = run("causal-lm-generate", checkpoint, "--count=3", "--prompt=abc")
    assert texts.count("--- ") == 3 and texts.count("abc") >= 3
    assert run("causal-lm-generate", "--help").startswith("usage: causal-lm-generate ")
    run("causal-lm-generate", "nothing.ckpt", exit_code=1)


@pytest.mark.extras
def test_export(run, checkpoint):
    run("causal-lm-export", checkpoint, "exported")
    assert (run.folder / "exported" / "config.json").exists()


def test_preflight(run):
    report = json.loads(run("causal-lm-preflight", *SHORT, "--json"))
    assert report["audited"] and not report["faults"]
    shutil.copy(ROOT / "examples" / "audit_me.py", run.folder)
    ids = ("--pad-id=0", "--eos-id=2")
    run("causal-lm-preflight", "audit_me.py:correct", *ids)
    run("causal-lm-preflight", "audit_me.py:unshifted", *ids, exit_code=1)


def test_python_m_trains_a_model_of_the_working_directory(run):
    """Also as two ranks of a sweep's job, which is a process that starts another."""
    shutil.copy(ROOT / "examples" / "bring_your_own_model.py", run.folder / "mine.py")
    own = [*(word for word in SHORT if not word.startswith("model.")), "~model",
           "+model._target_=mine.ConvLM", "+model.width=8", "trainer.max_steps=2"]  # fmt: skip
    run("causal-lm-train", *own, "hydra.run.dir=one")
    ranks = ["trainer.devices=2", "trainer.strategy=ddp", "hydra.sweep.dir=two"]
    run("python", "-m", "causal_lm", "-m", *own, *ranks, "seed=3")
    for summary in (run.folder / "one" / "summary.json", *run.folder.glob("two/*/summary.json")):
        assert json.loads(summary.read_text())["steps"] == 2
    assert len(list(run.folder.glob("two/*/summary.json"))) == 1
    run("python", "-m", "causal_lm", "experiment=fux", exit_code=2)
