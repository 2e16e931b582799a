# SPDX-License-Identifier: Apache-2.0
"""Skipped tests by reason, and those that were skipped for want of a tool that this machine has."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable

#: What a reason may ask for, and whether this machine has it.
TOOLS: dict[str, Callable[[], bool]] = {
    r"\bnvcc\b": lambda: any(shutil.which(path) for path in ("nvcc", "/usr/local/cuda/bin/nvcc")),
    r"\bgcc\b|C compiler|\bc\+\+": lambda: any(shutil.which(name) for name in ("cc", "gcc", "g++", "c++")),
    r"aarch64-linux-gnu-g\+\+": lambda: shutil.which("aarch64-linux-gnu-g++") is not None,
    r"Triton|interpreter": lambda: importlib.util.find_spec("triton") is not None,
    r"PTX emulator": lambda: shutil.which("g++") is not None,
}


def reasons(reports: Iterable) -> Counter[str]:
    """How many tests were skipped for each reason, given pytest's reports of skipped tests."""
    texts = (report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr) for report in reports)
    return Counter(text.removeprefix("Skipped: ") for text in texts)


def unjustified(reasons: Iterable[str]) -> list[str]:
    """The reasons that name a tool which this machine has."""
    return [text for text in reasons if any(re.search(tool, text) and there() for tool, there in TOOLS.items())]
