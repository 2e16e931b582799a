# SPDX-License-Identifier: Apache-2.0
"""All single faults that can be planted in a source file, by its syntax tree, and a sample of them.

Left out are annotations, decorators, ``__all__``, what only a type checker reads, the texts of errors, and flags that
guard or tune without a result of their own (:data:`QUIET`).
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

#: What is mutated, below the root of a checkout.
UNDER = ("peftkern",)
#: Kernels in Triton's language, whose tests plant faults of their own, and what is no part of a patched model's path:
#: commands, the bounds that tests use, and export formats.
NOT_UNDER = (
    "peftkern/backends/triton", "peftkern/tools", "peftkern/testing", "peftkern/integrations", "peftkern/self_study",
    "peftkern/__main__.py",
)  # fmt: skip
#: Keywords whose value right code never notices: checks of lengths, cache sizes, lines that warnings name.
QUIET = ("strict", "maxsize", "stacklevel", "slots", "frozen")

#: The attributes that name a mutant, in the order of its key.
KEY = ("path", "function", "old", "new", "occurrence", "of", "text")

_COMPARISONS = {
    ast.Lt: ("<", "<=", ">="), ast.LtE: ("<=", "<", ">"), ast.Gt: (">", ">=", "<="), ast.GtE: (">=", ">", "<"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"), ast.IsNot: ("is not", "is"),
    ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
}  # fmt: skip
_ARITHMETIC = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "+"), ast.Div: ("/", "*"), ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "//"), ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        path: the file, relative to the root of the checkout.
        function: the qualified name of the function or class around it, empty at module level.
        line: the number of the line where the edit starts, from 1.
        text: that line without indentation.
        old: the expression or operator that is replaced, in context where it is short.
        new: what replaces it.
        occurrence: which of several equal edits of one function this is, from 0.
        start: where the edit starts, in bytes from the start of the file.
        end: where it ends.
        insert: the bytes that come in between.
        of: how many equal edits the function has.
    """

    path: str
    function: str
    line: int
    text: str
    old: str
    new: str
    occurrence: int
    start: int = dataclasses.field(compare=False)
    end: int = dataclasses.field(compare=False)
    insert: bytes = dataclasses.field(compare=False)
    of: int = 1

    @property
    def key(self) -> str:
        """Names the fault without line numbers, so that it outlives changes elsewhere in the file.

        The text of the line and the number of equal edits keep it from naming another fault where an equal one was
        inserted before it.
        """
        return json.dumps([getattr(self, name) for name in KEY])

    def applied(self, source: bytes) -> bytes:
        """The source with the fault."""
        return source[: self.start] + self.insert + source[self.end :]

    def diff(self, source: bytes) -> str:
        """The changed lines, before and after."""
        after = self.applied(source).decode().splitlines()
        before = source.decode().splitlines()
        same = len(after) - len(before)
        changed = [i for i, line in enumerate(before) if i + same >= len(after) or line != after[i]]
        return "\n".join(
            f"{sign}{lines[i].strip()}" for i in changed for sign, lines in (("-", before), ("+", after))
        )


def sample(mutants: Iterable[Mutant], seed: int, count: int) -> list[Mutant]:
    """``count`` mutants, drawn so that a change of one file leaves most of the sample as it is."""

    def place(x: Mutant) -> bytes:
        key = json.dumps([x.path, x.function, x.old, x.new, x.occurrence])
        return hashlib.sha256(f"{seed} {key}".encode()).digest()

    return sorted(mutants, key=place)[:count]


def files(root: Path) -> list[str]:
    """The files that are mutated."""
    paths = (path.relative_to(root).as_posix() for folder in UNDER for path in (root / folder).rglob("*.py"))
    return sorted(path for path in paths if not path.startswith(NOT_UNDER))


def all_of(root: Path) -> list[Mutant]:
    """Every mutant of every file."""
    return [x for path in files(root) for x in of_file(path, (root / path).read_bytes())]


def of_file(path: str, source: bytes) -> list[Mutant]:
    """Every mutant of one file, in the order of its lines."""
    visitor = _Visitor(path, source)
    visitor.visit(ast.parse(source))
    total = Counter((x.function, x.old, x.new) for x in visitor.found)
    counts: Counter[tuple] = Counter()
    result = []
    for x in sorted(visitor.found, key=lambda x: (x.start, x.end, x.insert)):
        place = (x.function, x.old, x.new)
        result.append(dataclasses.replace(x, occurrence=counts[place], of=total[place]))
        counts[place] += 1
    return result


class _Visitor(ast.NodeVisitor):
    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source, self.found = path, source, []
        self.lines = source.splitlines(keepends=True)
        self.starts = [0]
        for line in self.lines:
            self.starts.append(self.starts[-1] + len(line))
        self.names: list[str] = []

    def _span(self, node: ast.AST) -> tuple[int, int]:
        start = self.starts[node.lineno - 1] + node.col_offset
        return start, self.starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.AST) -> str:
        start, end = self._span(node)
        return " ".join(self.source[start:end].decode().split())

    def _add(self, start: int, end: int, new: str, old: str, shown: str) -> None:
        line = self.source.count(b"\n", 0, start) + 1
        text = self.lines[line - 1].decode().strip()
        self.found.append(
            Mutant(self.path, ".".join(self.names), line, text, old, shown, 0, start, end, new.encode())
        )

    def _between(self, left: ast.AST, right: ast.AST, old: str, new: str, whole: ast.AST) -> None:
        """Replace the operator ``old`` between two operands."""
        start, end = self._span(left)[1], self._span(right)[0]
        pattern = r"\s+".join(map(re.escape, old.split()))
        pattern = rf"\b{pattern}\b" if old.isidentifier() or " " in old else pattern
        match = re.search(pattern.encode(), self.source[start:end])
        text = self._text(whole)
        self._add(start + match.start(), start + match.end(), new, f"{old} in {text}", new)

    def _wrapped(self, node: ast.AST, new: str) -> None:
        """Replace a whole expression."""
        start, end = self._span(node)
        self._add(start, end, new, self._text(node), " ".join(new.split()))

    # scopes ---------------------------------------------------------------------------------------------------------

    def _scope(self, node) -> None:
        self.names.append(node.name)
        self.generic_visit(node)
        self.names.pop()

    def visit_FunctionDef(self, node):
        names = {x.attr if isinstance(x, ast.Attribute) else getattr(x, "id", "") for x in node.decorator_list}
        if "overload" not in names:
            node.decorator_list, node.returns = [], None
            self._scope(node)

    def visit_ClassDef(self, node):
        node.decorator_list = []
        self._scope(node)

    def visit_arg(self, node):
        pass  # its annotation

    def visit_AnnAssign(self, node):
        if node.value is not None:
            self.visit(node.value)

    def visit_Assign(self, node):
        if not any(isinstance(x, ast.Name) and x.id == "__all__" for x in node.targets):
            self.generic_visit(node)

    def visit_Raise(self, node):
        pass

    visit_Assert = visit_JoinedStr = visit_Raise

    def visit_keyword(self, node):
        if node.arg not in QUIET:
            self.generic_visit(node)

    # faults ---------------------------------------------------------------------------------------------------------

    def _condition(self, test: ast.AST) -> None:
        """A condition is turned, unless another fault turns it."""
        if "TYPE_CHECKING" in ast.dump(test):
            return
        turned = isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)
        if isinstance(test, ast.Compare) and len(test.ops) == 1:
            turned = isinstance(test.ops[0], ast.Eq | ast.NotEq | ast.Is | ast.IsNot | ast.In | ast.NotIn)
        if not turned:
            start, end = self._span(test)
            self._wrapped(test, f"(not ({self.source[start:end].decode()}))")

    def visit_If(self, node):
        self._condition(node.test)
        if "TYPE_CHECKING" not in ast.dump(node.test):
            self.generic_visit(node)

    def visit_IfExp(self, node):
        self._condition(node.test)
        self.generic_visit(node)

    visit_While = visit_IfExp

    def visit_comprehension(self, node):
        for test in node.ifs:
            self._condition(test)
        self.generic_visit(node)

    def visit_Compare(self, node):
        for left, op, right in zip([node.left, *node.comparators], node.ops, node.comparators, strict=False):
            old, *new = _COMPARISONS[type(op)]
            for x in new:
                self._between(left, right, old, x, node)
        self.generic_visit(node)

    def visit_BoolOp(self, node):
        old, new = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values, node.values[1:], strict=False):
            self._between(left, right, old, new, node)
        self.generic_visit(node)

    def visit_UnaryOp(self, node):
        if isinstance(node.op, ast.Not):
            start, end = self._span(node.operand)
            self._wrapped(node, f"({self.source[start:end].decode()})")
        self.generic_visit(node)

    def visit_BinOp(self, node):
        texts = any(isinstance(x, ast.JoinedStr) or isinstance(getattr(x, "value", None), str | bytes)
                    for x in (node.left, node.right))  # fmt: skip
        if type(node.op) in _ARITHMETIC and not texts:
            self._between(node.left, node.right, *_ARITHMETIC[type(node.op)], node)
        self.generic_visit(node)

    def visit_AugAssign(self, node):
        if type(node.op) in _ARITHMETIC:
            old, new = _ARITHMETIC[type(node.op)]
            self._between(node.target, node.value, f"{old}=", f"{new}=", node)
        self.generic_visit(node)

    def visit_Constant(self, node):
        start, end = self._span(node)
        if isinstance(node.value, bool):
            new = [str(not node.value)]
        elif isinstance(node.value, int):
            new = [str(node.value + 1), f"({node.value - 1})"]
        else:
            return
        line = self.lines[node.lineno - 1].decode().strip()
        for x in new:
            self._add(start, end, x, f"{self._text(node)} in {line}", x)

    def visit_Return(self, node):
        empty = isinstance(node.value, ast.Constant) and node.value.value in (None, True, False)
        if node.value is not None and not empty:
            self._wrapped(node.value, "None")
        if node.value is not None:
            self.generic_visit(node)
