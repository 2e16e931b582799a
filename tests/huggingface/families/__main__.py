# SPDX-License-Identifier: Apache-2.0
"""Runs every causal family of transformers, made tiny, and writes what comes out as a table.

::

    python -m tests.huggingface.families --output docs/families.md

takes a few minutes on one core. Each family that is done adds a line to a file of results, so an interrupted run goes
on where it stopped; results of other versions or sources do not count.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from tests.huggingface.families import records
from tests.huggingface.families.sweep import Family, sweep
from tests.huggingface.families.tiny import FAMILIES


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.huggingface.families",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, help="the table, in Markdown; default: none is written")
    parser.add_argument("--json", type=Path, help="the file of results; default: the output's name with .jsonl")
    parser.add_argument("--only", nargs="+", metavar="FAMILY", choices=FAMILIES, help="run these families")
    parser.add_argument("--shard", default="1/1", metavar="I/N", help="run the I-th of N parts (1 to N)")
    parser.add_argument("--again", action="store_true", help="run families whose results are there")
    options = parser.parse_args(given)
    if options.output is None and options.json is None:
        parser.error("expected --output, --json or both")
    try:
        part, parts = map(int, options.shard.split("/"))
        names = list(options.only or FAMILIES)[part - 1 :: parts]
        if not 1 <= part <= parts:
            raise ValueError
    except ValueError:
        parser.error(f"--shard: expected I/N with 1 <= I <= N, got {options.shard}")
    options.names = names
    options.json = options.json or options.output.with_suffix(".jsonl")
    return options


def main(given: list[str] | None = None) -> int:
    """Runs what is left, writes the table of all results. 1 if there are faults, 130 if interrupted."""
    options = arguments(given)
    torch.set_num_threads(1)
    under = records.conditions()
    known = records.read(options.json, under)
    left = [name for name in options.names if options.again or name not in known]
    print(f"{len(left)} families to run, {len(options.names) - len(left)} done before ({options.json})", flush=True)
    interrupted, begin = False, time.perf_counter()
    try:
        for index, name in enumerate(left, 1):
            start = time.perf_counter()
            family = sweep(name)
            now = time.perf_counter()
            records.append(options.json, family, now - start, under)
            rest = (now - begin) / index * (len(left) - index)
            print(f"[{index}/{len(left)}, {rest:.0f} s left] {summary(family)}", flush=True)
    except KeyboardInterrupt:
        interrupted = True
        print(f"interrupted; the same command goes on from {options.json}", file=sys.stderr)
    families = records.read(options.json, under)
    if options.output is not None and families:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(records.table(families, under))
        print(f"wrote {options.output}")
    faults = [family for name, family in families.items() if name in options.names and family.failures]
    print(f"{len(faults)} families with faults{': ' if faults else ''}{', '.join(family.name for family in faults)}")
    return 130 if interrupted else int(bool(faults))


def summary(family: Family) -> str:
    """One line, and one for each fault and each refusal that explains nothing."""
    if not family.cells:
        return f"{family.name}: not built: {family.not_built}"
    outcomes = ", ".join(f"{name} {cell.outcome}" for name, cell in family.cells.items())
    shown = {name: cell for name, cell in family.cells.items() if name in family.failures or not cell.is_clear}
    faults = "".join(f"\n    {name} {cell.outcome}: {cell.detail}" for name, cell in shown.items())
    return f"{family.name}: {outcomes}{faults}"


if __name__ == "__main__":
    sys.exit(main())
