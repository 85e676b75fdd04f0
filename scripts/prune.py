"""Remove from Python source what uses a part that is left out; fork.py uses it.

A test that names the part goes, and so does what stands on it: a case of a parametrized test, an
entry of a table, a fixture and the tests that take it. Of other code go the entries of tables, the
definitions of that name, and the ``if`` statements that import the part.
"""

import ast
import re
from collections.abc import Iterator

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
Span = tuple[int, int]  # offsets of a cut, in bytes


class _Pruner:
    """One search for something to cut in one version of the source."""

    def __init__(self, source: str, words: re.Pattern[str], is_test: bool, dead: set[str]) -> None:
        self.words, self.is_test, self.dead = words, is_test, dead
        self.tree = ast.parse(source)
        self.lines = source.encode().splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))

    def find(self) -> tuple[Span, str] | None:
        """The first cut, and what takes its place."""
        return self._in_body(self.tree.body)

    def _in_body(self, body: list[ast.stmt]) -> tuple[Span, str] | None:
        for node in body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                found = self._in_import(node)
            elif isinstance(node, Definition):
                found = self._in_definition(node)
            else:
                found = self._in_ifs(node) or self._in_collections(node)
                if not found and self.is_test and self._mentions(node) and not _is_docstring(node):
                    names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)
                             and isinstance(n.ctx, ast.Store)]  # fmt: skip
                    found = self._cut(node, *names)
            if found:
                return found
        return None

    def _in_definition(self, node: Definition) -> tuple[Span, str] | None:
        if self.words.search(node.name):
            return self._cut(node, node.name)
        if found := self._in_ifs(node):
            return found
        for part in node.decorator_list:
            if self.is_test and (found := self._in_collections(part)):
                return found
        if isinstance(node, ast.ClassDef):
            outside = [*node.decorator_list, *node.bases]
            rest = [n for n in node.body if not _is_docstring(n)]
            if self.is_test and (
                any(map(self._mentions, outside)) or (len(rest) == 1 and self._mentions(rest[0]))
            ):
                return self._cut(node, node.name)
            return self._in_body(node.body)
        if self.is_test and self._mentions(node):
            return self._cut(node, node.name)
        return None

    def _in_import(self, node: ast.Import | ast.ImportFrom) -> tuple[Span, str] | None:
        module = getattr(node, "module", None) or ""
        gone = [a for a in node.names if self.words.search(f"{module}.{a.name}")
                or self.words.search(a.name)]  # fmt: skip
        if not gone:
            return None
        self.dead.update(alias.asname or alias.name for alias in gone)
        if len(gone) == len(node.names):
            return self._cut(node)
        return self._cut_element(list(node.names), node.names.index(gone[0]), is_tuple=False)

    def _in_ifs(self, node: ast.AST) -> tuple[Span, str] | None:
        """An ``if`` without ``else`` whose condition names the part, or which imports it."""
        for inner in ast.walk(node):
            if isinstance(inner, ast.If) and not inner.orelse:
                imports = [n for n in inner.body if isinstance(n, ast.ImportFrom)]
                if any(self.words.search(n.module or "") for n in imports) or (
                    self.is_test and self._mentions(inner.test)
                ):
                    return self._cut(inner)
        return None

    def _in_collections(self, node: ast.AST) -> tuple[Span, str] | None:
        """An element of a literal list, tuple, set or dict, of which others stay."""
        for inner in ast.walk(node):
            if isinstance(inner, ast.List | ast.Tuple | ast.Set):
                elements: list[list[ast.expr]] = [[element] for element in inner.elts]
            elif isinstance(inner, ast.Dict):
                pairs = zip(inner.keys, inner.values, strict=True)
                elements = [[n for n in pair if n is not None] for pair in pairs]
            else:
                continue
            gone = [any(map(self._mentions, element)) for element in elements]
            if any(gone) and not all(gone):
                is_tuple = isinstance(inner, ast.Tuple)
                whole = [_span_node(element) for element in elements]
                return self._cut_element(whole, gone.index(True), is_tuple)
            if all(gone) and len(elements) > 1:
                return None
        return None

    def _mentions(self, node: ast.AST) -> bool:
        for inner in ast.walk(node):
            texts: list[str] = []
            match inner:
                case ast.Name(id=name) | ast.arg(arg=name):
                    if name in self.dead:
                        return True
                    texts = [name]
                case ast.Attribute(attr=name) | ast.FunctionDef(name=name):
                    texts = [name]
                case ast.keyword(arg=str(name)):
                    texts = [name]
                case ast.Constant(value=str(text)):
                    texts = [f"'{text}"]
                case ast.ImportFrom(module=module, names=aliases):
                    texts = [f"{module}.{alias.name}" for alias in aliases]
            if any(map(self.words.search, texts)) and not _is_docstring_of(node, inner):
                return True
        return False

    def _cut(self, node: ast.stmt, *names: str) -> tuple[Span, str]:
        """Whole lines of a statement, with its decorators and the comment above it."""
        self.dead.update(names)
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))]) - 1
        while first and re.match(rb"\s*#(?! ----)", self.lines[first - 1]):
            first -= 1
        return (self.starts[first], self.starts[node.end_lineno or 0]), ""

    def _cut_element(self, elements: list, index: int, is_tuple: bool) -> tuple[Span, str]:
        """One of several elements, with the comma that parts it from its neighbor."""
        node = elements[index]
        if index + 1 < len(elements):
            span = self._offset(node), self._offset(elements[index + 1])
        else:
            span = self._offset(elements[index - 1], at_end=True), self._offset(node, at_end=True)
        is_single = is_tuple and len(elements) == 2
        if is_single and index == 0:  # ("a", "b") -> ("b",)
            end = self._offset(elements[1], at_end=True)
            kept = b"".join(self.lines)[span[1] : end].decode()
            return (span[0], end), f"{kept},"
        return span, "," if is_single else ""

    def _offset(self, node: ast.expr | ast.alias, at_end: bool = False) -> int:
        line, column = (
            (node.end_lineno, node.end_col_offset) if at_end else (node.lineno, node.col_offset)
        )
        return self.starts[(line or 1) - 1] + (column or 0)


def _span_node(nodes: list[ast.expr]) -> ast.expr:
    """A node from the start of the first to the end of the last one; ``**x`` has one node."""
    first, last = nodes[0], nodes[-1]
    return ast.Constant(
        None, lineno=first.lineno, col_offset=first.col_offset,
        end_lineno=last.end_lineno, end_col_offset=last.end_col_offset,
    )  # fmt: skip


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def _docstrings(node: ast.AST) -> Iterator[ast.AST]:
    for inner in ast.walk(node):
        if isinstance(inner, Definition) and inner.body and _is_docstring(inner.body[0]):
            yield inner.body[0].value  # type: ignore[attr-defined]


def _is_docstring_of(root: ast.AST, node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and any(node is d for d in _docstrings(root))


def prune(source: str, words: re.Pattern[str], is_test: bool) -> str:
    """``source`` without what names ``words``; empty if it had tests and none is left."""
    dead: set[str] = set()
    had_tests = _has_tests(source)
    while found := _Pruner(source, words, is_test, dead).find():
        (start, end), replacement = found
        encoded = source.encode()
        source = (encoded[:start] + replacement.encode() + encoded[end:]).decode()
    if is_test:
        comment = re.compile(r"^\s*#")
        lines = source.splitlines(keepends=True)
        source = "".join(x for x in lines if not (comment.match(x) and words.search(x)))
    return "" if had_tests and not _has_tests(source) else source


def _has_tests(source: str) -> bool:
    return bool(re.search(r"^\s*(def test_|class Test)", source, re.MULTILINE))
