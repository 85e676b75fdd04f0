"""scripts/fork.py: a project of its own, with the parts that are wanted, that passes its tests."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from support import ROOT, command, load_script
from support.runs import SHORT

pruning = sys.modules["prune"] = load_script("prune")  # which fork.py imports from beside it
fork = load_script("fork")
OLD = re.compile('(?i:causal[-_]lm)(?!(?<="CAUSAL_LM)")')  # but for the argument of peft


@pytest.mark.parametrize("name", ["Night", "2nd", "night_owl", "-x", "a--b", "json", "class",
                                  "torch", "omegaconf", "tests", "causal-lm", ""])  # fmt: skip
def test_a_name_that_cannot_be_a_package_is_refused(name):
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        fork.check_name(name)


def test_names_that_can():
    for name in ("nightingale", "night-owl", "gpt2", "my-causal-lm"):
        fork.check_name(name)


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["Night", "new"], ["'Night'"]),
        (["night", "full"], ["full"]),
        (["night", "full/file.txt"], ["file.txt"]),
        (["night", "new", "--without", "gru,pitfals"], ["'pitfals'", *fork.PARTS]),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(args, named, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file.txt").write_text("kept")
    done = command(str(ROOT / "scripts" / "fork.py"), *args, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")
    assert [word for word in named if word not in done.stderr] == []
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file.txt"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("from causal_lm import masks", "from night_owl import masks"),
        ("install lightning-causal-lm; causal-lm-train", "install night-owl; night-owl-train"),
        (".causal_lm_run CAUSAL_LM_FULL_ERROR", ".night_owl_run NIGHT_OWL_FULL_ERROR"),
        ("class CausalLM, no_causal_mask, causal_preflight", None),
    ],
)  # fmt: skip
def test_the_name_in_each_of_its_spellings(old, new):
    assert fork.rename(old, "night-owl") == (new or old)


SOURCE = '''"""Tests of a part."""
import pytest
from ours import keep, part
from ours.part import Thing

CASES = ["a", "part", "b"]
PAIR = ("part", "b")
NAMES = {"a": 1, "part": 2}
ALL = list(part.ALL)


@pytest.fixture
def thing():
    return Thing()


def test_of_the_part(thing):
    assert thing


# Why this one is there.
@pytest.mark.parametrize("name", ["a", *CASES, "é", "part"])
def test_that_stays(name):
    """Not of the part: only a docstring says so."""
    if name == "part":
        assert 0
    assert keep(name)


@pytest.mark.parametrize("name", ALL)
def test_of_all(name):
    assert name


class TestThing:
    def test_it(self):
        Thing()
'''
PRUNED = '''"""Tests of a part."""
import pytest
from ours import keep

CASES = ["a", "b"]
PAIR = ("b",)
NAMES = {"a": 1}




# Why this one is there.
@pytest.mark.parametrize("name", ["a", *CASES, "é"])
def test_that_stays(name):
    """Not of the part: only a docstring says so."""
    assert keep(name)
'''


def test_what_names_a_part_is_pruned_and_what_does_not_stays():
    words = re.compile(r"^'?part$|ours\.part")
    pruned = pruning.prune(SOURCE, words, is_test=True)
    assert re.sub("\n\n\n+", "\n\n\n", pruned).split() == PRUNED.split()
    assert pruning.prune(SOURCE, re.compile("nothing of it"), is_test=True) == SOURCE
    assert pruning.prune("def test_part(): pass\n", words, is_test=True) != ""
    assert pruning.prune("def test_x(): part()\n", words, is_test=True) == ""


def test_code_loses_branches_and_entries_but_no_function():
    source = (
        "MODELS = ['ours.part.A', 'ours.keep.B']\n"
        "def make(cfg):\n    if cfg.part:\n        from ours.part import A\n        return A\n"
        "    return cfg.part\n"
    )
    expected = "MODELS = ['ours.keep.B']\ndef make(cfg):\n    return cfg.part\n"
    assert pruning.prune(source, re.compile(r"ours\.part"), is_test=False) == expected


def test_every_part_has_files():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    if not tracked:
        pytest.skip("this is no git checkout")
    for name, part in fork.PARTS.items():
        for pattern in part.files.split():
            assert any(fork.matches(path, pattern) for path in tracked.splitlines()), (
                name,
                pattern,
            )


LONG_NAME = "night-owl-of-the-north"


def inside(dest: Path, *args: str, code: int = 0) -> str:
    """Run Python in a fork, whose packages alone are on the path; returns what it printed."""
    path = [dest / "src", dest / "preflight" / "src", dest / "tests", dest / "preflight" / "tests"]
    done = subprocess.run(
        [sys.executable, *args], cwd=dest, capture_output=True, text=True, timeout=1800,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))},
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module", params=["", "pitfalls", ",".join(fork.PARTS)], ids=len)
def made(request, tmp_path_factory):
    """(folder, parts that were left out) of a fork; its name makes lines longer, or reorders."""
    pytest.importorskip("ruff", reason="it formats a fork")
    name = LONG_NAME if request.param == "pitfalls" else "nightingale"
    dest = make_fork(tmp_path_factory.mktemp("forks") / name, request.param)
    return dest, request.param.split(",") if request.param else []


def make_fork(dest: Path, without: str) -> Path:
    done = command("scripts/fork.py", dest.name, str(dest), "--without", without)
    assert done.returncode == 0, done.stderr
    return dest


@pytest.mark.slow
def test_a_fork_has_no_trace_of_the_old_name_and_one_commit(made):
    dest, _ = made
    git = ["git", "-C", str(dest)]
    log = subprocess.run([*git, "log", "--oneline"], capture_output=True, text=True).stdout
    assert log.count("\n") == 1
    status = subprocess.run([*git, "status", "--short"], capture_output=True, text=True).stdout
    assert status == ""
    for path in dest.rglob("*"):
        if ".git" not in path.relative_to(dest).parts:
            assert not OLD.search(path.name)
            assert path.is_dir() or not OLD.search(
                path.read_text(encoding="utf-8", errors="ignore")
            )
    assert len((dest / "README.md").read_text().splitlines()) < 60
    assert (dest / ".github" / "workflows" / "ci.yml").exists()


@pytest.mark.slow
def test_a_fork_is_linted_and_formatted(made):
    dest, _ = made
    inside(dest, "-m", "ruff", "check", ".")
    inside(dest, "-m", "ruff", "format", "--check", ".")


@pytest.mark.slow
def test_parts_that_are_left_out_are_not_in_it(made):
    dest, without = made
    package = dest / "src" / dest.name.replace("-", "_")
    parts = {"pitfalls": "pitfalls.py", "gru": "models/gru.py"}
    for part, file in parts.items():
        assert (package / file).exists() == (part not in without)
    assert (dest / "examples").exists() == ("examples" not in without)
    code = [p.read_text() for p in (dest / "src").rglob("*.py")]
    code += [p.read_text() for p in (dest / "configs").rglob("*.yaml")]
    for part in set(without) & set(parts):
        assert not [
            text for text in code if re.search(rf"\.{part} import|^  - .*{part}:", text, re.M)
        ]


@pytest.mark.slow
def test_a_fork_trains_evaluates_and_passes_tests(made):
    """Of its tests a part that touches all it has; the next test runs all those of one fork."""
    dest, without = made
    inside(dest, "train.py", *SHORT, "hydra.run.dir=runs/one")
    checkpoint = "runs/one/checkpoints/last.ckpt"
    data = [word for word in SHORT if word.startswith("data.")]
    assert "nats per token" in inside(
        dest, "scripts/evaluate.py", checkpoint, "data=synthetic", *data
    )
    assert inside(dest, "scripts/generate.py", checkpoint, "--count=2").count("---") == 2
    inside(dest, "-m", dest.name.replace("-", "_"), "pitfalls.nothing=true", code=2)
    names = ["test_module", "test_model_contract", "test_optim", "test_objective",
             "test_parameter_groups", "test_preflight_use"]  # fmt: skip
    names += ["test_config"] * ("gru" in without)  # with all parts that can be left out
    names += ["test_pitfalls"] * ("pitfalls" not in without)
    names += ["test_examples"] * ("examples" not in without)
    files = [f"tests/{name}.py" for name in names]
    passed = inside(dest, "-m", "pytest", "-n", "0", "-q", *files)
    assert int(re.search(r"(\d+) passed", passed)[1]) > 100 and "failed" not in passed


@pytest.mark.slow
@pytest.mark.alone
def test_all_default_tests_of_a_fork_pass(tmp_path):
    """As the fork's own CI runs them, on all cores, with mypy."""
    pytest.importorskip("ruff", reason="it formats a fork")
    dest = make_fork(tmp_path / LONG_NAME, "pitfalls")
    started = time.perf_counter()
    passed = inside(dest, "-m", "pytest", "-q", "-p", "no:cacheprovider")
    print(f"the default tests of a fork take {time.perf_counter() - started:.0f} s")
    assert int(re.search(r"(\d+) passed", passed)[1]) > 1000 and "failed" not in passed
    inside(dest, "-m", "mypy", "--cache-dir", os.devnull)
