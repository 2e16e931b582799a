# SPDX-License-Identifier: Apache-2.0
"""What ``peftkern bench`` counts, times and records, and what it needs for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from peftkern.arguments import Call
from peftkern.tools.bench import attention, measuring, rows
from peftkern.tools.bench.measuring import Timing, take_turns
from peftkern.tools.bench.shapes import MODELS, Shape, sweep


def test_flops_and_bytes():
    shape = Shape(2, 4, 2, 8, 16, 3)
    assert shape.flops("forward") == 4 * 16 * 2 * 4 * shape.pairs
    assert shape.bytes("forward", 2) == 2 * (2 * 2 * 4 * 8 * 16 + 2 * 2 * 2 * 8 * 16 + 2 * 2 * 3 * 16)
    assert shape.flops("forward+backward") == shape.flops("forward") + shape.flops("backward")


def test_a_sweep_is_every_combination():
    shapes = sweep(["gpt2", "gemma-2-9b"], [16, 32], [4], [1, 2])
    assert len(shapes) == 8
    assert {(s.Hq, s.D, s.window, s.softcap) for s in shapes} == {(12, 64, None, None), (16, 256, 4096, 50.0)}
    for model in MODELS.values():
        assert model.Hq % model.Hkv == 0


def test_quantiles_and_turns():
    timing = Timing.of([float(i) for i in range(1, 10)])
    assert (timing.p20, timing.median, timing.p80) == (2.0, 5.0, 8.0)
    figures = take_turns({"a": lambda: None}, 0.0, at_least=4, clock=lambda call: [1.0, 2.0])
    assert figures["a"].median == 1.5


def test_much_slower_calls_are_timed_twice():
    seconds = {"fast": 1.0, "slow": 6.0}
    called = []
    calls = {name: (lambda name=name: called.append(name)) for name in seconds}
    take_turns(calls, 0.0, at_least=5, clock=lambda call: [call() or seconds[called[-1]]], drop_slower=5.0)
    assert called.count("fast") == 6, "once to warm up, then five rounds"
    assert called.count("slow") == 3


def test_backends_are_timed_in_turns():
    dtypes, shape = (torch.float32, torch.float32), (1, 2, 9, 8)
    call = Call("prefix_attention", torch.device("cpu"), *dtypes, shape, shape, (2, 3, 8), (), needs_grad=True)
    found = measuring.time_backends(call, ["reference"], 0.0, options={"softcap": 5.0})
    assert list(found) == ["reference"]
    assert 0 < found["reference"].seconds < 10
    assert found["reference"].host == 0, "on a CPU, launching is part of the call"


def test_memory_counts_what_is_allocated_and_kept():
    shape = Shape(2, 4, 4, 257, 64, 32)
    measured = attention.measure(shape, "fp32", ["forward+backward"], ["peft-eager", "peft"], seconds=0.0)
    scores = 2 * 4 * 257 * (257 + 32) * 4 / 1e6
    eager, sdpa = measured
    assert eager["peak_mb"] > scores
    assert eager["saved_mb"] > scores > sdpa["saved_mb"] > 0


def test_memory_that_cannot_be_measured_is_said(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no more processes")

    monkeypatch.setattr(attention.memory, "in_own_process", fail)
    measured = attention.measure(Shape(1, 2, 2, 9, 8, 3), "fp32", ["forward"], ["peft"], seconds=0.0)
    assert measured[0]["status"] == "ok"
    assert measured[0]["reason"] == "memory was not measured: RuntimeError: no more processes"


def test_gpu_rows_say_on_which_gpu(monkeypatch):
    facts = SimpleNamespace(name="A GPU", major=9, minor=0, gcnArchName="gfx942")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(measuring.shutil, "which", lambda name: name)
    monkeypatch.setattr(measuring, "_output", lambda command: "580.1, 1980, 2619")
    row = measuring.stamp("cuda")
    assert (row["gpu"], row["arch"], row["driver"], row["sm_mhz"]) == ("A GPU", "sm_90", "580.1", "1980")
    assert set(row) <= set(rows.COLUMNS)


def test_measuring_needs_torch_alone():
    """Scripts on a bare machine measure without the packages that only print and draw."""
    code = (
        "import sys\n"
        "for name in ('rich', 'pandas', 'matplotlib', 'transformers', 'peft'): sys.modules[name] = None\n"
        "from peftkern.tools.bench import attention, shapes\n"
        "shape = shapes.Shape(1, 2, 2, 9, 8, 3)\n"
        "rows = attention.measure(shape, 'fp32', ['forward'], ['peft', 'peftkern'], seconds=0, with_memory=False)\n"
        "print([row['status'] for row in rows])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert done.stdout.strip() == "['ok', 'ok']", done.stderr


@pytest.mark.parametrize("name", ["attention", "checks", "measuring", "memory", "providers", "rows", "shapes"])
def test_each_module_can_be_imported_first(name):
    code = f"import peftkern.tools.bench.{name} as module; getattr(module, 'stamp', dict)()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stderr
