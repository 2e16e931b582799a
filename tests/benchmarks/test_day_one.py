# SPDX-License-Identifier: Apache-2.0
"""The first day on a GPU, rehearsed on a CPU: stages run, planted faults are found, a second run continues."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.day_one import correctness, plan
from benchmarks.day_one.context import Context

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_day_one.py"
NEED_A_GPU = {"correct_cuda_bf16", "cuda_graph"}


def _run(folder, *arguments, cwd):
    """Run the script outside of the checkout with a cache of its own, so that it leaves nothing behind."""
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    environment |= {"XDG_CACHE_HOME": str(folder.parent / "untouched")}
    command = [sys.executable, str(SCRIPT), "--dry-run", "--folder", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cwd, timeout=600, check=False)


def test_dry_run(tmp_path):
    folder = tmp_path / "out"
    done = _run(folder, cwd=tmp_path)
    results = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json") if "rates" not in file.name}
    faults = {name: r["lines"][:8] for name, r in results.items() if r["status"] not in ("ok", "left out")}
    assert not faults, faults
    assert done.returncode == 0, done.stdout + done.stderr
    left_out = {name for name, r in results.items() if r["status"] == "left out"}
    assert left_out - {"build"} == NEED_A_GPU
    text = (folder / "report.md").read_text()
    assert "Dry run" in text
    assert all(f"## {name}: " in text for name in results)
    assert {file.name for file in folder.glob("*.csv")} == {
        "ceilings.csv", "crossovers.csv", "microbenchmarks.csv", "training.csv"
    }  # fmt: skip
    assert (folder / "rates_cpu.json").exists()
    assert not (tmp_path / "untouched" / "peftkern").exists(), "a dry run calibrates the user's machine"

    times = {name: (folder / f"{name}.json").stat().st_mtime_ns for name in results}
    (folder / "ceilings.json").write_text("{")  # as a run leaves it that is stopped by a full disk
    assert _run(folder, cwd=tmp_path).returncode == 0
    changed = {name for name, t in times.items() if (folder / f"{name}.json").stat().st_mtime_ns != t}
    assert changed == {"ceilings"}
    assert json.loads((folder / "ceilings.json").read_text())["status"] == "ok"


@pytest.mark.parametrize("part", [1, 2, 3])
def test_the_checks_of_a_gpu(monkeypatch, tmp_path, part):
    """All features and shapes are right on copies with the same strides, as on another device."""
    monkeypatch.setattr(Context, "device", "cpu:0")
    for dtype, parts in (("bf16", 3), ("fp32", 3)):
        context = Context(tmp_path, dry_run=False, end=math.inf)
        correctness.correct(context, "reference", dtype, part, parts)
        assert re.fullmatch(r"\d+ calls right, 0 refused", context.lines[0])


def test_the_parts_are_the_whole():
    names = [name for group in plan.GROUPS for name in group]
    assert len(set(names)) == len(names)
    parts = {re.sub(r"\dof", "", name) for name in names if "of" in name}
    for whole in parts:
        stem, count = whole.rsplit("_", 1)
        assert [n for n in names if n.startswith(f"{stem}_")] == [
            f"{stem}_{i + 1}of{count}" for i in range(int(count))
        ]


def test_without_a_gpu_it_says_so(tmp_path):
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path / "out"), "--only", "ceilings", "planted"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 1
    assert "torch sees no GPU" in done.stdout
    assert "0 of 2 stages have passed; not planted, ceilings" in done.stdout
