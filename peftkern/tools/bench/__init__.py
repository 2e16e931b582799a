# SPDX-License-Identifier: Apache-2.0
"""Time prefix attention by peftkern and by its alternatives on this machine.

    peftkern bench                                                  one shape, every provider
    peftkern bench --model llama-3-8b --seq 512 1024 --prefix 16 64 --batch 1 4 --output results
    peftkern bench --shapes training --dtype bf16 fp32 --output results
    peftkern bench --from results/attention.csv                     report on existing rows

Every provider is compared with fp64 before it is timed; a wrong one is reported without a time. Providers take turns,
so that a slow moment of the machine hits all of them. On a GPU, calls find a cold L2 cache. Rows are written to
--output as they are measured: Ctrl-C keeps them, and --resume continues after them.

Needs: pip install "peftkern[bench]"
"""

from __future__ import annotations

import argparse
import importlib.util
import sys

from .options import BenchError, add_arguments, check

__all__ = ["add_arguments", "run"]


def run(options: argparse.Namespace) -> int:
    """Run the benchmark; 1 if a peftkern provider was wrong or failed, 2 for errors that the user can correct."""
    needs = ["torch", "rich"] + ["matplotlib"] * bool(options.output or options.source)
    missing = [name for name in needs if importlib.util.find_spec(name) is None]
    try:
        if missing:
            raise BenchError(f'not installed: {", ".join(missing)}. Install with `pip install "peftkern[bench]"`.')
        if options.calibrate:
            return _calibrate(options)
        from .session import run_session

        return run_session(options)
    except BrokenPipeError:  # nobody reads the output any more
        raise
    except (BenchError, OSError) as error:  # OSError: for example a full disk
        print(f"peftkern bench: error: {error}", file=sys.stderr)
        return 2


def _calibrate(options: argparse.Namespace) -> int:
    """Write the file that ``auto`` reads."""
    import torch

    from .. import calibrate

    check(options)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    file = calibrate.calibrate(device, 20 * options.seconds, note=print)
    print(f"'auto' chooses by {file} from now on; delete the file to undo this")
    return 0
