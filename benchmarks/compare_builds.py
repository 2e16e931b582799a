# SPDX-License-Identifier: Apache-2.0
"""Compare two builds of the CPU library: whether their results agree, and how long each takes.

    python -m benchmarks.compare_builds --baseline OLD.so --candidate NEW.so
    python -m benchmarks.compare_builds --baseline OLD.so --candidate NEW.so --isas all --equal --peft

Both libraries are loaded into one process and called directly on the same tensors, in alternation. `ratio` is the
baseline's time divided by the candidate's, so that more than 1 is faster: the median over the rounds, with the 95%
interval of that median. A row whose ratio is below 0.97 and whose interval does not reach 1 is slower, and the exit
status is 1. Pass the same file twice to see the noise of the machine.

Results are compared before anything is timed: `differs by` is the largest difference of any result, divided by the
largest value of that result. Backward gets the baseline's `out` and `lse` in both builds. With --equal, a result
that is not equal bit for bit also gives exit status 1.

--peft adds PEFT's way, torch's SDPA over concatenated keys, forward and through autograd.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from peftkern.native.abi import ISAS
from peftkern.tools.bench.attention import key_columns
from peftkern.tools.bench.measuring import stamp
from peftkern.tools.bench.providers import DTYPES, Calls, Problem, prepare
from peftkern.tools.bench.shapes import SHAPES, Shape

from .alternation import alternate, interval, interval_text
from .common import Row, progress, show, write
from .native_calls import FUNCTIONS, Library, Packed, pack

SLOWER = 0.97

#: What the ten training shapes leave out: short rows, a head dim that is no power of two, cached keys.
OTHERS = (
    Shape(32, 9, 3, 32, 64, 16, model="short rows"),
    Shape(2, 32, 32, 512, 80, 64, model="Phi-2-like, head dim 80"),
    Shape(32, 32, 8, 1, 128, 512, cached=127, model="decode"),
    Shape(4, 32, 8, 16, 128, 256, cached=1008, model="decode, 16 at once"),
)
LISTS = {"training": SHAPES["training"], "others": OTHERS, "decode": SHAPES["decode"], "quick": SHAPES["quick"]}


def difference(expected: dict[str, Tensor], found: dict[str, Tensor]) -> float:
    """The largest difference of any tensor, relative to its largest value.

    0 means equal bit for bit, NaN that only one of them is a number.
    """
    largest = 0.0
    for name, x in expected.items():
        if x.numel() == 0 or torch.equal(*(y.contiguous().view(torch.uint8) for y in (x, found[name]))):
            continue
        apart = (x.double() - found[name].double()).abs().max().item()
        relative = apart / x.double().abs().max().clamp_min(1e-300).item()
        if math.isnan(relative):
            return math.nan
        largest = max(largest, relative, 5e-324)  # -0 and 0 differ
    return largest


def results(library: Library, packed: Packed, direction: str) -> dict[str, Tensor]:
    """Copies of what a call writes, into memory that held NaN before."""
    for x in packed.results[direction].values():
        x.fill_(math.nan)
    library.run(direction, packed.structs[direction])
    return {name: x.clone() for name, x in packed.results[direction].items()}


def measure(shape: Shape, dtype: str, isa: str, threads: int, options: argparse.Namespace) -> list[Row]:
    """A row per direction."""
    baseline, candidate = libraries = options.libraries
    torch.set_num_threads(threads)
    problem = Problem.make(shape, DTYPES[dtype])
    packed = pack(problem, isa, threads)
    peft = prepare("peft", problem) if options.peft else None
    rows: list[Row] = []
    for direction in FUNCTIONS:
        baseline.run("forward", packed.structs["forward"])  # what both builds' backward reads
        found = results(candidate, packed, direction)
        differs = difference(results(baseline, packed, direction), found)  # leaves the baseline's for backward
        struct = packed.structs[direction]
        calls: dict[str, Callable[[], object]] = {
            "baseline": functools.partial(baseline.run, direction, struct),
            "candidate": functools.partial(candidate.run, direction, struct),
        }
        if isinstance(peft, Calls) and (call := peft.of(direction)):
            calls["peft"] = call
        times = alternate(calls, options.seconds, options.at_least)
        ratios = [old / new for old, new in zip(times["baseline"], times["candidate"], strict=True)]
        ratio, (low, high) = statistics.median(ratios), interval(ratios)
        row: Row = key_columns(shape) | {"dtype": dtype, "direction": direction, "threads": threads}
        row["isa"] = (
            isa if isa != "auto" else "/".join(dict.fromkeys(x.default_isa(DTYPES[dtype]) for x in libraries))
        )
        row |= {f"{name}_ms": statistics.median(found) * 1e3 for name, found in times.items()}
        row |= {"ratio": ratio, "low": low, "high": high, "rounds": len(ratios)}
        row |= {"slower": ratio < SLOWER and high < 1, "equal": differs == 0, "differs": differs}
        if "peft" in times:
            row["over_peft"] = row["peft_ms"] / row["candidate_ms"]
        rows.append(row | {"baseline": baseline.name, "candidate": candidate.name} | stamp())
    return rows


def show_rows(rows: list[Row], with_peft: bool) -> None:
    """Print the rows, and the geometric mean and the least ratio of each group of rows."""
    names = ["shape", "D", "dtype", "direction", "thr", "isa", "baseline ms", "candidate ms", "ratio", "95%"]
    names += ["", "results", *(["over PEFT"] if with_peft else [])]

    def line(r: Row) -> list[str]:
        cached = f"+{r['cached']}" if r["cached"] else ""
        sizes = f"{r['model']}: B={r['B']} {r['Hq']}/{r['Hkv']} S={r['S']}{cached} P={r['P']}"
        cells = [sizes, str(r["D"]), r["dtype"], r["direction"], str(r["threads"]), r["isa"]]
        cells += [f"{r[f'{name}_ms']:.3f}" for name in ("baseline", "candidate")]
        cells += [f"{r['ratio']:.3f}", interval_text(r["low"], r["high"]), "SLOWER" if r["slower"] else ""]
        cells.append("equal" if r["equal"] else f"differs by {r['differs']:.1e}")
        return cells + ([f"{r['over_peft']:.2f}"] if "over_peft" in r else ["-"] if with_peft else [])

    show(f"{rows[0]['baseline']} against {rows[0]['candidate']}", names, map(line, rows))
    groups: dict[tuple[str, ...], list[Row]] = {}
    for r in rows:
        groups.setdefault((r["isa"], r["dtype"], r["direction"], str(r["threads"])), []).append(r)
    show(
        "ratio over the shapes",
        ("isa", "dtype", "direction", "thr", "geometric mean", "least", "slower", "not equal"),
        ([*key, f"{math.exp(statistics.fmean(math.log(r['ratio']) for r in found)):.3f}",
          f"{min(r['ratio'] for r in found):.3f}", str(sum(r["slower"] for r in found)),
          str(sum(not r["equal"] for r in found))] for key, found in groups.items()),
    )  # fmt: skip


def isas_of(wanted: Sequence[str], libraries: Sequence[Library]) -> list[str]:
    """The instruction sets to compare; "all" stands for those that both builds have on this processor.

    Raises:
        ValueError: for one that a build does not have.
    """
    both = [isa for isa in libraries[0].isas if all(isa in x.isas for x in libraries)]
    names = list(dict.fromkeys(itertools.chain.from_iterable(both if name == "all" else [name] for name in wanted)))
    for name in names:
        if name != "auto" and name not in both:
            raise ValueError(f"--isas: expected some of auto, {', '.join(both)}, which both builds have, got {name}")
    return names


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--baseline", type=Path, required=True, help="libpeftkern_cpu.so of the older build")
    add("--candidate", type=Path, required=True, help="libpeftkern_cpu.so of the newer build")
    add("--shapes", nargs="+", choices=LISTS, default=["training", "others"], help="default %(default)s")
    add("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16", "fp16"], help="default %(default)s")
    add("--isas", nargs="+", choices=[*ISAS, "all"], default=["auto"], help="default %(default)s")
    add("--threads", type=int, nargs="+", default=[1, 2], help="default %(default)s")
    add("--seconds", type=float, default=2.0, help="time per row (default %(default)s)")
    add("--at-least", type=int, default=9, help="rounds per row, even if they take longer (default %(default)s)")
    add("--equal", action="store_true", help="exit with status 1 unless all results are equal bit for bit")
    add("--peft", action="store_true", help="time PEFT's way as well")
    add("--output", type=Path, help="CSV file")
    options = parser.parse_args(arguments)
    try:
        options.libraries = [Library(options.baseline), Library(options.candidate)]
        options.isas = isas_of(options.isas, options.libraries)
    except ValueError as error:
        parser.error(str(error))
    return options


def main(arguments: list[str] | None = None) -> list[Row]:
    """Compare, print, write, return the rows.

    Raises:
        SystemExit: with status 1 for slower rows, for NaN in one build only, and with ``--equal`` for results that
            differ.
    """
    options = parse(arguments)
    tasks = [
        (f"{shape}, {dtype}, {isa}, threads={threads}",
         functools.partial(measure, shape, dtype, isa, threads, options))
        for isa, threads, dtype in itertools.product(options.isas, options.threads, options.dtypes)
        for name in options.shapes for shape in LISTS[name]
    ]  # fmt: skip
    rows: list[Row] = []
    threads = torch.get_num_threads()
    try:
        for row in progress(tasks):
            rows.append(row)
            if options.output:
                write(rows, options.output)
    finally:
        torch.set_num_threads(threads)
        if rows:
            show_rows(rows, options.peft)
    if any(row["slower"] or math.isnan(row["differs"]) or (options.equal and not row["equal"]) for row in rows):
        raise SystemExit(1)
    return rows


if __name__ == "__main__":
    main()
