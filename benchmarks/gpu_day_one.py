# SPDX-License-Identifier: Apache-2.0
"""Check and measure peftkern on a new GPU, in one command that stops after nine and a half minutes.

    python benchmarks/gpu_day_one.py --prepare FOLDER      before, on any machine with nvcc: build the libraries
    python benchmarks/gpu_day_one.py --prepared FOLDER     on the GPU, into the folder gpu-day-one
    python benchmarks/gpu_day_one.py --leftover            if minutes are left: sanitizer, ncu, calibration
    python benchmarks/gpu_day_one.py --dry-run             on a CPU with tiny sizes, to see that everything runs

Only torch, triton, transformers and peft must be installed. Nothing is downloaded, and the checkout need not
be installed. Without --prepared, the libraries in the package are used, if there are any.

Each step runs in a process of its own, and each phase has a share of the time. An item that fails, crashes or
hangs is reported, and the others continue. What a phase leaves of its share goes to the steps that ran out of
time. If a result of the first phase is wrong, the run stops after the second phase, which checks every feature.

Results are written as they are made. A kill loses the running items only, and the same command continues. The folder
receives at most eight files: report.md, results.json with everything, tables as CSV, and the logs. They are copied to
--pack, by default to $OUT if it is set. results.json alone suffices to continue a run.

Exit status: 0, 1 if something is wrong, 3 if nothing is wrong but the time did not suffice for everything.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from any folder

from benchmarks.day_one import plan
from benchmarks.day_one.report import Report, restore
from benchmarks.day_one.runner import Run


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("gpu-day-one"), help="for the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU and in Triton's interpreter")
    parser.add_argument("--leftover", action="store_true", help="sanitizer, ncu and calibration")
    parser.add_argument("--prepare", type=Path, metavar="FOLDER", help="build the libraries into a folder and stop")
    parser.add_argument("--prepared", type=Path, metavar="FOLDER", help="use the libraries of this folder")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP")
    parser.add_argument("--again", nargs="+", default=[], metavar="STEP", help="run all items of a step again")
    parser.add_argument("--limit", type=float, help=f"seconds for the run (default {plan.LIMIT:g}; --leftover 185)")
    parser.add_argument("--keep-going", action="store_true", help="measure even if a result is wrong")
    parser.add_argument("--pack", type=Path, default=os.environ.get("OUT"), help="copy the results to this folder")
    parser.add_argument("--planted", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--step", help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps that have items left."""
    options = parse(arguments)
    if options.prepare is not None:
        from benchmarks.day_one.prepare import prepare

        return prepare(options.prepare.absolute())
    if options.step:
        from benchmarks.day_one.child import child

        every = plan.steps(plan.PHASES + plan.LEFTOVER + plan.PLANTED)
        child(every[options.step], options.folder, options.limit, options.dry_run)
        return 0
    if options.prepared is not None:
        from benchmarks.day_one.prepare import use

        use(options.prepared.absolute())
    phases = plan.LEFTOVER if options.leftover else plan.PLANTED if options.planted else plan.PHASES
    folder = options.folder.absolute()
    raw = folder / "raw"
    restore(folder, raw)
    for name in options.again:
        (raw / f"{name}.jsonl").unlink(missing_ok=True)
    pack = None if options.pack is None else Path(options.pack).absolute()
    report = Report(
        folder, raw, plan.PLANTED if options.planted else plan.PHASES + plan.LEFTOVER, options.dry_run, pack
    )
    limit = options.limit or sum(phase.share for phase in phases) + plan.REPORTING
    run = Run(raw, phases, report, options.dry_run, tuple(options.only), limit, 0.5 if options.planted else 4.0)
    status = run.run(options.keep_going)
    print(f"{folder / 'report.md'}: exit status {status}")
    return status


if __name__ == "__main__":
    sys.exit(main())
