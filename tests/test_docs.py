"""The pages of docs/ and the Chinese README keep up with the code and with the README."""

from causal_lm.config import CONFIG_DIR, GROUPS
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
