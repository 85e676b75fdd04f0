"""The pages of docs/ and the Chinese README keep up with the code and with the README."""

import argparse
import re
import shlex
import sys
from functools import partialmethod
from pathlib import Path

import pytest
from hydra import initialize_config_dir

from causal_lm import config
from causal_lm.config import CONFIG_DIR, GROUPS
from causal_lm.fit import SUMMARY_KEYS
from causal_lm.schema import RULES
from support import ROOT, load_script


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_reference_is_what_its_script_makes():
    assert read("docs/reference.md") == load_script("reference").page()


def test_the_reference_has_every_group_option_and_key():
    page = read("docs/reference.md")
    options = [file for group in GROUPS for file in (CONFIG_DIR / group).glob("[!_]*.yaml")]
    assert len(options) > 60
    for file in options:
        assert f"\n### {file.parent.name}={file.stem}\n" in page
    keys = [key for key in RULES if "*" not in key]
    assert len(keys) > 100
    assert [key for key in keys if f"\n| `{key}` |" not in page] == []


def test_the_page_of_runs_has_every_figure_of_a_summary():
    page = read("docs/runs.md")
    assert [key for key in SUMMARY_KEYS if f"`{key}`" not in page] == []


COMMANDS = [
    pytest.param(page, line, marks=[pytest.mark.slow] * (" -m " in line))
    for page in ("docs/performance.md", "docs/pitfalls.md")
    for line in re.findall(r"^python .*|(?<=`)python [^`]*", read(page), re.MULTILINE)
]


class ParsedError(Exception):
    """The arguments of a script are valid."""


@pytest.mark.parametrize(("page", "line"), COMMANDS, ids=lambda text: text[:50])
def test_a_long_command_is_valid(page, line, monkeypatch):
    """It is composed, or parsed by its script, but does not run."""
    script, *words = shlex.split(line)[1:]
    if script == "train.py":
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config.validate_sweep([word for word in words if word != "-m"])
        return
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)
        monkeypatch.setattr(argparse.ArgumentParser, name, partialmethod(parse_alone, parse))
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.setattr(sys, "argv", [script, *words])
    module = load_script(Path(script).stem)
    if not hasattr(module, "main"):  # it takes files alone
        assert all((ROOT / word).is_file() for word in words)
        return
    with pytest.raises(ParsedError):
        module.main()


def parse_alone(parser, parse, *args):
    parse(parser, *args)
    raise ParsedError


def sections(page: str) -> list[str]:
    return re.split(r"^## ", read(page), flags=re.MULTILINE)


def fenced(text: str) -> list[str]:
    return re.findall(r"^```.*?^```", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def figures(text: str) -> list[str]:
    return re.findall(r"\d(?:[\d,.]*\d)?[⁰¹²³⁴-⁹]*", prose(text))


def code_spans(text: str) -> list[str]:
    return sorted(" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(text)))


@pytest.mark.parametrize(
    ("of", "expected"),
    [(fenced, 20), (figures, 70), (code_spans, 150)],
    ids=["commands", "figures", "names"],
)
def test_the_chinese_readme_has_the_same(of, expected):
    """In each section: the same code blocks and figures in the same order, the same names."""
    english, chinese = sections("README.md"), sections("README.zh-CN.md")
    assert [of(text) for text in chinese] == [of(text) for text in english]
    assert sum(len(of(text)) for text in english) > expected


def test_the_chinese_readme_is_chinese_and_links_to_the_same_pages():
    text = prose(read("README.zh-CN.md"))
    paragraphs = [part for part in text.split("\n\n") if part.strip() and part[0] not in "#!"]
    assert [part for part in paragraphs if not re.search("[\u4e00-\u9fff]", part)] == []
    links = [re.findall(r"\]\(([^)]+)\)", read(name)) for name in ("README.md", "README.zh-CN.md")]
    assert links[0].pop(0) == "README.zh-CN.md" and links[1].pop(0) == "README.md"
    assert links[0] == links[1]
