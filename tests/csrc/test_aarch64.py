# SPDX-License-Identifier: Apache-2.0
"""The portable path on 64-bit Arm: built by a cross compiler, run by qemu, judged by the reference's answers."""

from __future__ import annotations

import shutil

import pytest

from .calls import write_calls
from .program import build, run

COMPILER = "aarch64-linux-gnu-g++"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs {COMPILER} (Debian: g++-aarch64-linux-gnu)")
def test_builds_and_gives_the_references_answers(tmp_path):
    write_calls(tmp_path / "calls")
    program = build(
        tmp_path / "build", "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DCMAKE_CXX_FLAGS=-Werror",
    )  # fmt: skip
    emulator = next(filter(None, map(shutil.which, ("qemu-aarch64", "qemu-aarch64-static"))), None)
    if emulator is None:
        return  # that it builds, without a warning, is shown
    printed = run(emulator, "-L", "/usr/aarch64-linux-gnu", program, tmp_path / "calls", "all", "1", "2", "3")
    assert " passed, 0 failed" in printed
