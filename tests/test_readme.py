"""Every command that the README and the pages of PAGES print works as printed."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from support import ROOT

PAGES = ["README.md", "docs/tutorial.md", "docs/howto.md", "docs/runs.md", "docs/scaling.md"]
BLOCKS = [
    block.splitlines()
    for page in PAGES
    for block in re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text("utf-8"), re.DOTALL)
]
COMMANDS = [line for block in BLOCKS for line in block]
SETUP = [line for line in COMMANDS if "venv" in line]
EXTRAS = [block for block in BLOCKS if block[0].startswith("pip install")]  # and what needs them
IN_OTHER_TESTS = [
    # test_presets.py, where their figures are held against the table
    "python train.py -m experiment=fix,bug,unshifted_labels,pad_in_loss,no_causal_mask",
    "python train.py data=docstrings",
    # test_fork.py
    "python scripts/fork.py nightingale ../nightingale",
]


def test_set_up_is_two_commands():
    """The first ends in the main job, the second in the tests; .ci/run runs the second."""
    main, tests = SETUP
    assert main.endswith("&& python train.py experiment=fix")
    assert tests.endswith("&& pytest")
    assert "grep -m1 '^python3 -m venv .*pytest$' README.md" in (ROOT / ".ci/run").read_text()


def test_the_long_ones_are_still_printed():
    assert set(IN_OTHER_TESTS) <= set(COMMANDS)


def test_ci_installs_the_extras():
    named = set[str]().union(*(extras_in((ROOT / page).read_text("utf-8")) for page in PAGES))
    assert named >= {"huggingface", "loggers", "peft", "plots", "x-transformers"}
    assert named <= extras_in((ROOT / ".ci/run").read_text("utf-8"))


def test_the_readme_names_every_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    table = (ROOT / "README.md").read_text("utf-8").partition("| extra | for |")[2]
    assert [name for name in project["optional-dependencies"] if f"`{name}`" not in table] == []


def extras_in(text):
    """The extras that the commands of a text install."""
    found = re.findall(r"^pip install .*'\.\[(.*)\]'", text, re.MULTILINE)
    return {extra for extras in found for extra in extras.split(",")}


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """A copy to run in, so that runs/ of this checkout stays as it is.

    The user's own defaults in it make runs short that do not say how long they are.
    """
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("configs", "docs", "examples", "scripts"):
        shutil.copytree(ROOT / name, folder / name)
    shutil.copy(ROOT / "train.py", folder)
    short = """# @package _global_
trainer: {max_steps: 40, val_check_interval: 20}
samples: {count: 8, self_check: {count: 8}}
"""
    (folder / "configs" / "local").mkdir(exist_ok=True)
    (folder / "configs" / "local" / "default.yaml").write_text(short)
    return folder


def marked(line):
    needs = any(line in block for block in EXTRAS)
    return pytest.param(line, marks=pytest.mark.extras) if needs else line


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    [
        marked(c)
        for c in dict.fromkeys(COMMANDS)
        if c not in SETUP + IN_OTHER_TESTS and not c.startswith("pip install")
    ],
)
def test_command_works_as_printed(line, elsewhere):
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        line, shell=True, cwd=elsewhere, env=os.environ | {"PATH": path},
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
