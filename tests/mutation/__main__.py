# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.mutation --seed 0 --count 100``: fails if fewer than 95 % of the mutants are caught."""

from __future__ import annotations

import argparse
import functools
import os
import sys

from . import campaign, mutants


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="draws another sample (default 0)")
    parser.add_argument("--count", type=int, default=100, help="size of the sample (default 100)")
    parser.add_argument("--under", default="", help="mutate only files whose path starts with this")
    parser.add_argument(
        "--budget",
        type=float,
        default=60,
        help="seconds of tests that a mutant must survive, as recorded",
    )
    parser.add_argument(
        "--keep-caught", action="store_true",
        help="after a change, run only mutants that survived before or are new; the others count as caught",
    )  # fmt: skip
    parser.add_argument(
        "--recorded", action="store_true",
        help="use only test files whose lines are recorded; recording those in Triton's interpreter takes long",
    )  # fmt: skip
    options = parser.parse_args()
    say = functools.partial(print, flush=True)
    run = campaign.Campaign(say=say, budget=options.budget)
    try:
        everything = [x for x in mutants.all_of(run.copy) if x.path.startswith(options.under)]
        sample = mutants.sample(everything, options.seed, options.count)
        say(f"{len(sample)} of {len(everything)} mutants, seed {options.seed}; results in {run.results_file}")
        run.prepare(only=() if options.recorded else None)
        results = run.run(sample, options.keep_caught)
        unreliable = run.unreliable(results)
    except campaign.CampaignError as error:
        say(f"stopped: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; the same command goes on from here")
        return 130
    finally:
        run.close()
    campaign.report(results, say)
    if unreliable:
        say(f"these tests fail without a mutant too: {', '.join(sorted(unreliable))}")
    return int(bool(unreliable) or campaign.share_caught(results) < campaign.REQUIRED)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # past the leak reports of preloaded libraries
