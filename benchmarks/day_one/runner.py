# SPDX-License-Identifier: Apache-2.0
"""Run each stage in a process of its own, with a time limit, and report what it found."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .plan import DONE, GROUPS

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_day_one.py"


def run_stage(name: str, folder: Path, limit: float, dry_run: bool) -> dict[str, Any]:
    """Run a stage in a process of its own; returns its result, also if the process leaves none."""
    result, log = folder / f"{name}.json", folder / f"{name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(SCRIPT), "--stage", name, "--folder", str(folder)]
    command += ["--limit", f"{limit:.0f}", *["--dry-run"] * dry_run]
    environment = dict(os.environ)
    if name.startswith("correct_"):
        environment.setdefault("OMP_NUM_THREADS", "2")  # several run at once
    if dry_run:
        environment |= {"XDG_CACHE_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        if name.startswith("correct_") and name.split("_")[1] in ("triton", "merge", "concat"):
            environment["TRITON_INTERPRET"] = "1"
    start = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
            cwd=ROOT,
        )  # fmt: skip
        try:
            code = process.wait(limit)
            outcome = {"status": "crashed", "lines": [f"ended with status {code} and no result", *_tail(log)]}
        except subprocess.TimeoutExpired:
            outcome = {"status": "timed out", "lines": [f"was stopped after {limit:.0f} s", *_tail(log)]}
        finally:
            _stop(process)
    if outcome["status"] == "crashed" and result.exists():
        outcome = json.loads(result.read_text())
    outcome |= {"stage": name, "seconds": round(time.monotonic() - start, 1)}
    write_result(result, outcome)
    return outcome


def _stop(process: subprocess.Popen) -> None:
    """End the stage and the processes that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path, lines: int = 5) -> list[str]:
    return [line[:300] for line in log.read_text(errors="replace").splitlines()[-lines:]]


def write_result(path: Path, content: dict[str, Any]) -> None:
    """Write the file completely or not at all, in case the run is stopped."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    """The result of a stage, from this run or an earlier one; None without a valid one."""
    try:
        result = json.loads((folder / f"{name}.json").read_text())
        return result if {"status", "seconds", "lines"} <= result.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def run_all(folder: Path, dry_run: bool, again: list[str], only: list[str], limit: float) -> list[dict[str, Any]]:
    """Run all stages that have no result yet; writes the report after each group and returns the results."""
    start, results = time.monotonic(), []
    skipped = re.compile(r"_[2-9]of\d$|_fp16$|(merge|concat)_fp32$")  # a dry run leaves out repetitions
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def one(name: str, most: float) -> dict[str, Any]:
        result, left = _read(folder, name), start + limit - time.monotonic()
        if result is not None and (result["status"] not in DONE or name in again):
            result = None
        if name in again:
            (folder / f"{name}.csv").unlink(missing_ok=True)
        if result is None and left < 5:
            result = {"stage": name, "status": "no time left", "seconds": 0, "lines": ["the same command continues"]}
        elif result is None:
            result = run_stage(name, folder, min(most, left), dry_run)
        print(f"{name}: {result['status']}, {result['seconds']} s", *result["lines"][:1], flush=True)
        return result

    for group in GROUPS:
        stages = [stage for stage in group.items() if not (dry_run and skipped.search(stage[0]))]
        with concurrent.futures.ThreadPoolExecutor(max(1, min(12, cores))) as pool:
            results += pool.map(lambda stage: one(*stage), [s for s in stages if not only or s[0] in only])
        report(folder, dry_run)
    return results


def report(folder: Path, dry_run: bool) -> None:
    """Write report.md: a table of the finished stages, then the lines of each."""
    results = [r for group in GROUPS for name in group if (r := _read(folder, name)) is not None]
    what = "**Dry run on a CPU: tiny sizes, no GPU; nothing here is a measurement.**" if dry_run else ""
    lines = ["# peftkern on this machine", "", what, "", "| stage | result | s | |", "|---|---|---|---|"]
    for r in results:
        headline = r["lines"][0].replace("|", "/") if r["lines"] else ""
        lines.append(f"| {r['stage']} | {r['status']} | {r['seconds']} | {headline} |")
    for r in results:
        tables = [f"[{name}]({name})" for name in r.get("tables", [])]
        lines += ["", f"## {r['stage']}: {r['status']}", "", *tables, "```", *r["lines"], "```"]
    (folder / "report.md").write_text("\n".join(lines) + "\n")
