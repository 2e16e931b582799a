# SPDX-License-Identifier: Apache-2.0
"""The command ``peftkern``, also ``python -m peftkern``.

This module imports only the standard library, so that ``peftkern doctor`` runs if everything else is broken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .. import __version__
from . import bench, build_wheel, demo, doctor, export


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands. Each sets ``run``, a function from its options to the exit status."""
    parser = argparse.ArgumentParser(
        prog="peftkern", description="Fast training of prefixes, cartridges and soft prompts on Hugging Face models."
    )
    parser.add_argument("--version", action="version", version=f"peftkern {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True)
    modules = {"doctor": doctor, "bench": bench, "demo": demo, "export": export, "build-wheel": build_wheel}
    for name, module in modules.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(
            name, help=summary, description=module.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand and return its exit status: 0, 1 for a failure, 2 for wrong arguments, 130 after Ctrl-C."""
    options = build_parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `peftkern doctor | head`
        sys.stderr.close()
        return 1


if __name__ == "__main__":
    sys.exit(main())
