# SPDX-License-Identifier: Apache-2.0
"""Compare whole models: stock PEFT, PEFT + peftkern, and the model without a prefix.

    python -m benchmarks.end_to_end patch                      training steps, longest sequence, generation
    python -m benchmarks.end_to_end patch --part generate --models llama-3-8b --layers 1
    python -m benchmarks.end_to_end no-prefix                  training steps compared with the model without a prefix
    python -m benchmarks.end_to_end packing                    training steps with prompts run once, without padding
    python -m benchmarks.end_to_end decoding                   decoding with dynamic, static and compiled caches

Providers take turns in one process and are checked in fp32 before they are timed. Times are medians; a spread is
(third - first quartile) / median. Each command writes a CSV file in benchmarks/results.
"""

from __future__ import annotations

import argparse
import warnings

from transformers import logging
from transformers.utils.logging import disable_progress_bar

from . import decoding, no_prefix, packing, patch


def main(arguments: list[str] | None = None) -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.end_to_end", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    commands = parser.add_subparsers(metavar="command", required=True)
    modules = {"patch": patch, "no-prefix": no_prefix, "packing": packing, "decoding": decoding}
    for name, module in modules.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    logging.set_verbosity_error()
    disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)  # from transformers and PEFT
    options.run(options)


if __name__ == "__main__":
    main()
