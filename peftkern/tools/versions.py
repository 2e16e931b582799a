# SPDX-License-Identifier: Apache-2.0
"""Versions that the test suite has run with: the source for pyproject.toml, ``peftkern doctor`` and the docs."""

from __future__ import annotations

import re

__all__ = ["TESTED", "is_tested", "sentence", "tested_range"]

#: Lowest and highest tested version, both inclusive. The lowest is the lower bound in pyproject.toml.
TESTED = {
    "Python": ("3.11", "3.13"),
    "torch": ("2.11", "2.15"),
    "transformers": ("5.20", "5.24"),
    "peft": ("0.21", "0.21"),
}


def is_tested(name: str, version: str) -> bool:
    """Whether ``version`` lies in the tested range of ``name``. Only major and minor numbers count.

    >>> is_tested("torch", "2.14.1+cpu"), is_tested("torch", "2.16.0")
    (True, False)
    """
    lowest, highest = map(_release, TESTED[name])
    return lowest <= _release(version) <= highest


def _release(version: str) -> tuple[int, ...]:
    """Major and minor number."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def tested_range(name: str) -> str:
    """The tested range in words: ``2.11 to 2.15``."""
    return " to ".join(dict.fromkeys(TESTED[name]))


def sentence() -> str:
    """All tested ranges: ``Python 3.11 to 3.13, torch 2.11 to 2.15, ...``."""
    return ", ".join(f"{name} {tested_range(name)}" for name in TESTED)
