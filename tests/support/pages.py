"""Pages whose sections hold files to write and commands to run."""

import re
from pathlib import Path
from typing import NamedTuple

from support import ROOT


class Section(NamedTuple):
    """One section of a page: its files by name, its other Python, its commands."""

    title: str
    files: dict[str, str]
    python: list[str]
    commands: list[str]

    def write(self, folder: Path) -> None:
        for name, text in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8")


def sections(page: str) -> list[Section]:
    """The sections of a page; a block that begins with ``# NAME.py`` or ``.yaml`` is a file."""
    found = []
    for part in (ROOT / page).read_text(encoding="utf-8").split("\n## ")[1:]:
        section = Section(part.partition("\n")[0], {}, [], [])
        for language, text in re.findall(r"```(\w+)\n(.*?)```", part, re.DOTALL):
            if name := re.match(r"# (\S+\.(py|yaml))\n", text):
                section.files[name[1]] = text
            elif language == "bash":
                section.commands.extend(text.splitlines())
            else:
                section.python.append(text)
        found.append(section)
    return found
