# SPDX-License-Identifier: Apache-2.0
"""The AMX kernels on processors without AMX: tiles in memory stand in for the instructions."""

from __future__ import annotations

import pytest
import torch

from peftkern import native
from peftkern.testing.cases import Shape

from .. import skips
from .calls import Recorder, write_calls
from .program import attempt, build, mutated, run

pytestmark = [
    pytest.mark.slow,
    skips.needs("g++", "cmake", "ninja"),
    pytest.mark.skipif("avx512_bf16" not in native.cpu.available_isas(), reason="needs a processor with AVX512-BF16"),
]
OPTIONS = ("-DPEFTKERN_EMULATED_TILES=ON", "-DPEFTKERN_SANITIZE=address")


def test_every_feature(tmp_path):
    """Also under the address sanitizer, which the stand-in asks as the instructions' wrappers do."""
    calls = tmp_path / "calls"
    write_calls(calls)
    program = build(tmp_path / "build", *OPTIONS)
    printed = run(program, calls, "amx_bf16", "1", "2")
    assert " passed, 0 failed" in printed
    assert not printed.startswith("0 passed"), "no call was replayed: the build lacks amx_bf16"


def test_a_planted_tile_out_of_bounds_is_caught(tmp_path):
    source = mutated(tmp_path / "source", "tile-read-past-its-end")
    program = build(tmp_path / "build", *OPTIONS, source=source)
    recorder = Recorder()
    recorder.attention("planted", Shape(S=130, P=3, D=64), torch.bfloat16, {}, backward=False)
    recorder.write(tmp_path / "calls")
    done = attempt(program, tmp_path / "calls", "amx_bf16", "2")
    assert done.returncode != 0, "the planted access went unseen"
    assert "use-after-poison" in done.stdout, done.stdout
