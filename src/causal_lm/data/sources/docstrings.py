"""Docstrings: a source of real text that every Python installation has."""

import ast
import functools
import logging
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from causal_lm.data import token_cache
from causal_lm.data.sources.base import TextSource
from causal_lm.data.tokenize_corpus import DocumentPart, HeldOut

log = logging.getLogger(__name__)

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
SKIPPED = re.compile(r"(^|/)(\.|(site-packages|dist-packages|tests?|__pycache__)/)")


def python_files(root: Path) -> list[Path]:
    """The .py files below ``root``, sorted, without hidden ones, tests and installed packages."""
    paths = sorted(root.rglob("*.py"))
    return [p for p in paths if not SKIPPED.search(p.relative_to(root).as_posix())]


def docstrings(root: Path) -> Iterator[str]:
    """Every docstring of the modules, classes and functions below ``root``, in a fixed order."""
    for path in python_files(root):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # the standard library has a few broken test files
            continue
        for node in ast.walk(tree):
            if isinstance(node, DOCUMENTED) and (text := (ast.get_docstring(node) or "").strip()):
                yield text


@dataclass(kw_only=True)
class Docstrings(TextSource):
    """Source of the standard library's docstrings, one document each, without duplicates."""

    root: str | None = None  # folder of .py files to read instead

    @property
    def folder(self) -> Path:
        return Path(self.root or sysconfig.get_path("stdlib"))

    @functools.cached_property
    def texts(self) -> list[str]:
        """All docstrings. Raises FileNotFoundError where there is none."""
        found = list(docstrings(self.folder))
        texts = list(dict.fromkeys(found))
        if not texts:
            raise FileNotFoundError(f"no .py file in {self.folder} has a docstring")
        log.info(f"{len(texts):,} docstrings ({len(found) - len(texts):,} duplicates dropped)")
        return texts

    def identity(self) -> dict[str, Any]:
        return {"files": [token_cache.file_identity(path) for path in python_files(self.folder)]}

    def size(self) -> int:
        return sum(map(len, self.texts))

    def parts(self) -> Iterator[tuple[Iterable[DocumentPart], HeldOut]]:
        yield (((text,), True) for text in self.texts), self.held_out()
