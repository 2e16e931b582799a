# SPDX-License-Identifier: Apache-2.0
"""Options of ``peftkern bench``, checked before anything is measured. Standard library only."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path

from .shapes import DIRECTIONS, MODELS, SHAPES

_DTYPES = ("bf16", "fp16", "fp32")


class BenchError(ValueError):
    """An error that the user can correct; the message says how. Shown without a traceback, with exit status 2."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``peftkern bench``."""
    add = parser.add_argument
    add(
        "--model",
        nargs="+",
        metavar="NAME",
        default=["llama-3.2-1b"],
        help=f"attention of these models: {', '.join(MODELS)}; default llama-3.2-1b",
    )
    add("--seq", type=int, nargs="+", metavar="S", default=[512], help="queries per sample; default 512")
    add("--prefix", type=int, nargs="+", metavar="P", default=[64], help="prefix tokens; default 64")
    add("--batch", type=int, nargs="+", metavar="B", default=[1], help="samples; default 1")
    add("--cached", type=int, metavar="N", default=0, help="keys before the queries, as in decoding; default 0")
    add("--shapes", choices=sorted(SHAPES), help="a fixed list of shapes in place of the five options above")
    add("--dtype", nargs="+", metavar="DTYPE", default=["bf16"], help=f"{', '.join(_DTYPES)}; default bf16")
    add(
        "--direction", nargs="+", metavar="DIRECTION", default=["forward", "forward+backward"],
        help=f"{', '.join(DIRECTIONS)}; default forward forward+backward",
    )  # fmt: skip
    add("--providers", nargs="+", metavar="NAME", help="names from --list; default all that are worth timing here")
    add("--device", metavar="cpu|cuda", help="default cuda if torch finds a GPU")
    add("--threads", type=int, nargs="+", metavar="N", help="CPU threads; default torch's number")
    add("--seconds", type=float, default=3.0, help="time per shape and direction; default 3")
    add("--cpu-time", action="store_true", help="measure processor time on one thread, for busy machines")
    add("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak and saved memory")
    add("--output", type=Path, metavar="FOLDER", help="folder for attention.csv, report.html and report.md")
    add("--resume", action="store_true", help="continue after the rows in --output")
    add("--from", dest="source", type=Path, metavar="CSV", help="measure nothing, report on this file")
    add(
        "--calibrate", action="store_true",
        help="time the backends for 20 x --seconds, so that auto chooses by measured times, and stop",
    )  # fmt: skip
    add("--list", action="store_true", help="list providers and models, and stop")


def at_least(name: str, values: Iterable[float], least: float) -> None:
    """Check that no value is smaller than ``least``.

    Raises:
        BenchError: with the option, the expected and the given value.
    """
    for value in values:
        if not value >= least:
            raise BenchError(f"{name}: expected at least {least}, got {value}")


def some_of(name: str, values: Iterable[str], known: Sequence[str]) -> None:
    """Check that every value is one of ``known``.

    Raises:
        BenchError: with the option, the expected and the given value.
    """
    for value in values:
        if value not in known:
            raise BenchError(f"{name}: expected some of {', '.join(known)}, got {value!r}")


def check(options: argparse.Namespace) -> None:
    """Check the options, apart from what depends on the machine.

    Raises:
        BenchError: with the option, the expected and the given value.
    """
    some_of("--model", options.model, list(MODELS))
    some_of("--dtype", options.dtype, _DTYPES)
    some_of("--direction", options.direction, DIRECTIONS)
    some_of("--device", [options.device] if options.device else [], ("cpu", "cuda"))
    for name, least in (("seq", 1), ("prefix", 0), ("batch", 1)):
        at_least(f"--{name}", getattr(options, name), least)
    at_least("--cached", [options.cached], 0)
    at_least("--threads", options.threads or [], 1)
    at_least("--seconds", [options.seconds], 0)
    if options.cpu_time and (options.device == "cuda" or (options.threads or [1]) != [1]):
        raise BenchError(
            f"--cpu-time: expected --device cpu --threads 1, got --device {options.device} "
            f"--threads {' '.join(map(str, options.threads or ['default']))}"
        )
    if options.resume and options.output is None:
        raise BenchError("--resume: expected --output with the folder to continue in, got none")
    if options.output is not None and options.output.exists() and not options.output.is_dir():
        raise BenchError(f"--output: expected a folder, got the file {options.output}")
    path = None if options.output is None else options.output / "attention.csv"
    if path is not None and path.exists() and not options.resume:
        raise BenchError(f"--output: expected a folder without results, got {path}: add --resume to continue with it")
    if options.source is not None and not options.source.is_file():
        raise BenchError(f"--from: expected a CSV file, got {options.source}")
