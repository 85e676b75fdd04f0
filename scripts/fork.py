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
import tempfile
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import prune

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = ROOT / "scripts" / "fork_templates"  # with the old name, as all else
MAX_LINE = 100
DESCRIPTION = 'description = "Causal language models with PyTorch Lightning and Hydra."'
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
    "examples": Part("examples/* docs/extending.md tests/test_examples.py", r"^'?examples\b"),
    "benchmarks": Part(
        "scripts/benchmark.py scripts/memory.py scripts/nanogpt_baseline.py tests/test_memory.py"
        " tests/test_small_text.py scripts/gpu_throughput.py tests/test_gpu_throughput.py"
        " scripts/trainer_overhead.py tests/test_trainer_overhead.py tests/test_benchmarks.py"
        " scripts/start_time.py scripts/tokenize_speed.py",
        "scripts/(benchmark|memory)|^'benchmark$|nanogpt_baseline|gpu_throughput|trainer_overhead"
        "|start_time|tokenize_speed",
    ),
    "crashtest": Part("scripts/crashtest.py tests/test_crash.py", "crashtest"),
}  # fmt: skip
OWN = (  # pages and commands of this repository, which no fork has
    "README* CHANGELOG* CONTRIBUTING* CITATION* .ci/* .github/workflows/* docs/* scripts/fork*"
    " scripts/prune.py tests/test_fork.py scripts/peers.py tests/test_peers.py"
    " tests/test_torchrun.py"
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
    without = [part.strip() for part in args.without.split(",") if part.strip()]
    try:
        fork(args.name, args.dest, without)
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
    ruff, check = [sys.executable, "-m", "ruff"], ["check", "-q", "--no-cache"]
    run([*ruff, "--version"], ROOT, "ruff is needed: pip install -e '.[dev]'")
    dest = dest.absolute()
    dest.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=dest.parent, prefix=f".{dest.name}.") as folder:
        new = Path(folder) / "new"
        write_files(new, name, [PARTS[part] for part in without])
        run([*ruff, *check, "--fix", "--ignore=E501", "."], new, "the fork is not clean")
        run([*ruff, "format", "-q", "--no-cache", "."], new, "the fork cannot be formatted")
        allow_long_lines(new)
        run([*ruff, *check, "."], new, "the fork is not clean")
        commit(new, name)
        new.replace(dest)


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


class Selection:
    """Which tracked files a fork without ``parts`` has, and how their text changes."""

    def __init__(self, parts: list[Part]) -> None:
        tracked = run(["git", "ls-files", "-z"], ROOT, "clone the repository first").split("\0")
        paths = [path for path in tracked if path and (ROOT / path).is_file()]
        self.keys = "|".join(part.key for part in parts if part.key) or NOTHING
        self.left_out = {path for path in paths for part in parts if matches(path, part.files)}
        self.left_out |= {path for path in paths if self._sets_a_key(path)}  # such as presets
        own = {path for path in paths if matches(path, OWN) and not matches(path, INHERITED)}
        gone = own | self.left_out
        self.kept = [path for path in paths if path not in gone]
        pages = {p for p in gone if p.endswith(".md") or p.startswith("docs/")}
        self.pages = "|".join(re.escape(Path(p).name) for p in sorted(pages))
        presets = [Path(p).stem for p in gone if p.startswith("configs/experiment/")]
        names = "|".join(map(re.escape, presets)) or NOTHING
        words = [part.words for part in parts] + [f"(?s:^'.*(?<![a-z])({names})(?![a-z]))"]
        self.words_of_code = re.compile("|".join(words))
        commands = [re.escape(p) for p in gone if p.startswith(("scripts/", ".ci/"))]
        self.words_of_tests = re.compile("|".join([*words, self.pages, *commands]))

    def _sets_a_key(self, path: str) -> bool:
        text = (ROOT / path).read_text("utf-8") if fnmatch(path, "configs/*/*.yaml") else ""
        return bool(re.search(f"^({self.keys}):", text, re.MULTILINE))

    def edit(self, path: str, text: str) -> str:
        """The text of a file without what names a part or a page that is left out."""
        if path.endswith((".py", ".yaml")):
            reference = rf"(: see | \((see |measured in )?)docs/({self.pages})\)?"
            text = re.sub(reference, "", text)
        if path.endswith((".yaml", ".toml")):
            line = rf"^ *(- )?(optional )?({self.keys})( =|:).*\n"
            text = re.sub(line, "", text, flags=re.MULTILINE)
        if path.endswith("/schema.py"):
            text = re.sub(rf"\s+({self.keys})\.\*", "", text)
        if path.endswith(".py") and not path.startswith("preflight/"):
            is_test = path.startswith("tests/")
            words = self.words_of_tests if is_test else self.words_of_code
            text = prune.prune(text, words, is_test)
        return text


def write_files(new: Path, name: str, parts: list[Part]) -> None:
    """Write the files that stay, and the templates, under the new name."""
    selection = Selection(parts)
    sources = {path: ROOT / path for path in selection.kept}
    templates = [path for path in TEMPLATES.rglob("*") if path.is_file()]
    sources |= {str(path.relative_to(TEMPLATES)): path for path in templates}
    for path, source in sources.items():
        text = selection.edit(path, source.read_text("utf-8"))
        if source in templates:  # a line that names a file which is left out goes with it
            lines = text.splitlines(keepends=True)
            text = "".join(x for x in lines if not any(p in x for p in selection.left_out))
        if path == "pyproject.toml":
            text = re.sub("^version = .*", 'version = "0.1.0"', text, flags=re.MULTILINE)
            text = re.sub("^description = .*", DESCRIPTION, text, flags=re.MULTILINE)
        if text or not path.startswith("tests/"):
            target = new / rename(path, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(rename(text, name), "utf-8")
            shutil.copymode(source, target)


def rename(text: str, name: str) -> str:
    """``text`` with the new name in the place of the old one, in each of its spellings."""
    package = name.replace("-", "_")
    text = text.replace("the authors of lightning-causal-lm",
                        f"the authors of {name} and of what it was made from")  # fmt: skip
    text = re.sub("(lightning-)?causal-lm", name, text)
    text = re.sub("(lightning_)?causal_lm", package, text)
    return text.replace("CAUSAL_LM_", f"{package.upper()}_")


def allow_long_lines(new: Path) -> None:
    """Exempt from ruff's limit the files in which a new name makes lines that are not broken."""
    names = [
        path.relative_to(new).as_posix() for path in sorted(new.rglob("*.py"))
        if any(len(line) > MAX_LINE for line in path.read_text("utf-8").splitlines())
    ]  # fmt: skip
    if names:
        rules = "".join(f'"{name}" = ["E501"]\n' for name in names)
        limit = f"[tool.ruff.lint.per-file-ignores]\n{rules}\n[tool.mypy]"
        file = new / "pyproject.toml"
        file.write_text(file.read_text("utf-8").replace("[tool.mypy]", limit), "utf-8")


def commit(new: Path, name: str) -> None:
    """Make ``new`` a git repository with one commit, in the name of the user if git knows it."""
    git = ["git"]
    for key, value in (("user.name", name), ("user.email", f"{name}@localhost")):
        if subprocess.run(["git", "config", key], capture_output=True).returncode:
            git += ["-c", f"{key}={value}"]
    for words in ("init -q -b main", "add -A", f"commit -q -m {name}"):
        run([*git, *words.split()], new, "git cannot make the repository")


if __name__ == "__main__":
    main()
