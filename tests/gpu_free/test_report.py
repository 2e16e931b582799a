# SPDX-License-Identifier: Apache-2.0
"""The report runs from the command line, and its formulas hold."""

from __future__ import annotations

import csv
import subprocess
import sys

import pytest

from .report import minimum_bytes, resident_warps


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "num_warps", "expected"),
    [
        ("sm_80", 32, 0, 4, 64),  # as many warps as there can be
        ("sm_80", 255, 0, 8, 8),  # registers: 256 x 256 are all there are
        ("sm_86", 64, 49152, 4, 8),  # shared memory: two blocks
        ("sm_90", 168, 65536, 4, 12),
        ("gfx942", 256, 16384, 4, 8),  # 512 registers for each lane of four SIMDs
        ("gfx942", 64, 32768, 4, 8),
    ],
)
def test_resident_warps(arch, registers, shared, num_warps, expected):
    assert resident_warps(arch, registers, shared, num_warps) == expected


def test_minimum_bytes_of_the_forward():
    """q, out [1, 4, 256, 64], k, v [1, 2, 256, 64] and the prefix [2, 64, 64] in bf16, lse [1, 4, 256] in fp32."""
    assert minimum_bytes("fwd", 64) == 2 * 64 * (2 * 4 * 256 + 2 * 2 * 256 + 2 * 2 * 64) + 4 * 4 * 256


def test_the_command_writes_a_table_and_a_csv(tmp_path):
    file = tmp_path / "report.csv"
    command = [sys.executable, "-m", "tests.gpu_free.report", "--archs", "sm_80", "--head-dims", "32", "--kernels"]
    done = subprocess.run([*command, "fwd", "decode_prefix", "--csv", file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["kernel"]: row for row in csv.DictReader(file.open())}
    assert set(rows) == {"fwd", "decode_prefix"}
    assert "HMMA" in rows["fwd"]["tensor cores"]
    assert 1.0 <= float(rows["fwd"]["bytes / min"]) < 4.0
    assert 1.0 <= float(rows["decode_prefix"]["bytes / min"]) < 2.0
    assert "not measured" in done.stdout
    assert "decode_prefix" in done.stdout
