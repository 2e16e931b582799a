# SPDX-License-Identifier: Apache-2.0
"""The command ``peftkern``, also ``python -m peftkern``.

This module imports only the standard library, so that ``peftkern doctor`` runs if everything else is broken.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from .. import __version__
from . import bench, build_wheel, demo, doctor, export


class _Parser(argparse.ArgumentParser):
    """A parser whose help text is not lost without an error if it cannot be written."""

    def print_help(self, file: Any = None) -> None:
        """Print the help text."""
        print(self.format_help(), end="", file=file)


class _Version(argparse.Action):
    """Prints the version and exits, also with an error."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"peftkern {__version__}")
        parser.exit()


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands. Each sets ``run``, a function from its options to the exit status."""
    parser = _Parser(
        prog="peftkern", description="Fast training of prefixes, cartridges and soft prompts on Hugging Face models."
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
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
    """Run a subcommand and return its exit status: 0, 1 for a failure, 2 for wrong arguments, 130 after Ctrl-C.

    A reader that closes its pipe (``peftkern doctor | head``) ends it without a word. A standard output that cannot
    be written, on a full disk, ends it with an error of one line.
    """
    status = 0
    try:
        try:
            options = build_parser().parse_args(arguments)
            status = int(options.run(options))
        finally:  # also after a help text, which leaves with SystemExit
            _flush_output()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _abandon_output()
        return status or 1
    except OSError as error:
        _abandon_output()
        if not status:  # otherwise the command has reported it
            with contextlib.suppress(OSError):
                print(f"peftkern: error: {error}", file=sys.stderr)
        return status or 1


def _flush_output() -> None:
    """Write what standard output holds. Raises OSError, naming it, if it cannot be written."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def _abandon_output() -> None:
    """Discard what standard output still holds, which Python would try to write again when it ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


if __name__ == "__main__":
    sys.exit(main())
