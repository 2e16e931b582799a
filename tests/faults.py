# SPDX-License-Identifier: Apache-2.0
"""Plants faults in source code, at marker comments.

A line that a test breaks on purpose has a marker, ``// FAULT: <id>`` in C++ and ``# FAULT: <id>`` in Python, at its
end or alone on the line above it. A test edits only the marked line. So renames elsewhere do not affect the test, and
whoever edits the line sees that a test depends on it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

__all__ = ["check_markers", "markers", "plant", "read"]

_MARKER = re.compile(r"(?://|#) FAULT: ([a-z0-9-]+)$")


def read(folder: Path, *suffixes: str) -> dict[str, str]:
    """The texts of all files below ``folder`` with one of ``suffixes``, by their paths below it."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix in suffixes)
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


def markers(texts: Mapping[str, str]) -> dict[str, tuple[str, int]]:
    """The file and the line index that each fault edits, by the fault's id.

    Raises:
        AssertionError: a marker stands twice.
    """
    found: dict[str, tuple[str, int]] = {}
    for name, text in texts.items():
        for i, line in enumerate(text.splitlines()):
            if marker := _MARKER.search(line):
                assert marker[1] not in found, f"the marker FAULT: {marker[1]} stands twice, last in {name}:{i + 1}"
                alone = not line[: marker.start()].strip()
                found[marker[1]] = (name, i + 1 if alone else i)
    return found


def plant(texts: Mapping[str, str], fault: str, right: str, wrong: str) -> dict[str, str]:
    """``texts`` with ``right`` replaced by ``wrong`` in the line that is marked with ``fault``.

    Raises:
        AssertionError: no line is marked so, or the line does not contain ``right`` exactly once.
    """
    places = markers(texts)
    assert fault in places, f"no line is marked FAULT: {fault}"
    name, i = places[fault]
    lines = texts[name].splitlines(keepends=True)
    code = _MARKER.sub("", lines[i].rstrip("\n"))
    assert code.count(right) == 1, f"{name}:{i + 1}, marked FAULT: {fault}, does not contain {right!r} once: {code!r}"
    lines[i] = code.replace(right, wrong).rstrip() + "\n"
    return {**texts, name: "".join(lines)}


def check_markers(texts: Mapping[str, str], faults: Iterable[str]) -> None:
    """Every fault has a marker in ``texts``, and every marker there has a fault."""
    marked, tested = set(markers(texts)), set(faults)
    assert marked == tested, f"marked but not tested: {marked - tested}; tested but not marked: {tested - marked}"
