# SPDX-License-Identifier: Apache-2.0
"""Tests that need a tool, and a check that none of them was skipped on a machine that has it."""

from __future__ import annotations

import importlib.util
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

#: The commands that serve as each tool, the preferred one first.
TOOLS = {
    "nvcc": ("nvcc",),
    "cc": ("cc", "gcc", "clang"),
    "c++": ("c++", "g++", "clang++"),
    "g++": ("g++",),
    "cmake": ("cmake",),
    "ninja": ("ninja",),
    "aarch64-linux-gnu-g++": ("aarch64-linux-gnu-g++",),
    "qemu-aarch64": ("qemu-aarch64", "qemu-aarch64-static"),
}
#: Where a tool may lie outside of PATH. A test cannot run it there, but the machine has it.
ELSEWHERE = {"nvcc": ("/usr/local/cuda/bin/nvcc",)}


def command(tool: str) -> str | None:
    """Path of the tool, or None if PATH does not have it."""
    return next(filter(None, map(shutil.which, TOOLS[tool])), None)


def needs(*tools: str) -> pytest.MarkDecorator:
    """Skips a test unless PATH has all of ``tools``, which are keys of :data:`TOOLS`."""
    missing = [tool for tool in tools if command(tool) is None]
    return pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(tools)}")


def source(file: str) -> Path | None:
    """A source file of an installed package, which may not import here."""
    return next((path for path in (Path(folder, file) for folder in sys.path) if path.is_file()), None)


def needs_source(distribution: str, file: str) -> pytest.MarkDecorator:
    """Skips a test unless :func:`source` finds ``file``, which ``distribution`` installs."""
    return pytest.mark.skipif(source(file) is None, reason=f"needs the package {distribution}")


def reasons(reports: Iterable) -> Counter[str]:
    """How many tests were skipped for each reason, given pytest's reports of skipped tests."""
    texts = (report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr) for report in reports)
    return Counter(text.removeprefix("Skipped: ") for text in texts)


def unjustified(reasons: Iterable[str]) -> list[str]:
    """The reasons of :func:`needs` whose tools this machine has, and those of ``importorskip("triton")`` likewise."""
    return [text for text in reasons if _is_unjustified(text)]


def _is_unjustified(reason: str) -> bool:
    if re.match(r"could not import 'triton\b", reason):
        return importlib.util.find_spec("triton") is not None
    tools = reason.removeprefix("needs ").split(", ")
    if not reason.startswith("needs ") or not TOOLS.keys() >= set(tools):
        return False
    return all(command(tool) or any(map(shutil.which, ELSEWHERE.get(tool, ()))) for tool in tools)
