# SPDX-License-Identifier: Apache-2.0
"""The first seconds: versions, the ceilings of the GPU, and one call of ordinary size per plan against fp64."""

from __future__ import annotations

import functools
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import peftkern
from peftkern.tools import doctor
from peftkern.tools.bench.checks import Judge
from peftkern.tools.bench.device_time import enqueue
from peftkern.tools.bench.measuring import stamp
from peftkern.tools.bench.providers import Calls, Problem, calls_of, prepare
from peftkern.tools.bench.shapes import Shape

from . import plans
from .context import Context, Finding, Items, LeftOut, Row

ROOT = Path(__file__).resolve().parents[2]
#: A layer of Llama 3 8B.
REAL = Shape(B=1, Hq=32, Hkv=8, S=2048, D=128, P=128)
TINY = Shape(B=1, Hq=4, Hkv=2, S=24, D=16, P=5)


def seconds_of(context: Context, call: Callable[[], object], count: int = 5) -> float:
    """Median seconds of a call on the device, after one call to warm up."""
    call()
    if context.device == "cuda":
        return statistics.median(enqueue(call, count).device)
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def machine(context: Context) -> Items:
    """Versions, ceilings, and a wrong result that must be found."""
    if not context.dry_run and not torch.cuda.is_available():
        raise SystemExit("torch sees no GPU: `--dry-run` is for machines without one")
    return {
        "versions": functools.partial(versions, context),
        "ceilings": functools.partial(ceilings, context),
        "a wrong result is found": functools.partial(_planted, context),
    }


def versions(context: Context) -> Finding:
    """What `peftkern doctor` says, the commit, and the driver. The row describes the machine in every table."""
    report = doctor.collect()
    gpus = [text for name, text in report["gpu"].items() if name.startswith("cuda:")]
    packages = ", ".join(f"{name} {report['packages'].get(name)}" for name in ("torch", "triton", "transformers"))
    lines = doctor.render(report).splitlines()
    for command in (["git", "-C", str(ROOT), "rev-parse", "HEAD"], ["nvidia-smi"], ["rocm-smi"]):
        if shutil.which(command[0]):
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
            lines += ["", " ".join(command), *done.stdout.splitlines()]
    return Finding(f"{'; '.join(gpus) or 'no GPU'}; {packages}", [stamp(context.device)], lines)


def ceilings(context: Context) -> Finding:
    """Rates of a copy and of matrix products."""
    count, size = (1 << 16, 64) if context.dry_run else (1 << 29, 8192)
    source, target = (torch.ones(count, dtype=torch.bfloat16, device=context.device) for _ in range(2))
    rate = 4 * count / seconds_of(context, lambda: target.copy_(source)) / 1e9
    rows: list[Row] = [{"what": f"copy of {2 * count >> 20} MiB", "rate": rate, "unit": "GB/s read and written"}]
    source = target = torch.empty(0)
    for name, dtype in plans.DTYPES.items():
        a, b = (torch.randn(size, size, device=context.device).to(dtype) for _ in range(2))
        rate = 2 * size**3 / seconds_of(context, functools.partial(torch.matmul, a, b)) / 1e12
        rows.append({"what": f"matmul {name} {size}^3", "rate": rate, "unit": "TFLOP/s"})
    return Finding(", ".join(f"{row['what']}: {row['rate']:.4g} {row['unit']}" for row in rows), rows)


def _planted(context: Context) -> Finding:
    problem = Problem.make(TINY, torch.bfloat16, context.device)
    calls = prepare("peft", problem)
    assert isinstance(calls, Calls)
    off = Calls(lambda: calls.forward() * 1.05, None, None)
    verdict = Judge(problem).judge(off, backward=False)
    if not verdict.wrong:
        raise AssertionError("a result that is wrong by a twentieth passes the check")
    return Finding(f"found: {verdict.wrong}")


def right(context: Context, backend: str) -> Items:
    """Forward and backward of ordinary size by every plan of a backend, against fp64 on the device."""
    problem = Problem.make(TINY if context.dry_run else REAL, torch.bfloat16, context.device)
    found = plans.matching(plans.names(plans.plain_call(context.device, torch.bfloat16)), backend)
    if context.dry_run and backend == "cuda":
        found = ["cpu"]  # in its place
    judge = Judge(problem)
    return {name: functools.partial(_right, problem, judge, name) for name in found} or {
        backend: functools.partial(_no_plan, context, backend)
    }


def _right(problem: Problem, judge: Judge, name: str) -> Finding:
    calls, start = plan_calls(problem, name), time.monotonic()
    with plans.on_its_own_kernel():
        error = judged(judge, calls)
    return Finding(f"error {error:.1e}, with compilation {time.monotonic() - start:.1f} s")


def _no_plan(context: Context, backend: str) -> Finding:
    plan = peftkern.explain(plans.plain_call(context.device, torch.bfloat16)).plans[backend]
    raise LeftOut("; ".join(getattr(plan, "reasons", ())))


def plan_calls(problem: Problem, name: str) -> Calls:
    """Functions to time for a plan."""

    def attention(*inputs: Tensor) -> Tensor:
        out: Tensor = peftkern.prefix_attention(*inputs, backend=name, **problem.shape.options)
        return out

    return calls_of(attention, problem)


def judged(judge: Judge, calls: Calls, uses_prefix: bool = True, with_backward: bool = True) -> float:
    """The largest relative error of out and the gradients. Raises AssertionError if one is wrong."""
    errors = []
    for backward in (False, True)[: 1 + with_backward]:
        verdict = judge.judge(calls, backward, uses_prefix)
        if verdict.wrong:
            raise AssertionError(f"{'backward' if backward else 'forward'}: {verdict.wrong}")
        errors.append(verdict.error)
    return max(errors)
