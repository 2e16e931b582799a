# SPDX-License-Identifier: Apache-2.0
"""A skip for want of a tool that the machine has is a failure."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from . import skips


@pytest.fixture
def machine(monkeypatch):
    """A function that gives the machine these commands and no others."""

    def has(*commands: str) -> None:
        monkeypatch.setattr(shutil, "which", lambda name: name if name in commands else None)

    return has


@pytest.mark.parametrize(
    ("commands", "tools", "skipped"),
    [
        ((), ("nvcc",), True),
        (("nvcc",), ("nvcc",), False),
        (("g++", "cmake"), ("g++", "cmake", "ninja"), True),
        (("g++", "cmake", "ninja"), ("g++", "cmake", "ninja"), False),
        (("g++",), ("c++",), False),
        (("c++",), ("g++",), True),
        (("qemu-aarch64-static",), ("qemu-aarch64",), False),
    ],
)
def test_needs_skips_unless_every_tool_is_there(machine, commands, tools, skipped):
    machine(*commands)
    mark = skips.needs(*tools).mark
    assert mark.name == "skipif"
    assert mark.args == (skipped,)
    assert mark.kwargs == {"reason": f"needs {', '.join(tools)}"}
    assert skips.unjustified([mark.kwargs["reason"]]) == ([] if skipped else [mark.kwargs["reason"]])


def test_needs_refuses_a_tool_that_the_check_does_not_know():
    with pytest.raises(KeyError, match="make"):
        skips.needs("g++", "make")


def test_a_tool_outside_of_path_is_there(machine):
    machine("/usr/local/cuda/bin/nvcc")
    assert skips.needs("nvcc").mark.args == (True,)
    assert skips.unjustified(["needs nvcc", "needs nvcc, cmake"]) == ["needs nvcc"]


def test_other_reasons_are_justified(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: name)
    others = ["needs a processor with AMX", "needs pip install '.[docs]'", "Triton compiles nothing there", "g++"]
    assert skips.unjustified([*others, "could not import 'sphinx': No module named 'sphinx'"]) == []


@pytest.mark.parametrize("there", [False, True])
def test_a_skip_for_want_of_triton_is_justified_only_without_it(monkeypatch, there):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if there and name == "triton" else None)
    texts = [f"could not import {name!r}: No module named {name!r}" for name in ("triton", "triton.testing", "trl")]
    assert skips.unjustified(texts) == (texts[:2] if there else [])


def test_tests_name_their_tools_with_needs():
    """A condition on a tool that is written by hand has a reason that the check cannot read."""
    names = "|".join(map(re.escape, skips.TOOLS))
    by_hand = re.compile(rf"(?:skipif|pytest\.skip)\([^\n]*\n?[^\n]*(?:shutil\.which|needs (?:{names})(?![\w+]))")
    assert by_hand.search('pytest.skip("needs g++ and cmake")'), "the pattern finds nothing"
    for path in Path(__file__).parent.rglob("*.py"):
        if path.name not in ("skips.py", "test_skips.py"):
            found = by_hand.search(path.read_text())
            assert found is None, f"{path}: use skips.needs instead of {found[0]!r}"
