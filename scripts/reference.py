"""Write docs/reference.md: every configuration key with its default, valid values and meaning.

python scripts/reference.py

The keys, defaults and comments are those of ``configs/``, the values those of ``schema.py``.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import yaml

from causal_lm.config import CONFIG_DIR
from causal_lm.report.files import write_text
from causal_lm.schema import ANY, RULES, Rule, rule_of

PAGE = Path(__file__).resolve().parents[1] / "docs" / "reference.md"
TITLE = """# All configuration keys

Made by `python scripts/reference.py` from `configs/` and `src/causal_lm/schema.py`; edit those.

Choose an option of a group as in `model=llama`, change a key as in `seed=1`. `python train.py --cfg
job` prints the values of a run, `python train.py --hydra-help` the keys of Hydra itself, such as
`hydra.run.dir`. A key without valid values goes to the class that is named, which checks it. Any
other argument of `lightning.Trainer` is added, as in `+trainer.limit_val_batches=2`.
"""


class Key(NamedTuple):
    """A key as a YAML file writes it; ``default`` is empty for a group of keys."""

    name: str
    default: str
    comment: str


def main() -> None:
    write_text(PAGE, page())


def page() -> str:
    """The page in Markdown."""
    parts, seen = [TITLE, "## train.yaml\n", *_option(CONFIG_DIR / "train.yaml", "")], set()
    for folder in sorted(CONFIG_DIR.glob("*/")):
        if files := sorted(folder.glob("*.yaml")):
            parts.append(f"## {folder.name}\n")
            for file in files:
                parts += _option(file, folder.name)
    for file in CONFIG_DIR.rglob("*.yaml"):
        seen |= {key.name for key in keys_of(file)}
    others = [Key(name, "", "") for name in RULES if name not in seen and "*" not in name]
    parts += ["## Keys that no file sets\n", *_table(sorted(others))]
    return "\n".join(parts)


def _option(file: Path, group: str) -> Iterator[str]:
    """The section of one file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    head = [line for line in lines[: _first_key(lines)] if not line.startswith("# @package")]
    keys = keys_of(file)
    classes = [
        f"`{key.default}`" + f" (`{owner}`)" * (owner != group)
        for key in keys
        if (owner := key.name.removesuffix("._target_")) != key.name
    ]
    if group:
        yield f"### {group}={file.stem}".replace("=_", ": part of other options, _") + "\n"
    yield "\n".join(line.removeprefix("# ") for line in head) + "\n"
    if bases := list(_bases(file, group)):
        yield f"Based on: {', '.join(f'`{base}`' for base in bases)}\n"
    if classes:
        yield f"Class: {', '.join(classes)}\n"
    yield from _table([key for key in keys if key.name.rpartition(".")[2][:1] != "_"])


def _bases(file: Path, group: str) -> Iterator[str]:
    """The options that the ``defaults`` of a file name, as the command line names them."""
    for entry in (yaml.safe_load(file.read_text(encoding="utf-8")) or {}).get("defaults", []):
        if isinstance(entry, str):
            if entry != "_self_":
                yield f"{group.removeprefix('hydra/')}={entry.partition('@')[0]}"
            continue
        for name, option in entry.items():
            if option is not None:
                yield f"{name.split()[-1].lstrip('/')}={option}"


def _first_key(lines: list[str]) -> int:
    return next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))


def keys_of(file: Path) -> list[Key]:
    """The keys that a file sets, in its order, by their full dotted names."""
    text = file.read_text(encoding="utf-8")
    group = "" if "@package _global_" in text or file.parent == CONFIG_DIR else file.parent.name
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return [] if root is None else list(_walk(root, f"{group}." if group else "", text))


def _walk(node: yaml.MappingNode, prefix: str, text: str) -> Iterator[Key]:
    for key, value in node.value:
        name = f"{prefix}{key.value}"
        if name.rpartition(".")[2] == "defaults" or name in (
            "hydra.callbacks",
            "hydra.job_logging",
        ):
            continue
        nested = isinstance(value, yaml.MappingNode)
        end = key.end_mark.index + 1 if nested else value.end_mark.index
        comment = text[end:].partition("\n")[0].partition("# ")[2]
        default = "" if nested else text[value.start_mark.index : end]
        if comment or not nested:
            yield Key(name, default, comment)
        if nested:
            yield from _walk(value, f"{name}.", text)


def _table(keys: list[Key]) -> Iterator[str]:
    """The keys as a table, if there are any."""
    if not keys:
        return
    yield "| key | default | valid | meaning |\n|---|---|---|---|"
    for key in keys:
        rule = rule_of(key.name) if key.default or not key.comment else None
        cells = [f"`{key.name}`", f"`{key.default}`" if key.default else "",
                 _valid(rule) if rule else "", key.comment]  # fmt: skip
        yield (
            "| "
            + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells)
            + " |"
        )
    yield ""


def _valid(rule: Rule) -> str:
    return "(not checked here)" if rule is ANY else rule.description


if __name__ == "__main__":
    main()
