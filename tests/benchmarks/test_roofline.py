# SPDX-License-Identifier: Apache-2.0
"""The roofline: its counts, its loops, and that it runs at tiny sizes. Its times are not tested."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from benchmarks import peak, plot, readme_tables, roofline
from peftkern import native
from peftkern.tools.bench.providers import Problem, visible_keys
from peftkern.tools.bench.shapes import Shape

pytestmark = pytest.mark.skipif(bool(native.cpu.MISSING), reason=native.cpu.MISSING)


@pytest.fixture(scope="module")
def peaks(tmp_path_factory):
    """The loops of every instruction set of this processor."""
    folder = tmp_path_factory.mktemp("peaks")
    return {isa: peak.compile_peak(isa, folder) for isa in native.cpu.available_isas()}


COUNTED = [Shape(2, 4, 2, 13, 16, 5), Shape(1, 2, 1, 7, 8, 0, cached=6), Shape(3, 2, 2, 20, 8, 3, window=9)]


@pytest.mark.parametrize("shape", [*COUNTED, *roofline.SHAPES], ids=str)
def test_operations_are_those_of_visible_keys(shape):
    pairs = int(visible_keys(shape, torch.device("cpu")).sum())  # the mask, counted
    rows = shape.B * shape.Hq
    assert shape.flops("forward") == rows * pairs * shape.D * 2 * 2, "two products, two operations per multiply-add"
    assert shape.flops("backward") == rows * pairs * shape.D * 2 * 5, "five products"


def test_operations_agree_with_a_count_of_every_product():
    shape = Shape(2, 2, 1, 5, 4, 3)
    forward = backward = 0
    for _row, query in ((row, query) for row in range(shape.B * shape.Hq) for query in range(shape.S)):
        for key in range(shape.P + shape.S):
            if key < shape.P or key - shape.P <= query:
                forward += 2 * shape.D + 2 * shape.D  # q k; p v
                backward += 2 * 2 * shape.D + 3 * 2 * shape.D  # q k, dout v; dq, dk, dv
    assert (shape.flops("forward"), shape.flops("backward")) == (forward, backward)


def test_bytes_are_those_of_the_tensors():
    for shape in COUNTED[:2]:
        problem = Problem.make(shape, torch.bfloat16)
        given, dout = sum(x.nbytes for x in problem.inputs), problem.dout.nbytes
        assert shape.bytes("forward", 2) == given + dout, "out is as large as dout"
        assert shape.bytes("backward", 2) == 2 * (given + dout), "and their gradients"


@pytest.mark.parametrize("threads", [1, 2])
def test_the_loops_make_every_step(peaks, threads):
    for isa, found in peaks.items():
        lanes, sums = peak.LANES[isa], 12
        for steps in (0, 1, 5):
            values = [2 - (1 - i) * 0.5**steps for i in range(sums)]  # from i + 1 by x = x / 2 + 1
            assert found.run("floats", steps, threads) == threads * lanes * sum(values)
        assert found.operations("floats") == 2 * lanes * sums
        if found.operations("pairs"):
            assert found.operations("pairs") == 4 * lanes * sums
            assert found.run("pairs", 7, threads) == threads * lanes * sum(i + 1 + 2 * 7 for i in range(sums))
        if found.operations("tiles"):
            assert found.operations("tiles") == 4 * 2 * 16 * 16 * 32
            assert found.run("tiles", 7, threads) == threads * 4 * 32 * 7


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_reading_and_copying_touch_everything(peaks, threads):
    data = torch.arange(1003, dtype=torch.float32)
    for found in peaks.values():
        assert found.read(data, threads) == data.sum()
        copy = torch.empty_like(data)
        found.copy(copy, data, threads)
        assert torch.equal(copy, data)


def test_flags_are_those_of_the_kernels():
    assert "-mavx512bf16" in peak.flags_of("amx_bf16")
    assert "-mfma" in peak.flags_of("avx512"), "flags that the file refers to are resolved"
    assert {"-ffp-contract=fast", "-fno-math-errno"} <= set(peak.flags_of("portable"))
    assert not [flag for flag in peak.flags_of("portable") if flag.startswith("-m")]


def test_each_peak_is_of_the_instruction_that_the_kernels_use(peaks):
    for isa, found in peaks.items():
        for dtype in ("fp32", "bf16"):
            assert found.operations(peak.kind_of(isa, dtype)) > 0
        assert bool(found.operations("pairs")) == (isa in ("avx512_bf16", "amx_bf16"))
    assert peak.kind_of("amx_bf16", "bf16") == "tiles"
    assert peak.kind_of("avx2", "bf16") == "floats"


def test_rows_are_measured_written_drawn_and_put_into_the_table(tmp_path, monkeypatch, capsys):
    path = tmp_path / "roofline.csv"
    found = roofline.main(["--quick", "--output", str(path), "--plot"])
    rows = pd.read_csv(path)
    own = [(isa, dtype) for isa in native.cpu.available_isas() for dtype in ("fp32", "bf16")]
    own = [pair for pair in own if roofline.has_own_kernels(*pair)]
    assert len(rows) == len(found) == len(own) * 2 * 2
    positive = ["gflop", "mb", "intensity", "ms", "peak_gflop_s", "read_gb_s", "copy_gb_s", "roof_gflop_s", "share"]
    assert (rows[positive] > 0).all(axis=None)
    assert set(rows) >= {"cpu", "cores", "threads", "torch", "peftkern", "git", "date", "peak_spread"}
    assert rows["intensity"].to_numpy() == pytest.approx((rows["gflop"] * 1e3 / rows["mb"]).to_numpy(), rel=1e-3)
    assert path.with_suffix(".svg").stat().st_size > 1000
    assert list(plot.figures_of(path)) == [""]
    assert "of peak" in capsys.readouterr().out
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    table = readme_tables.roofline().splitlines()
    assert len(table) == 2 + len(own) * 2
    assert len({line.count("|") for line in table}) == 1


def test_without_results_the_table_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    assert readme_tables.roofline() == readme_tables.NOT_RECORDED


def test_without_a_compiler_it_says_what_is_missing(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SystemExit, match=r"expected c\+\+ or g\+\+ or clang\+\+ on the PATH, found none"):
        roofline.main(["--quick"])


def test_what_does_not_compile_is_shown(monkeypatch, tmp_path):
    wrong = tmp_path / "peak.cpp"
    wrong.write_text("int main( {")
    monkeypatch.setattr(peak, "SOURCE", wrong)
    with pytest.raises(RuntimeError, match=r"peak.cpp does not compile for portable:\n.*\n.*error"):
        peak.compile_peak("portable", tmp_path)
