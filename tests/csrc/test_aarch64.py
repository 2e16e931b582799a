# SPDX-License-Identifier: Apache-2.0
"""The kernels for 64-bit Arm: built by a cross compiler, run by qemu, judged by the reference's answers."""

from __future__ import annotations

import re

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
@pytest.mark.parametrize("isa", ["portable", "sve256", "neon_bf16"])
def test_gives_the_references_answers(program, isa, tmp_path):
    """``portable`` is NEON there."""
    write_calls(tmp_path / "calls")
    processor = ("-cpu", "max,sve256=on,sve-default-vector-length=32", "-L", "/usr/aarch64-linux-gnu")
    printed = run(skips.command(EMULATOR), *processor, program, tmp_path / "calls", isa, "1", "2", "3")
    assert " passed, 0 failed" in printed
    assert not printed.startswith("0 passed"), f"no call was replayed: the build or the processor lacks {isa}"


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(("isa", "instruction"), [("neon_bf16", "bfdot"), ("sve256", r"fml[as]\s+z|fmad\s+z")])
def test_uses_the_instruction_that_it_is_for(program, isa, instruction, tmp_path):
    """The compiler's fallback would give the same answers."""
    (library,) = program.parent.glob("libpeftkern_cpu.*")
    text = run(COMPILER.replace("g++", "objdump"), "-d", "--no-show-raw-insn", "-C", library)
    functions = re.split(r"\n(?=[0-9a-f]+ <)", text)
    found = sum(len(re.findall(instruction, f)) for f in functions if f"peftkern::{isa}::" in f.split("\n", 1)[0])
    assert found > 100, f"{isa} has {found} instructions of {instruction}"
