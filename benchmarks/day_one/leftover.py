# SPDX-License-Identifier: Apache-2.0
"""For the minutes that remain: compute-sanitizer, ncu, and at last a calibration that ``auto`` does not read."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import torch

import peftkern
from peftkern import testing
from peftkern.tools import calibrate

from . import plans
from .context import Context, Finding, Items, LeftOut, Row

ROOT = Path(__file__).resolve().parents[2]
#: The names of our kernels: those of the CUDA library are in the namespace peftkern.
OURS = "regex:peftkern|_prefix_|_concat_|_split_|_merge_states|_sum_partials|_soft_prompt"


def sanitizer(context: Context) -> Items:
    """Memory errors and races of the CUDA kernels on tiny calls."""
    names = plans.plain_call(context.device, torch.bfloat16)
    found = [name for name in plans.names(names) if name == "cuda" or name.endswith("/cuda")]
    chosen = list({name.split("/")[0]: name for name in found}.values())  # one per backend
    return {
        f"{tool}, {name}": functools.partial(_sanitizer, tool, name)
        for tool in ("memcheck", "racecheck")
        for name in chosen or ["cuda"]
    }


def _sanitizer(tool: str, name: str) -> Finding:
    text = _tool("compute-sanitizer", ["--tool", tool, "--error-exitcode", "9", "--print-limit", "20"], name)
    summary = [line for line in text.splitlines() if "SUMMARY" in line]
    if not summary or not re.search(r"SUMMARY: 0 (errors|hazards)", summary[-1]):
        raise AssertionError("\n".join(summary or text.splitlines()[-5:]))
    return Finding(summary[-1].strip("= "), details=text.splitlines()[-10:])


def ncu(context: Context) -> Items:
    """Where the prefix kernels spend their time, by NVIDIA's profiler."""
    found = plans.matching(plans.names(plans.plain_call(context.device, torch.bfloat16)), "merge")
    by_kernels = {name.split("/")[-1]: name for name in reversed(found)}
    return {name: functools.partial(_ncu, name) for name in by_kernels.values() or ["merge"]}


def _ncu(name: str) -> Finding:
    options = ["--kernel-name", OURS, "--launch-count", "6", "--section", "SpeedOfLight", "--section", "Occupancy"]
    text = _tool("ncu", [*options, "--section", "MemoryWorkloadAnalysis"], name, "real")
    if "ERR_NVGPUCTRPERM" in text:
        raise LeftOut("ncu may not read the GPU's counters here")
    if "No kernels were profiled" in text:
        raise AssertionError("ncu found no kernel")
    return Finding("counters of the prefix kernels", details=text.splitlines()[:400])


def _tool(tool: str, options: list[str], name: str, size: str = "tiny") -> str:
    """The output of a tool that runs :func:`run_calls` of a plan."""
    path = shutil.which(tool) or shutil.which(tool, path="/usr/local/cuda/bin")
    if path is None:
        raise LeftOut(f"{tool} is not on PATH")
    command = [path, *options, sys.executable, "-m", __name__, name, size]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    return done.stdout + done.stderr


def run_calls(name: str, size: str, device: str = "cuda") -> None:
    """Run calls of a plan forward and backward: tiny ones with several features, or one of ordinary size."""
    small = testing.Shape(B=2, Hq=4, Hkv=2, S=33, P=17, D=64)
    shapes: Iterable[tuple[testing.Shape, dict]] = [
        testing.feature(feature, small) for feature in ("plain", "packed", "ragged_bank", "window", "kv_cache")
    ]
    if size == "real":
        shapes = [(replace(small, B=4, Hq=32, Hkv=8, S=2048, P=128, D=128), {})]
    for shape, options in shapes:
        inputs = testing.tensors(shape, torch.bfloat16)
        leaves = {key: x.to(device).requires_grad_() for key, x in inputs.items()}
        given = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in options.items()}
        out = peftkern.prefix_attention(**leaves, **given, backend=name)
        torch.autograd.grad(out, list(leaves.values()), torch.ones_like(out))


def calibration(context: Context) -> Items:
    """Fit the cost model to this GPU, into a file that ``auto`` does not read."""
    return {"calibration": functools.partial(_calibration, context)}


def _calibration(context: Context) -> Finding:
    device = torch.device(context.device, torch.cuda.current_device() if context.device == "cuda" else None)
    shapes = calibrate.SHAPES[1:2] if context.dry_run else None
    seconds, dtypes = (0.0, (torch.float32,)) if context.dry_run else (15.0, (torch.bfloat16,))
    notes: list[str] = []
    file = calibrate.calibrate(
        device, seconds, shapes, dtypes, notes.append, 40.0, context.folder / "profiles" / f"rates_{device.type}.json"
    )
    measured = calibrate.read_rows(file)
    calls: dict[tuple[str, tuple[int, ...]], list[calibrate.Row]] = {}
    for row in measured:
        calls.setdefault((row.kind.partition(" ")[2], row.shape), []).append(row)
    over_best = {}
    for call, found in calls.items():
        chosen = min(found, key=lambda row: row.launches + row.work)
        over_best[call] = chosen.seconds / min(row.seconds for row in found)
    scales = {kind: f"{a:.3g} launches, {b:.3g} work" for kind, (a, b) in calibrate.fit(measured).items()}
    details = [*(f"{kind}: {text}" for kind, text in scales.items()), *notes]
    rows: list[Row] = [row._asdict() for row in measured]
    good = sum(value <= 1.15 for value in over_best.values())
    line = f"the modelled choice is within 1.15x of the best for {good} of {len(over_best)} calls"
    return Finding(f"{line}, worst {max(over_best.values(), default=1.0):.2f}x", rows, details)


if __name__ == "__main__":
    run_calls(sys.argv[1], sys.argv[2])
