# SPDX-License-Identifier: Apache-2.0
"""Files of at most 450 lines and functions of at most 60 in the package, the kernels and the benchmarks."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILE, MAX_FUNCTION = 450, 60
SOURCES = sorted(
    path
    for folder, suffixes in (("peftkern", ".py"), ("benchmarks", ".py"), ("csrc", ".h .cpp .cu .cuh"))
    for path in (ROOT / folder).rglob("*")
    if path.suffix in suffixes.split()
)
#: What may be longer, and why.
EXCEPTIONS = {
    "csrc/cuda/kernels/prefix_forward.cuh:prefix_forward": "split into functions, its registers spill at head dim 96",
}


def _name(path: Path, function: str = "") -> str:
    return f"{path.relative_to(ROOT)}" + (f":{function}" if function else "")


def _python_functions(text: str) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, lines


_NO_FUNCTION = re.compile(r"\b(namespace|struct|class|enum|union|extern|if|for|while|switch|do|else|catch)\b|=\s*$")


def _cpp_functions(text: str) -> Iterator[tuple[str, int]]:
    """Blocks in braces whose head has a parameter list, outside of other functions."""
    blank = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|^[ \t]*#(?:[^\n\\]|\\.|\\\n)*', re.S | re.M)
    text = blank.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    head, parentheses, blocks = 0, 0, []  # the current statement's start; (is a function, name, line) of open braces
    for match in re.finditer(r"[{};()]", text):
        parentheses += {"(": 1, ")": -1}.get(match[0], 0)
        if match[0] in "()" or (match[0] == ";" and parentheses):
            continue
        before = re.sub(r"\btemplate\s*<[^{;]*?>\s*(?=[\w\[])", "", text[head : match.start()])
        if match[0] == "{":
            inside = any(is_function for is_function, _, _ in blocks)
            signature = re.sub(r"^\s*\w+_KERNEL\(.*?\)\s*(?=\w+\()", "", before, flags=re.S)
            named = re.findall(r"([\w~]+)\s*\(", signature)
            is_function = not inside and bool(named) and not _NO_FUNCTION.search(before.partition("(")[0])
            name = named[0] if named else ""
            start = text.count("\n", 0, head + text[head : match.start()].find(f"{name}("))  # not a template's line
            blocks.append((is_function, name, start))
        elif match[0] == "}" and blocks:
            is_function, name, start = blocks.pop()
            if is_function:
                yield name, text.count("\n", 0, match.end()) - start + 1
        head = match.end()


def _functions(path: Path) -> Iterator[tuple[str, int]]:
    return (_python_functions if path.suffix == ".py" else _cpp_functions)(path.read_text())


def test_files_are_short():
    long = {_name(path): len(path.read_text().splitlines()) for path in SOURCES}
    long = {name: lines for name, lines in long.items() if lines > MAX_FILE and name not in EXCEPTIONS}
    assert not long, f"files of more than {MAX_FILE} lines: {long}"


def test_functions_are_short():
    long = {_name(path, name): lines for path in SOURCES for name, lines in _functions(path) if lines > MAX_FUNCTION}
    long = {name: lines for name, lines in long.items() if name not in EXCEPTIONS}
    assert not long, f"functions of more than {MAX_FUNCTION} lines: {long}"


def test_every_exception_is_needed():
    names = {_name(path) for path in SOURCES if len(path.read_text().splitlines()) > MAX_FILE}
    names |= {_name(path, name) for path in SOURCES for name, lines in _functions(path) if lines > MAX_FUNCTION}
    assert set(EXCEPTIONS) <= names, f"no longer too long: {set(EXCEPTIONS) - names}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("namespace a {\ntemplate <typename T>\nint f(int x) {\n  if (x) {\n    return 1;\n  }\n  return 0;\n}\n}\n",
         [("f", 6)]),
        ("struct A {\n  A() : x(0) {}\n  int x = 3;  // {\n};\nenum { B, C };\nint table[] = {1, 2};\n", [("A", 1)]),
        ("template <class T>\nKERNEL(1, 2)\nvoid h(T x) {\n  for (int i = 0; i < 3; i++) {\n  }\n}\n",
         [("KERNEL", 5)]),
        ("#define M(x) \\\n  { x }\nvoid g() {\n  auto f = [&](int i) { return i; };\n}\n", [("g", 3)]),
    ],
)  # fmt: skip
def test_functions_of_cpp_are_found(text, expected):
    assert list(_cpp_functions(text)) == expected
