"""The docstrings of the running Python's standard library: real text that everybody has."""

import ast
import hashlib
import logging
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from causal_lm.data.documents import Corpus, Documents
from causal_lm.data.tokenizers import Bytes

log = logging.getLogger(__name__)

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}


def docstrings(root: Path) -> Iterator[str]:
    """Every docstring of the modules, classes and functions below ``root``, in a fixed order."""
    for path in sorted(root.rglob("*.py")):
        if SKIPPED_FOLDERS.intersection(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # a few files are broken on purpose
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node)
                if text and text.strip():
                    yield text.strip()


class Docstrings:
    """Source of stdlib docstrings, one document each, as UTF-8 bytes.

    Duplicates are dropped before the split, and a document's split is drawn from a hash of its
    text: no document is in both, and adding others moves none.

    Args:
        val_share: share of the documents held out.
        root: folder to read instead of the standard library.
    """

    def __init__(self, *, val_share: float, root: str | None = None) -> None:
        self.val_share = val_share
        self.root = Path(root or sysconfig.get_path("stdlib"))

    def load(self) -> Corpus:
        """Read, split, tokenise.

        Raises:
            FileNotFoundError: no docstring below the folder.
        """
        found = list(docstrings(self.root))
        texts = list(dict.fromkeys(found))
        if not texts:
            raise FileNotFoundError(f"no docstring in any .py file below {self.root}")
        log.info(f"{len(texts):,} docstrings ({len(found) - len(texts):,} duplicates dropped)")
        tokenizer = Bytes()
        splits: dict[bool, list[list[int]]] = {True: [], False: []}
        for text in texts:
            document = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
            splits[self._is_val(text)].append(document)
        return Corpus(
            Documents.from_lists(splits[False]), Documents.from_lists(splits[True]), tokenizer
        )

    def _is_val(self, text: str) -> bool:
        digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
        return int.from_bytes(digest[:8], "big") < self.val_share * 2**64
