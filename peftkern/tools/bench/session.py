# SPDX-License-Identifier: Apache-2.0
"""One run of ``peftkern bench``: measure a sweep, print a table per problem, write the report."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import attention, rows
from . import options as checks
from .measuring import by, cpu_name, git_sha, gpu_facts
from .options import BenchError
from .providers import PROVIDERS
from .rows import Comparison, Results, Row
from .shapes import MODELS, SHAPES, sweep


def run_session(options: argparse.Namespace) -> int:
    """Measure the problems without rows, show them, write the report; 1 if a peftkern provider was wrong or failed.

    Raises:
        BenchError: for errors that the user can correct.
    """
    console = Console(width=None if Console().is_terminal else 150)
    checks.check(options)
    checks.some_of("--providers", options.providers or [], list(PROVIDERS))
    if options.list:
        _list(console)
        return 0
    if options.source is not None:
        try:
            found = rows.read(options.source)
        except ValueError as error:
            raise BenchError(f"--from {error}") from error
        _show_all(console, found)
        _report(console, found, options.source.parent)
        return _status(found)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise BenchError("--device: expected a device that torch can use, got cuda: torch sees no GPU")
    path = None if options.output is None else options.output / "attention.csv"
    try:
        results = Results(path)
    except ValueError as error:
        raise BenchError(f"--resume: {error}") from error
    if results.note is not None:
        console.print(results.note)
    problems = _problems(options, device)
    todo = [key for key in problems if _problem(*key, device) not in results.known]
    if len(todo) < len(problems):
        console.print(f"{len(problems) - len(todo)} of {len(problems)} problems are already in {path}")
    console.print(_where(device), style="dim")
    interrupted = _measure(console, options, device, results, todo)
    _show_absent(console, results.rows)
    if path is not None and results.rows:
        console.print(f"rows: {path}")
        _report(console, results.rows, path.parent)
    if interrupted:
        console.print("stopped; the measured rows are kept, and --resume continues" if path else "stopped")
        return 130
    return _status(results.rows)


Key = tuple[Any, str, int, str]  # shape, dtype, threads, direction


def _problems(options: argparse.Namespace, device: str) -> list[Key]:
    sizes = (options.model, options.seq, options.prefix, options.batch, options.cached)
    shapes = SHAPES[options.shapes] if options.shapes else sweep(*sizes)
    one = options.cpu_time or device == "cuda"
    threads = [1] if options.cpu_time else options.threads or [torch.get_num_threads()]
    threads = threads[:1] if one else threads
    return [
        (shape, dtype, count, direction)
        for count in threads for dtype in options.dtype for shape in shapes for direction in options.direction
    ]  # fmt: skip


def _problem(shape: Any, dtype: str, threads: int, direction: str, device: str) -> tuple[str, ...]:
    columns = {"dtype": dtype, "device": device, "threads": threads, "direction": direction}
    return rows.problem(attention.key_columns(shape) | columns)


def _measure(console: Console, options: argparse.Namespace, device: str, results: Results, todo: list[Key]) -> bool:
    """Measure the problems; true if Ctrl-C ended it."""
    clock = by(time.process_time) if options.cpu_time else None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    before = torch.get_num_threads()
    try:
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=len(todo))
            for shape, dtype, threads, direction in todo:
                bar.update(task, description=f"{shape.model} {shape} {dtype} {direction}")
                torch.set_num_threads(threads)
                measured = attention.measure(
                    shape, dtype, [direction], options.providers or (), device=device, seconds=options.seconds,
                    clock=clock, with_memory=options.memory,
                )  # fmt: skip
                results.add(measured)
                console.print(table(measured))
                console.print(str(Comparison.of(measured)), end="\n\n")
                bar.advance(task)
    except KeyboardInterrupt:
        return True
    finally:
        torch.set_num_threads(before)
    return False


def table(measured: list[Row]) -> Table:
    """The table of one problem: timed providers, the fastest first, then wrong and failed ones."""
    compared = Comparison.of(measured)
    shown = Table(title=rows.title(measured[0]), title_justify="left", box=None, pad_edge=False)
    for name in (
        "provider",
        "ms",
        "p20 to p80",
        "TFLOP/s",
        "GB/s",
        "x PEFT",
        "peak MB",
        "saved MB",
        "error / PEFT's",
    ):
        shown.add_column(name, justify="left" if name == "provider" else "right", no_wrap=True)
    shown.add_column("", justify="left")
    ok = [row for row in measured if row["status"] == "ok"]
    for row in sorted(ok, key=lambda row: float(row["p50_ms"])):
        ratio = "" if compared.peft is None else f"{compared.peft['p50_ms'] / row['p50_ms']:.2f}"
        note = "chosen by auto" if row["auto"] else "no prefix, torch SDPA" if row["provider"] == "no-prefix" else ""
        note = row["reason"] or note
        shown.add_row(
            row["provider"], f"{row['p50_ms']:.3g}", f"{_number(row['p20_ms'])} to {_number(row['p80_ms'])}",
            _number(row["tflops"]), _number(row["gb_s"]), ratio, _number(row.get("peak_mb")),
            _number(row.get("saved_mb")), _number(row["error_ratio"]), note,
            style="bold" if rows.is_ours(row["provider"]) else "",
        )  # fmt: skip
    for row in measured:
        if row["status"] in ("wrong", "failed"):
            shown.add_row(row["provider"], *[""] * 8, f"{row['status']}: {row['reason']}", style="red")
    return shown


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _show_all(console: Console, found: list[Row]) -> None:
    for group in rows.groups(found):
        console.print(table(group))
        console.print(str(Comparison.of(group)), end="\n\n")
    _show_absent(console, found)


def _show_absent(console: Console, found: list[Row]) -> None:
    if missing := rows.absent(found):
        console.print("not timed here:")
        shown = Table(box=None, show_header=False, pad_edge=False, style="dim")
        for provider, _, reason in missing:
            shown.add_row(f"  {provider}", reason)
        console.print(shown)


def _report(console: Console, found: list[Row], folder: Path) -> None:
    from .report import write_report

    for path in write_report(found, folder):
        console.print(f"report: {path}")


def _status(found: list[Row]) -> int:
    """Exit status: 1 if a peftkern provider was wrong or failed."""
    return int(any(row["status"] in ("wrong", "failed") and rows.is_ours(row["provider"]) for row in found))


def _where(device: str) -> str:
    parts = [cpu_name() if device == "cpu" else " ".join(str(x) for x in gpu_facts().values() if x)]
    return ", ".join([*parts, f"torch {torch.__version__}", f"peftkern {git_sha()}"])


def _list(console: Console) -> None:
    providers = Table("provider", "what it does", box=None)
    for name, provider in PROVIDERS.items():
        providers.add_row(name, provider.title)
    models = Table("model", "Hq", "Hkv", "D", "window", "softcap", box=None)
    for name, m in MODELS.items():
        models.add_row(name, *(str(x or "") for x in (m.Hq, m.Hkv, m.D, m.window, m.softcap)))
    console.print(providers)
    console.print()
    console.print(models)
