# SPDX-License-Identifier: Apache-2.0
"""Stages by name: each is a function of a :class:`Context` that reports its findings, or raises."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from peftkern.tools import doctor

from .context import Context, LeftOut
from .correctness import compiled, correct, cuda_graph, opcheck, planted
from .measurements import ceilings, crossovers, microbenchmarks, training
from .runner import ROOT


def environment(context: Context) -> None:
    report = doctor.collect()
    gpus = [text for name, text in report["gpu"].items() if name.startswith("cuda:")]
    packages = ", ".join(f"{name} {report['packages'].get(name)}" for name in ("torch", "triton", "transformers"))
    context.lines += ["; ".join(gpus) or "no GPU", packages, *doctor.render(report).splitlines()]
    for command in (["git", "-C", str(ROOT), "rev-parse", "HEAD"], ["nvidia-smi"], ["rocm-smi"]):
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            context.lines += ["", " ".join(command), *done.stdout.splitlines()]


def build(context: Context) -> None:
    """Build the native libraries that the checkout lacks in a folder, then move them into place."""
    package = ROOT / "peftkern"
    wanted = [name for name in ("cpu", "cuda") if not (package / f"libpeftkern_{name}.so").exists()]
    if "cuda" in wanted and (context.dry_run or shutil.which("nvcc") is None or torch.version.hip is not None):
        context.lines.append("no CUDA library: " + ("a dry run" if context.dry_run else "nvcc is not on PATH"))
        wanted.remove("cuda")
    if "cpu" in wanted and not (shutil.which("g++") or shutil.which("c++")):
        context.lines.append("no CPU library: no C++ compiler")
        wanted.remove("cpu")
    if not wanted:
        raise LeftOut("nothing to build")
    if shutil.which("cmake") is None:
        raise LeftOut(f"cmake is not on PATH (`pip install cmake ninja`), so no library is built for {wanted}")
    made, out = context.folder / "native", context.folder / "native" / "out"
    shutil.rmtree(made, ignore_errors=True)
    options = [f"-DPEFTKERN_OUTPUT_DIR={out}", f"-DPEFTKERN_CUDA={'ON' if 'cuda' in wanted else 'OFF'}"]
    environment = dict(os.environ)
    if "cuda" in wanted and "TORCH_CUDA_ARCH_LIST" not in environment:
        environment["TORCH_CUDA_ARCH_LIST"] = "{}.{}".format(*torch.cuda.get_device_capability())
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(made), *generator, *options],
        ["cmake", "--build", str(made), "--parallel", str(os.cpu_count() or 2)],
    ):
        subprocess.run(command, check=True, env=environment)
    for file in [*out.glob("*.so"), *out.glob("_build_info.json")]:
        shutil.copy(file, package / f".{file.name}")
        (package / f".{file.name}").replace(package / file.name)
    context.lines.insert(0, f"built for {' and '.join(wanted)}")


STAGES: dict[str, Callable[[Context], None]] = {
    "environment": environment, "build": build, "planted": planted, "opcheck": opcheck, "compile": compiled,
    "cuda_graph": cuda_graph, "ceilings": ceilings, "crossovers": crossovers, "microbenchmarks": microbenchmarks,
    "training": training,
}  # fmt: skip


def run(name: str, folder: Path, limit: float, dry_run: bool) -> dict[str, Any]:
    """Run a stage and return its result. A fifth of the time limit is reserved for its end."""
    context = Context(folder, dry_run, time.monotonic() + 0.8 * limit)
    torch.manual_seed(0)
    try:
        if not dry_run and name not in ("environment", "build") and not torch.cuda.is_available():
            raise RuntimeError("torch sees no GPU: `--dry-run` is for machines without one")
        if match := re.fullmatch(r"correct_(\w+)_(bf16|fp16|fp32)(?:_(\d)of(\d))?", name):
            backend, dtype, part, parts = match.groups()
            correct(context, backend, dtype, int(part or 1), int(parts or 1))
        else:
            STAGES[name](context)
        status = "ok"
    except LeftOut as reason:
        status, context.lines = "left out", [str(reason), *context.lines]
    except Exception as error:
        status = "failed"
        context.lines = [
            f"{type(error).__name__}: {error}",
            *context.lines,
            *traceback.format_exc().splitlines()[-6:],
        ]
    return {"status": status, "lines": [line[:600] for line in context.lines], "tables": context.tables}
