"""The docstrings of the running Python's standard library: real text that everybody has."""

import ast
import functools
import logging
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from causal_lm.data import token_cache
from causal_lm.data.sources.base import Chunk, TextSource

log = logging.getLogger(__name__)

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def files(root: Path) -> list[Path]:
    """The Python files below ``root``, in a fixed order, without tests and installed packages."""
    return [
        path
        for path in sorted(root.rglob("*.py"))
        if not SKIPPED_FOLDERS.intersection(path.relative_to(root).parts)
    ]


def docstrings(root: Path) -> Iterator[str]:
    """Every docstring of the modules, classes and functions below ``root``, in a fixed order."""
    for path in files(root):
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a few files are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and text.strip():
                    yield text.strip()


class Docstrings(TextSource):
    """Source of stdlib docstrings, one document each; duplicates are dropped.

    Args:
        root: folder to read instead of the standard library.
        options: see :class:`causal_lm.data.sources.base.TextSource`.
    """

    def __init__(self, *, root: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.root = Path(root or sysconfig.get_path("stdlib"))

    @functools.cached_property
    def texts(self) -> list[str]:
        """Raises:
        FileNotFoundError: no docstring below the folder."""
        found = list(docstrings(self.root))
        texts = list(dict.fromkeys(found))
        if not texts:
            raise FileNotFoundError(f"no docstring in any .py file below {self.root}")
        log.info(f"{len(texts):,} docstrings ({len(found) - len(texts):,} duplicates dropped)")
        return texts

    def identity(self) -> dict[str, Any]:
        return {"files": [token_cache.identity(path) for path in files(self.root)]}

    def size(self) -> int:
        return sum(map(len, self.texts))

    def read(self) -> Iterator[Chunk]:
        return self.chunks(((text,), True) for text in self.texts)
