# SPDX-License-Identifier: Apache-2.0
"""Check and measure peftkern on a new GPU, in one command that stops after nine minutes, from a plain checkout.

    python benchmarks/gpu_day_one.py                 into the folder gpu-day-one
    python benchmarks/gpu_day_one.py --dry-run       on a CPU with tiny sizes, to see that everything runs

Each stage runs in a process of its own with a time limit. If one fails, crashes or hangs, that is reported and the
others continue. A stage writes its result when it ends, so the same command continues an interrupted run;
`--again STAGE` runs one again. Only torch, triton, transformers and peft must be installed; native libraries are
built if their tools are there. The folder receives report.md, a JSON file and a log per stage, and tables as CSV.

Exit status: 0 if no stage failed, else 1.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the checkout, from any folder

from benchmarks.day_one.child import child
from benchmarks.day_one.plan import DONE, LIMIT
from benchmarks.day_one.runner import run_all


def main(arguments: list[str] | None = None) -> int:
    """Run the stages without a result; 1 if a stage failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("gpu-day-one"))
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on the CPU and in Triton's interpreter")
    parser.add_argument("--only", nargs="+", default=[], metavar="STAGE")
    parser.add_argument("--again", nargs="+", default=[], metavar="STAGE", help="run finished stages again")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all stages (default %(default)s)")
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
