# SPDX-License-Identifier: Apache-2.0
"""Two builds of the CPU library are compared: their results, and which one is slower."""

from __future__ import annotations

import math
import shutil
import time

import pandas as pd
import pytest
import torch

import peftkern
from benchmarks import alternation, compare_builds, native_calls
from peftkern import native
from peftkern.tools.bench.providers import Problem
from peftkern.tools.bench.shapes import Shape

pytestmark = pytest.mark.skipif(bool(native.cpu.MISSING), reason=native.cpu.MISSING)


@pytest.fixture
def builds(tmp_path):
    """The options that name the package's library and a copy of it."""
    copy = tmp_path / "candidate.so"
    shutil.copy(native.cpu._PATH, copy)
    return ["--baseline", str(native.cpu._PATH), "--candidate", str(copy), "--threads", "1", "--seconds", "0"]


QUICK = ["--shapes", "quick", "--at-least", "2"]


def test_a_build_equals_itself(builds, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    compare_builds.main([*builds, *QUICK, "--isas", "all", "--equal", "--peft", "--output", str(path)])
    rows = pd.read_csv(path)
    assert len(rows) == 2 * 3 * 2 * len(native.cpu.available_isas())
    assert rows["equal"].all()
    assert not rows["slower"].any(), "two rounds have no interval"
    assert (rows[["baseline_ms", "candidate_ms", "peft_ms", "ratio", "over_peft"]] > 0).all(axis=None)
    assert "over PEFT" in capsys.readouterr().out


def test_the_calls_are_those_of_the_package():
    problem = Problem.make(Shape(2, 4, 2, 9, 16, 5, cached=3), torch.float32)
    packed, library = native_calls.pack(problem, "auto", 1), native_calls.Library(native.cpu._PATH)
    leaves = [x.detach().requires_grad_() for x in problem.inputs]
    out = peftkern.prefix_attention(*leaves, backend="cpu")
    gradients = torch.autograd.grad(out, leaves, problem.dout)
    for direction, expected in (("forward", [out]), ("backward", gradients)):
        found = compare_builds.results(library, packed, direction)
        for mine, theirs in zip(found.values(), expected, strict=False):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("wanted", [["--equal"], []])
def test_a_result_that_differs_is_said_so(builds, monkeypatch, wanted):
    run = native_calls.Library.run

    def altered(self, direction, struct):
        run(self, direction, struct)
        if self.path.name == "candidate.so" and direction == "backward":
            packed.results["backward"]["dprefix_k"].view(-1)[0] += 1

    def remember(*arguments):
        nonlocal packed
        packed = native_calls.pack(*arguments)
        return packed

    packed = None
    monkeypatch.setattr(native_calls.Library, "run", altered)
    monkeypatch.setattr(compare_builds, "pack", remember)
    arguments = [*builds, *QUICK, "--dtypes", "fp32", *wanted]
    if wanted:
        with pytest.raises(SystemExit, match="1"):
            compare_builds.main(arguments)
        return
    for row in compare_builds.main(arguments):
        assert row["equal"] == (row["direction"] == "forward")
        assert (row["differs"] > 1e-3) == (row["direction"] == "backward")


def test_a_slower_candidate_is_said_so(builds, monkeypatch, capsys):
    run = native_calls.Library.run

    def slow(self, direction, struct):
        run(self, direction, struct)
        time.sleep(0.05 if self.path.name == "candidate.so" else 0.0)

    monkeypatch.setattr(native_calls.Library, "run", slow)
    monkeypatch.setattr(compare_builds, "LISTS", {"quick": [Shape(1, 2, 2, 5, 8, 3)], "training": [], "others": []})
    monkeypatch.setattr(alternation, "LEAST_SECONDS", 0.0)
    with pytest.raises(SystemExit, match="1"):
        compare_builds.main([*builds, "--shapes", "quick", "--dtypes", "fp32", "--at-least", "6"])
    assert capsys.readouterr().out.count("SLOWER") == 2


def test_interval_of_the_median():
    assert alternation.interval([3, 1, 2]) == (0, math.inf)
    assert alternation.interval([6, 1, 5, 2, 4, 3]) == (
        1,
        6,
    )  # 1 - 2 / 2**6 = 97% between the least and the greatest
    assert alternation.interval(range(1, 10)) == (2, 8)  # 1 - 2 * (1 + 9) / 2**9 = 96%


def test_equal_means_the_same_bits():
    one, zero = torch.ones(2), torch.zeros(2)
    assert compare_builds.difference({"x": one}, {"x": one.clone()}) == 0
    assert compare_builds.difference({"x": one}, {"x": one + 0.25}) == 0.25
    assert compare_builds.difference({"x": zero}, {"x": -zero}) > 0
    assert math.isnan(compare_builds.difference({"x": one}, {"x": one * math.nan}))


def test_unsuitable_files_and_instruction_sets_are_refused(builds, tmp_path, capsys):
    (tmp_path / "text.so").write_text("not a library")
    for name, message in (
        ("missing.so", "missing.so: expected a CPU library (libpeftkern_cpu.so), got no file"),
        ("text.so", "text.so: expected a CPU library with ABI"),
    ):
        with pytest.raises(SystemExit, match="2"):
            compare_builds.main([*builds, "--candidate", str(tmp_path / name)])
        assert message in " ".join(capsys.readouterr().err.split())
    missing = set(native.cpu.ISAS) - {"auto", *native.cpu.available_isas()}
    for isa in missing:
        with pytest.raises(SystemExit, match="2"):
            compare_builds.main([*builds, "--isas", isa])
        assert f"which both builds have, got {isa}" in capsys.readouterr().err
