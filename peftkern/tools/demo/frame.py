# SPDX-License-Identifier: Apache-2.0
"""What the sessions of all methods share: console, Ctrl-C, and the folder of the results."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from .options import DemoError
from .progress import LogTicker

__all__ = ["check_threads", "make_folder", "quiet_libraries", "run_framed"]

#: Exit status after Ctrl-C, as in shells: 128 + SIGINT.
_INTERRUPTED = 130


def run_framed(
    args: argparse.Namespace,
    run: Callable[[argparse.Namespace, Console, LogTicker], int],
    stopped: Callable[[argparse.Namespace, Console], None],
) -> int:
    """Run a session, and return its exit status.

    Args:
        args: the command line.
        run: the session.
        stopped: prints what was saved and how to continue; called after Ctrl-C.
    """
    console = Console(highlight=False, soft_wrap=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # between transformers and peft
        try:
            with LogTicker(console) as ticker:
                return run(args, console, ticker)
        except KeyboardInterrupt:
            stopped(args, console)
            return _INTERRUPTED


def check_threads(threads: int | None) -> None:
    """Raise DemoError for a number of threads below 1."""
    if threads is not None and threads < 1:
        raise DemoError(f"--threads: expected at least 1, got {threads}")


def make_folder(out: Path) -> None:
    """Make the folder of the results, unless it is there.

    Raises:
        DemoError: if nothing can be written into it.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise DemoError(f"--out {out}: cannot be written ({error.strerror})") from error


def quiet_libraries() -> None:
    """Silence the progress bars and warnings of transformers."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
