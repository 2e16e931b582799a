# SPDX-License-Identifier: Apache-2.0
"""csrc/cpu: instruction sets differ in three files, and functions have at most six parameters."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "csrc" / "cpu"
SOURCES = sorted(path for path in FOLDER.rglob("*") if path.suffix in (".h", ".cpp"))
MAX_PARAMETERS = 6
#: Where the preprocessor may ask for a compiler, a processor or a sanitizer.
CONDITIONAL = {"vec.h", "sanitizer.h", "isa.cpp"}

_COMMENT = re.compile(r"//[^\n]*")
_FUNCTION = re.compile(
    r"\b(?!if\b|for\b|while\b|switch\b|catch\b)(\w+)(\((?:[^();{}]|\([^();{}]*\))*\))\s*(?:const\s*)?\{"
)


def _parameters(text: str) -> dict[str, int]:
    """The number of parameters of each function that is defined in a source."""
    found = {}
    for name, parameters in _FUNCTION.findall(_COMMENT.sub("", text)):
        while (flat := re.sub(r"<[^<>]*>|\[[^\[\]]*\]|\([^()]*\)", "", parameters[1:-1])) != parameters[1:-1]:
            parameters = f"({flat})"
        found[name] = flat.count(",") + 1 if flat.strip() else 0
    return found


def test_conditionals_are_in_three_files():
    found = {
        str(path.relative_to(FOLDER))
        for path in SOURCES
        if re.search(r"^#\s*(if|ifdef|elif)\b", path.read_text(), re.M)
    }
    assert found == CONDITIONAL, f"#if in {sorted(found - CONDITIONAL)}; none in {sorted(CONDITIONAL - found)}"


def test_functions_have_few_parameters():
    many = {
        f"{path.relative_to(FOLDER)}:{name}": count
        for path in SOURCES for name, count in _parameters(path.read_text()).items() if count > MAX_PARAMETERS
    }  # fmt: skip
    assert not many, f"functions of more than {MAX_PARAMETERS} parameters: {many}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("int f(int a, const Map<int, int>& b) {\n  if (a) {\n  }\n}\n", {"f": 2}),
        ("void g(float (&c)[kRows][kVectors], F f) const {\n}\nstruct A {\n  int x;\n};\n", {"g": 2}),
        ("static int h() { return 0; }\n", {"h": 0}),
    ],
)
def test_parameters_are_counted(text, expected):
    assert _parameters(text) == expected
