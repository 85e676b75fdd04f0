"""Start a project of your own from this one: a new name, only the parts you want, a fresh history.

python scripts/fork.py nightingale ../nightingale --without pitfalls,gru

DEST gets a package, console commands and tests of that name, in a git repository with one commit,
formatted and checked by ruff. The pages and figures of this repository stay here.
"""

import argparse
import keyword
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import prune

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = ROOT / "scripts" / "fork_templates"  # with the old name, as all else
MAX_LINE = 100
NOTHING = "(?!)"  # matches no text


class Part(NamedTuple):
    """What can be left out: patterns of its files, and how other files name it."""

    files: str
    words: str  # regular expression of names, and of strings with ' before them, in Python
    key: str = ""  # in YAML, TOML and the schema


PARTS = {
    "pitfalls": Part(
        "src/*/pitfalls.py configs/pitfalls/* docs/pitfalls.md tests/test_pitfalls.py",
        "(?i:pitfall)", "pitfalls",
    ),
    "gru": Part("src/*/models/gru.py configs/model/gru.yaml", r"^'gru$|model=gru|models\.gru"),
    "x_transformers": Part(
        "configs/model/x_transformers.yaml", "XTransformers|x[-_]transformers", "x-transformers"
    ),
    "examples": Part("examples/* docs/extending.md tests/test_examples.py", "^'examples"),
    "benchmarks": Part(
        "scripts/benchmark.py scripts/memory.py scripts/nanogpt_baseline.py tests/test_memory.py"
        " tests/test_small_text.py", "scripts/(benchmark|memory)|^'benchmark$|nanogpt",
    ),
    "crashtest": Part("scripts/crashtest.py tests/test_crash.py", "crashtest"),
}  # fmt: skip
OWN = (  # pages and commands of this repository, which no fork has
    "README* CHANGELOG* CONTRIBUTING* CITATION* .ci/* .github/workflows/* docs/* scripts/fork*"
    " scripts/prune.py tests/test_fork.py"
)
INHERITED = "docs/extending.md docs/pitfalls.md"  # of these, unless their part is left out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="of the project, such as nightingale or night-owl")
    parser.add_argument("dest", type=Path, help="a folder that does not exist, or is empty")
    parser.add_argument(
        "--without", default="", metavar="PART,…", help=f"leave out some of: {', '.join(PARTS)}"
    )
    args = parser.parse_args()
    try:
        fork(args.name, args.dest, [part for part in args.without.split(",") if part])
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    print(f"{args.name} is in {args.dest}; its README says how to install, train and test")


def fork(name: str, dest: Path, without: Iterable[str] = ()) -> None:
    """Make the project in ``dest``: whole, or not at all.

    Raises:
        ValueError: the name cannot be that of a package, a part is unknown, or a tool fails.
        OSError: ``dest`` has files, or cannot be written.
    """
    check_name(name)
    if unknown := sorted(set(without) - set(PARTS)):
        raise ValueError(f"there is no part {unknown[0]!r}; the parts are {', '.join(PARTS)}")
    if dest.exists() and (not dest.is_dir() or any(dest.iterdir())):
        raise FileExistsError(f"{dest} is not an empty folder: choose a new one")
    ruff = [sys.executable, "-m", "ruff"]
    run([*ruff, "--version"], ROOT, "ruff is needed: pip install -e '.[dev]'")
    dest = dest.absolute()
    dest.parent.mkdir(parents=True, exist_ok=True)
    new = dest.with_name(f".{dest.name}.unfinished")
    shutil.rmtree(new, ignore_errors=True)
    try:
        write_files(new, name, [PARTS[part] for part in without])
        run([*ruff, "check", "-q", "--fix", "--ignore=E501", "."], new, "the fork is not clean")
        run([*ruff, "format", "-q", "."], new, "the fork cannot be formatted")
        allow_long_lines(new)
        run([*ruff, "check", "-q", "."], new, "the fork is not clean")
        commit(new, name)
        new.replace(dest)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def check_name(name: str) -> None:
    """Raise ValueError unless ``name`` can be that of a distribution and of its package."""
    if not re.fullmatch("[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise ValueError(f"{name!r} cannot be a name: use a-z, 0-9 and -, as in night-owl")
    package = name.replace("-", "_")
    needed = re.findall(r'^ +"([\w-]+)[><=]', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    taken = {word.replace("-", "_") for word in needed} | {"hydra", "support", "fork"}
    taken |= {path.stem for path in [*ROOT.iterdir(), *(ROOT / "src").iterdir()]}
    if package in taken | sys.stdlib_module_names or keyword.iskeyword(package):
        raise ValueError(f"{name!r} is the name of another module: choose one of your own")


def run(command: list[str], cwd: Path, problem: str) -> str:
    """The output of a command; ValueError with ``problem`` and what it printed, if it fails."""
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{problem}: {(done.stdout + done.stderr)[:500]}")
    return done.stdout


def matches(path: str, patterns: str) -> bool:
    """Whether the path matches one of the patterns of ``fnmatch``."""
    return any(fnmatch(path, pattern) for pattern in patterns.split())


def write_files(new: Path, name: str, parts: list[Part]) -> None:
    """Write the tracked files that stay, without what names the others, under the new name."""
    tracked = run(["git", "ls-files", "-z"], ROOT, "clone the repository first").split("\0")
    paths = [path for path in tracked if path and (ROOT / path).is_file()]
    keys = "|".join(part.key for part in parts if part.key) or NOTHING
    of_parts = {path for path in paths for part in parts if matches(path, part.files)}
    of_parts |= {  # configurations that set a key of a part, such as presets
        path for path in paths if fnmatch(path, "configs/*/*.yaml")
        and re.search(f"^({keys}):", (ROOT / path).read_text("utf-8"), re.MULTILINE)
    }  # fmt: skip
    own = {p for p in paths if matches(p, OWN) and not matches(p, INHERITED)}
    stems = [Path(p).stem for p in of_parts if p.startswith("configs/experiment/")]
    names = "|".join(map(re.escape, stems)) or NOTHING
    words = [part.words for part in parts] + [f"(?s:^'.*(?<![a-z])({names})(?![a-z]))"]
    pages = [re.escape(Path(p).name) for p in own | of_parts if p.endswith(".md")]
    pages += [re.escape(p) for p in own | of_parts if p.startswith(("scripts/", ".ci/"))]
    in_code, in_tests = "|".join(words), "|".join([*words, *pages])
    for path in paths:
        if path in own | of_parts:
            continue
        target = new / rename(path, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            text = (ROOT / path).read_text("utf-8")
        except UnicodeDecodeError:
            shutil.copy(ROOT / path, target)
            continue
        if path.endswith((".yaml", ".yml", ".toml")):
            text = re.sub(rf"^ *(- )?(optional )?({keys})( =|:).*\n", "", text, flags=re.MULTILINE)
        if path.endswith("/schema.py"):
            text = re.sub(rf"\s+({keys})\.\*", "", text)
        if path.endswith(".py") and not path.startswith("preflight/"):
            is_test = path.startswith("tests/")
            text = prune.prune(text, re.compile(in_tests if is_test else in_code), is_test)
            text = re.sub(rf"(: see | \(see | \()docs/({'|'.join(pages)})\)?", "", text)
            if not text and is_test:
                continue
        target.write_text(rename(text, name), "utf-8")
        shutil.copymode(ROOT / path, target)
    for template in TEMPLATES.rglob("*.*"):
        if template.is_file():
            target = new / template.relative_to(TEMPLATES)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(rename(template.read_text("utf-8"), name), "utf-8")
    file = new / "pyproject.toml"
    text = re.sub("^version = .*", 'version = "0.1.0"', file.read_text("utf-8"), flags=re.MULTILINE)
    what = 'description = "Causal language models with PyTorch Lightning and Hydra."'
    file.write_text(re.sub("^description = .*", what, text, flags=re.MULTILINE), "utf-8")


def rename(text: str, name: str) -> str:
    """``text`` with the new name in the place of the old one, in each of its spellings."""
    package = name.replace("-", "_")
    text = text.replace("the authors of lightning-causal-lm",
                        f"the authors of {name} and of what it was made from")  # fmt: skip
    text = re.sub("(lightning-)?causal-lm", name, text)
    text = re.sub("(lightning_)?causal_lm", package, text)
    return text.replace("CAUSAL_LM_", f"{package.upper()}_")


def allow_long_lines(new: Path) -> None:
    """Where the new name makes lines too long that no formatter breaks, raise ruff's limit."""
    longest = max(
        len(line) for path in new.rglob("*.py") for line in path.read_text("utf-8").splitlines()
    )
    if longest > MAX_LINE:
        file = new / "pyproject.toml"
        limit = f"[tool.ruff.lint.pycodestyle]\nmax-line-length = {longest}\n\n[tool.mypy]"
        file.write_text(file.read_text("utf-8").replace("[tool.mypy]", limit), "utf-8")


def commit(new: Path, name: str) -> None:
    """Make ``new`` a git repository with one commit, in the name of the user if git knows it."""
    git = ["git"]
    for key, value in (("user.name", name), ("user.email", f"{name}@localhost")):
        if subprocess.run(["git", "config", key], capture_output=True).returncode:
            git += ["-c", f"{key}={value}"]
    for words in (
        ["init", "-q", "-b", "main"],
        ["add", "-A"],
        ["commit", "-q", "-m", f"{name} 0.1.0"],
    ):
        run([*git, *words], new, "git cannot make the repository")


if __name__ == "__main__":
    main()
