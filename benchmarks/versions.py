# SPDX-License-Identifier: Apache-2.0
"""Compare the speed of this checkout's package with another commit's, through the public names alone.

    python -m benchmarks.versions HEAD~10
    python -m benchmarks.versions main --only host --seconds 5

Unlike `benchmarks.against`, the versions may differ in everything behind the public names; the other commit's CPU
library is built in its worktree, which takes about a minute. A worker process per version takes turns with the other.
The rows: processor time per call of `prefix_attention` where it has nothing to compute (B = S = 1), beside torch.cat
and SDPA; one attention layer of two models; training steps of SmolLM2-135M's shape cut to 10 layers. Ratios are
after / before, of medians; a spread is (third - first quartile) / median.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from peftkern.tools.bench.measuring import stamp, take_turns

from .against import git
from .common import RESULTS, ROOT, Row, progress, show, write

GROUPS = ("host", "kernels", "steps")
#: (B, Hq, Hkv, S, D, P) of a layer of Llama 3.2 1B and of Llama 3 8B.
SHAPES = [(1, 32, 8, 512, dim, prefix) for dim in (64, 128) for prefix in (16, 128, 1024)]
SHAPES += [(4, 32, 8, 1, 64, 128), (1, 32, 8, 2048, 64, 16)]
#: (kind, B, P, S)
STEPS = (("full", 1, 20, 512), ("padded", 8, 20, 345), ("prompt", 8, 100, 100), ("prompt", 4, 200, 210))


class Worker:
    """A process that runs one version. ``tree`` is the folder of its package."""

    def __init__(self, tree: Path, threads: int) -> None:
        script = ROOT / "benchmarks" / "version_worker.py"
        environment = os.environ | {
            "PYTHONPATH": str(tree), "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",  # threads that spin would disturb the other version
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(tree), str(threads)], cwd=tree, env=environment,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def ask(self, *request: object) -> Any:
        """The answer to a request of :class:`benchmarks.version_worker.Worker`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{request[0]}: the worker has ended; its error is above")
        return json.loads(answer)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()


@contextlib.contextmanager
def built_worktree(commit: str) -> Iterator[Path]:
    """A temporary checkout of a commit with its CPU library built.

    Raises:
        SystemExit: if there is no such commit, or it cannot be built.
    """
    with tempfile.TemporaryDirectory(prefix="peftkern-versions-") as folder:
        tree = Path(folder).resolve() / "tree"
        made = git(ROOT, "worktree", "add", "--detach", str(tree), commit)
        if made.returncode:
            raise SystemExit(f"{commit}: expected a commit of {ROOT}. {made.stderr.strip()}")
        try:
            for command in (["-S", ".", "-B", "build", "-G", "Ninja"], ["--build", "build"]):
                built = subprocess.run(["cmake", *command], cwd=tree, capture_output=True, text=True, check=False)
                if built.returncode:
                    raise SystemExit(f"{commit}: cmake {' '.join(command)} failed.\n{built.stderr[-2000:]}")
            yield tree
        finally:
            git(ROOT, "worktree", "remove", "--force", str(tree))


def _row(group: str, case: str, values: dict[str, list[float]]) -> Row:
    row: Row = {"group": group, "case": case}
    for side, times in values.items():
        quartiles = statistics.quantiles(times, n=4)
        row |= {side: statistics.median(times), f"spread_{side}": (quartiles[2] - quartiles[0]) / quartiles[1]}
    return row | {"ratio": row["after"] / row["before"]}


def _line(row: Row) -> list[str]:
    medians = [f"{row[side]:.4g} ±{row[f'spread_{side}']:.0%}" for side in ("before", "after")]
    return [row["group"], row["case"], *medians, f"{row['ratio']:.3f}"]


def measure_host(workers: dict[str, Worker], seconds: float) -> list[Row]:
    """Microseconds per call, and times torch.cat with SDPA."""
    values: dict[str, list[list[float]]] = {side: [] for side in workers}
    for _ in range(max(5, int(2 * seconds))):
        for side, worker in workers.items():
            values[side].append(worker.ask("host", 1000))
    rows = [_row("host", "prefix_attention, us", {side: [x[0] for x in v] for side, v in values.items()})]
    rows.append(_row("host", "torch.cat and SDPA, us", {side: [x[1] for x in v] for side, v in values.items()}))
    return rows


def measure(workers: dict[str, Worker], seconds: float, group: str, case: str, *request: object) -> list[Row]:
    """Seconds of a prepared call."""
    for worker in workers.values():
        worker.ask(*request)
    values: dict[str, list[float]] = {side: [] for side in workers}

    def run(side: str) -> Callable[[], None]:
        return lambda: values[side].append(workers[side].ask("run"))

    take_turns({side: run(side) for side in workers}, seconds, 11)
    return [_row(group, case, {side: times[1:] for side, times in values.items()})]


def tasks(workers: dict[str, Worker], groups: list[str], seconds: float) -> list[tuple[str, Callable[[], list[Row]]]]:
    """(title, measurement) of every row."""
    todo: list[tuple[str, Callable[[], list[Row]]]] = []
    if "host" in groups:
        todo.append(("host", lambda: measure_host(workers, seconds)))
    if "kernels" in groups:
        for shape in SHAPES:
            for training in (False, True) if shape[3] > 1 else (False,):
                title = f"B={shape[0]} H={shape[1]}/{shape[2]} S={shape[3]} D={shape[4]} P={shape[5]} bf16"
                case = f"{title}, {'forward+backward' if training else 'forward'}"
                todo.append((case, lambda s=shape, t=training, c=case: measure(  # type: ignore[misc]
                    workers, seconds, "kernels", c, "prepare_kernel", list(s), t
                )))  # fmt: skip
    if "steps" in groups:
        for step in STEPS:
            case = f"training step, {step[0]}, B={step[1]} P={step[2]} S={step[3]} bf16"
            todo.append((case, lambda s=step, c=case: measure(  # type: ignore[misc]
                workers, seconds, "steps", c, "prepare_step", *s
            )))  # fmt: skip
    return todo


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure, print, write, return the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("commit", help="commit, branch or tag of this repository to compare with")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), help="groups of rows")
    parser.add_argument("--seconds", type=float, default=6.0, help="time per row (default %(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "versions.csv", help="CSV file (default %(default)s)"
    )
    options = parser.parse_args(arguments)
    rows: list[Row] = []
    with built_worktree(options.commit) as tree:
        workers = {side: Worker(folder, options.threads) for side, folder in (("before", tree), ("after", ROOT))}
        facts = stamp() | {
            "threads": options.threads,
            "git_before": git(ROOT, "rev-parse", "--short", options.commit).stdout.strip(),
        }
        try:
            for row in progress(tasks(workers, options.only, options.seconds)):
                rows.append(row | facts)
                write(rows, options.output)
        finally:
            for worker in workers.values():
                worker.close()
            if rows:
                columns = ("group", "case", "before", "after", "after / before")
                title = f"{options.commit} and this checkout, {options.threads} threads"
                show(title, columns, [_line(row) for row in rows])
    return rows


if __name__ == "__main__":
    main()
