# SPDX-License-Identifier: Apache-2.0
"""Prefix attention on this machine: what peftkern gains over each alternative, and where it loses.

    peftkern bench                                                  one shape, every provider
    peftkern bench --model llama-3-8b --seq 512 1024 --prefix 16 64 --batch 1 4 --output results
    peftkern bench --from results/attention.csv                     the report of rows that are there

Every provider is compared with fp64 before it is timed; one that is wrong is reported as wrong, without a time. The
providers take turns, so that a slow moment of the machine hits all of them. On a GPU, calls find the L2 cache cold.
Rows are written to --output as they come: Ctrl-C keeps them, and --resume goes on after them.

Needs: pip install "peftkern[bench]"
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

from .options import BenchError, add_arguments, check

__all__ = ["add_arguments", "run"]


def run(options: argparse.Namespace) -> int:
    """Measure and show: 0, 1 where a provider of ours was wrong or failed, 2 for what the user can put right."""
    needs = ["torch", "rich"] + ["pandas", "matplotlib"] * bool(options.output or options.source)
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    try:
        if missing:
            raise BenchError(f'not installed: {", ".join(missing)}. Install with `pip install "peftkern[bench]"`.')
        if options.calibrate:
            return _calibrate(options)
        from .session import run_session

        return run_session(options)
    except (BenchError, OSError) as error:  # OSError: a full disk, say
        print(f"peftkern bench: error: {error}", file=sys.stderr)
        return 2


def _calibrate(options: argparse.Namespace) -> int:
    """Write the file that ``auto`` reads; 0."""
    import torch

    from .. import calibrate

    check(options)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    file = calibrate.calibrate(device, 20 * options.seconds, note=print)
    print(f"'auto' chooses by {file} from now on; delete it to go back")
    return 0
