# SPDX-License-Identifier: Apache-2.0
"""The portable path on 64-bit Arm: built by a cross compiler, run by qemu, judged by the reference's answers."""

from __future__ import annotations

import pytest

from .. import skips
from .calls import write_calls
from .program import build, run

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
needs_compiler = skips.needs(COMPILER, "cmake", "ninja")


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    return build(
        tmp_path_factory.mktemp("aarch64"), "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}", "-DCMAKE_CXX_FLAGS=-Werror",
    )  # fmt: skip


@pytest.mark.slow
@needs_compiler
def test_builds_without_a_warning(program):
    assert program.exists()


@pytest.mark.slow
@needs_compiler
@skips.needs(EMULATOR)
def test_gives_the_references_answers(program, tmp_path):
    write_calls(tmp_path / "calls")
    emulator = skips.command(EMULATOR)
    printed = run(emulator, "-L", "/usr/aarch64-linux-gnu", program, tmp_path / "calls", "all", "1", "2", "3")
    assert " passed, 0 failed" in printed
