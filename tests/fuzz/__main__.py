# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.fuzz --minutes 5 --seed 1``, or ``--case 1:17`` for one case in this process."""

from __future__ import annotations

import argparse
import functools
import time

from . import campaign


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, help="default: the time, for another one in each run")
    parser.add_argument("--case", help="run only this case, without a process of its own")
    options = parser.parse_args()
    if options.case:
        from peftkern import native

        from . import cases, worker

        case = cases.draw(options.case, native.cpu.available_isas())
        print(case, flush=True)
        worker.check(case)
        return 0
    seed = int(time.time()) if options.seed is None else options.seed
    _, _, failures = campaign.run(seed, options.minutes, functools.partial(print, flush=True))
    return int(bool(failures))


if __name__ == "__main__":
    raise SystemExit(main())
