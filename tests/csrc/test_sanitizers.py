# SPDX-License-Identifier: Apache-2.0
"""The CPU library under the address, undefined-behaviour and thread sanitizers: every feature, both directions."""

from __future__ import annotations

import pytest
import torch

from peftkern import native
from peftkern.testing.cases import Shape

from .. import skips
from ..faults import check_markers
from .calls import Recorder, write_calls
from .program import FAULTS, attempt, build, cpu_sources, mutated, run

pytestmark = skips.needs("g++", "cmake", "ninja")


def test_every_fault_has_a_marker_and_every_marker_a_fault():
    check_markers(cpu_sources(), FAULTS)


@pytest.fixture(scope="module")
def small_set(tmp_path_factory):
    path = tmp_path_factory.mktemp("calls") / "small"
    write_calls(path)
    return path


def test_address_and_undefined_behaviour(small_set, tmp_path):
    program = build(tmp_path, "-DPEFTKERN_SANITIZE=address", "-DPEFTKERN_PORTABLE_ONLY=ON")
    assert " passed, 0 failed" in run(program, small_set, "all", "2", "3")


def test_threads(small_set, tmp_path):
    program = build(tmp_path, "-DPEFTKERN_SANITIZE=thread", "-DPEFTKERN_PORTABLE_ONLY=ON")
    assert " passed, 0 failed" in run(program, small_set, "all", "2", "3")


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_everything(sanitizer, tmp_path):
    """On every instruction set that this processor has; their kernels take minutes to compile with a sanitizer."""
    calls = tmp_path / "everything"
    write_calls(calls, everything=True)
    program = build(tmp_path, f"-DPEFTKERN_SANITIZE={sanitizer}")
    assert " passed, 0 failed" in run(program, calls, "all", "1", "2", "3")


def test_planted_accesses_out_of_bounds_are_caught(tmp_path):
    """Behind a tensor's last element, and behind a piece of the scratch memory, which is one allocation."""
    source = mutated(tmp_path / "source", "prompt-read-past-its-end", "rows-cleared-past-their-end")
    program = build(tmp_path / "build", "-DPEFTKERN_SANITIZE=address", "-DPEFTKERN_PORTABLE_ONLY=ON", source=source)
    embedding, attention = Recorder(), Recorder()
    embedding.embedding(torch.float32, bank=False)
    attention.attention("planted", Shape(S=70), torch.float32, {})
    for recorder, report in ((embedding, "heap-buffer-overflow"), (attention, "use-after-poison")):
        recorder.write(tmp_path / "calls")
        done = attempt(program, tmp_path / "calls", "all", "2")
        assert done.returncode != 0, f"the planted {report} went unseen"
        assert report in done.stdout, done.stdout


@pytest.mark.skipif("amx_bf16" not in native.cpu.available_isas(), reason="needs a processor with AMX")
def test_a_planted_tile_out_of_bounds_is_caught(tmp_path):
    """Tiles are loaded by instructions that sanitizers do not see, so the kernels ask them."""
    source = mutated(tmp_path / "source", "tile-read-past-its-end")
    program = build(tmp_path / "build", "-DPEFTKERN_SANITIZE=address", source=source)
    recorder = Recorder()
    recorder.attention("planted", Shape(S=130, P=3, D=64), torch.bfloat16, {}, backward=False)
    recorder.write(tmp_path / "calls")
    done = attempt(program, tmp_path / "calls", "amx_bf16", "2")
    assert done.returncode != 0
    assert "use-after-poison" in done.stdout, done.stdout


@pytest.mark.parametrize(
    "race", ["prefix-read-before-it-is-packed", pytest.param("partial-sums-read-early", marks=pytest.mark.slow)]
)
def test_a_planted_race_is_caught(race, tmp_path):
    """A barrier is missing. The results are often right all the same."""
    source = mutated(tmp_path / "source", race)
    program = build(tmp_path / "build", "-DPEFTKERN_SANITIZE=thread", "-DPEFTKERN_PORTABLE_ONLY=ON", source=source)
    recorder = Recorder()
    recorder.attention("planted", Shape(B=3, Hq=4, Hkv=2, S=37, P=50, D=20), torch.float32, {})
    recorder.write(tmp_path / "calls")
    done = attempt(program, tmp_path / "calls", "all", "2")
    assert "ThreadSanitizer: data race" in done.stdout, f"unseen: {race}"
    assert done.returncode != 0
