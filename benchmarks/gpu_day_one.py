# SPDX-License-Identifier: Apache-2.0
"""Everything that a new GPU has to answer, in one command under nine minutes, from a plain checkout.

    python benchmarks/gpu_day_one.py                 into the folder gpu-day-one
    python benchmarks/gpu_day_one.py --dry-run       on a CPU, tiny: does everything run

Each stage runs in a process of its own with a time limit: one that fails, crashes or hangs is reported and the others
go on. A stage writes its result as it ends, so that the same command goes on where it was stopped; ``--again STAGE``
runs one anew. Nothing need be installed but torch, triton, transformers and peft; native libraries are built where
the tools for it are. The folder then holds report.md, a JSON and a log per stage, and tables as CSV.

Exit status: 0 if no stage failed, else 1.
"""

from __future__ import annotations

import argparse
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

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 525.0  # seconds for everything

#: Stages that may run beside each other, group after group, with the seconds that each may take at most.
GROUPS: tuple[dict[str, float], ...] = (
    {"environment": 60},
    {
        "build": 150, **{f"correct_triton_bf16_{part}of4": 150 for part in range(1, 5)}, "correct_triton_fp16": 120,
        "correct_triton_fp32": 120, **{f"correct_merge_bf16_{part}of2": 150 for part in range(1, 3)},
        "correct_merge_fp32": 120, "correct_concat_bf16": 120, "correct_concat_fp32": 120,
        "correct_reference_bf16": 90, "planted": 60,
    },
    {
        "correct_cpu_bf16": 60, "correct_cpu_fp32": 60, "correct_cuda_bf16": 60, "correct_cuda_fp16": 60,
        "opcheck": 90, "compile": 120, "cuda_graph": 90,
    },
    {"ceilings": 30},
    {"crossovers": 100},
    {"microbenchmarks": 110},
    {"training": 100},
)  # fmt: skip
#: Stages of the self-test: one that dies and one that never ends.
PLANTED = ("planted_crash", "planted_hang")
DONE = ("ok", "left out")


def run_stage(name: str, folder: Path, limit: float, dry_run: bool) -> dict[str, Any]:
    """Run a stage in a process of its own; its result, also when it leaves none."""
    result, log = folder / f"{name}.json", folder / f"{name}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(Path(__file__).resolve()), "--stage", name, "--folder", str(folder)]
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
            outcome = {"status": "crashed", "lines": [f"ended with status {code} and without a result", *_tail(log)]}
        except subprocess.TimeoutExpired:
            outcome = {"status": "timed out", "lines": [f"was stopped after {limit:.0f} s", *_tail(log)]}
        finally:
            _stop(process)
    if outcome["status"] == "crashed" and result.exists():
        outcome = json.loads(result.read_text())
    outcome |= {"stage": name, "seconds": round(time.monotonic() - start, 1)}
    _write(result, outcome)
    return outcome


def _stop(process: subprocess.Popen) -> None:
    """The stage and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path, lines: int = 5) -> list[str]:
    return [line[:300] for line in log.read_text(errors="replace").splitlines()[-lines:]]


def _write(path: Path, content: dict[str, Any]) -> None:
    """Whole or not at all, for a run that is stopped meanwhile."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=1))
    partial.replace(path)


def _read(folder: Path, name: str) -> dict[str, Any] | None:
    """What a stage has left, in this run or an earlier one."""
    try:
        result = json.loads((folder / f"{name}.json").read_text())
        return result if {"status", "seconds", "lines"} <= result.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def run_all(folder: Path, dry_run: bool, again: list[str], only: list[str], limit: float) -> list[dict[str, Any]]:
    """Results of all stages, the report written after each group."""
    start, results = time.monotonic(), []
    skipped = re.compile(r"_[2-9]of\d$|_fp16$|(merge|concat)_fp32$")  # by a dry run, which shows that stages run
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def one(name: str, most: float) -> dict[str, Any]:
        result, left = _read(folder, name), start + limit - time.monotonic()
        if result is not None and (result["status"] not in DONE or name in again):
            result = None
        if name in again:
            (folder / f"{name}.csv").unlink(missing_ok=True)
        if result is None and left < 5:
            result = {"stage": name, "status": "no time left", "seconds": 0, "lines": ["the same command goes on"]}
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
    """report.md: a table of the stages that have run so far, then what each has to say."""
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


def child(name: str, folder: Path, limit: float, dry_run: bool) -> None:
    """What runs in a stage's process."""
    if name == "planted_crash":
        os.abort()
    if name == "planted_hang":
        time.sleep(3600)
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
    from day_one import stages as stages

    result = stages.run(name, folder, limit, dry_run)
    _write(folder / f"{name}.json", result | {"stage": name})


def main(arguments: list[str] | None = None) -> int:
    """Run what has not run; 1 if a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("gpu-day-one"))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU and in Triton's interpreter")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE")
    parser.add_argument("--again", nargs="+", default=[], metavar="STAGE", help="run stages that have finished")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for everything (default %(default)s)")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if options.stage:
        child(options.stage, folder, options.limit, options.dry_run)
        return 0
    results = run_all(folder, options.dry_run, options.again, options.only, options.limit)
    failed = [r["stage"] for r in results if r["status"] not in DONE]
    print(f"{folder / 'report.md'}: {len(results) - len(failed)} of {len(results)} stages have passed", end="")
    print(f"; not {', '.join(failed)}" if failed else "")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
