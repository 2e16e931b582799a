# SPDX-License-Identifier: Apache-2.0
"""Options of the cartridge demo. Standard library only."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..options import DemoError, check_same, flag

__all__ = ["QUICK", "Options", "add_arguments", "refuse", "resolve", "saved", "write"]

_FILE = "cartridge.json"


@dataclass(frozen=True)
class Options:
    """Everything that determines the numbers of a run."""

    length: int | None = None
    questions: int = 256
    eval_rows: int = 48
    steps: int = 160
    batch_size: int = 8
    answer: int = 40
    lr: float = 1e-2
    runs: int = 2
    compose: bool = True
    seed: int = 0
    model: str | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        least = {"length": 2, "questions": 1, "eval_rows": 2, "steps": 1, "batch_size": 1, "answer": 1, "runs": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise DemoError(f"{flag(name)}: expected at least {minimum}, got {value}")
        if not 0 < self.lr < math.inf:
            raise DemoError(f"--lr: expected a positive number, got {self.lr}")
        if self.compose and self.data is not None:
            raise DemoError(
                "--compose: expected --no-compose with --data, because the second document is ours, got both"
            )


#: Values of ``--quick``. Under 6 minutes on two idle cores with AVX2.
QUICK: dict[str, Any] = {
    "questions": 64, "eval_rows": 16, "steps": 32, "answer": 32, "runs": 1, "compose": False,
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options that the other methods have not."""
    quick = {name: f"default {getattr(Options, name)}, with --quick {value}" for name, value in QUICK.items()}
    group = parser.add_argument_group("--method cartridge", "defaults differ from those of the other methods")
    add = group.add_argument
    add("--questions", type=int, metavar="N", help=f"questions for training; {quick['questions']}")
    add("--answer", type=int, metavar="S", help=f"longest answer in tokens; {quick['answer']}")
    add("--runs", type=int, metavar="N", help=f"trainings with other orders of the questions; {quick['runs']}")
    add(
        "--compose",
        action=argparse.BooleanOptionalAction,
        help=f"also train the cartridges of two documents jointly; {quick['compose']}",
    )


def refuse(args: argparse.Namespace) -> None:
    """Raise DemoError for options of this method, given with another one."""
    for name in ("questions", "answer", "runs", "compose"):
        if getattr(args, name) is not None:
            raise DemoError(f"{flag(name)}: expected none without --method cartridge, got {getattr(args, name)}")


def resolve(args: argparse.Namespace, made_with: dict[str, Any] | None = None) -> Options:
    """Options from the command line, else those of the run in ``--out``, else ``--quick``, else the defaults.

    Raises:
        DemoError: for a value out of range, one that differs from the run's, or an option of other methods.
    """
    if args.seq is not None:
        raise DemoError("--seq: expected none with --method cartridge, whose answers have --answer tokens, got one")
    if args.dtype not in (None, "fp32"):
        raise DemoError(f"--dtype: expected fp32 with --method cartridge, got {args.dtype}")
    given = {f.name: value for f in fields(Options) if (value := getattr(args, f.name, None)) is not None}
    if made_with is not None:
        check_same(given, made_with, f"the run in {args.out}")
        return Options(**made_with)
    defaults = QUICK if args.quick else {}
    if "data" in given and "compose" not in given:
        defaults = {**defaults, "compose": False}
    return Options(**{**defaults, **given})


def saved(out: Path) -> dict[str, Any] | None:
    """The options of the run in a folder; None if there is none.

    Raises:
        DemoError: for a damaged file.
    """
    path = out / _FILE
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        return asdict(Options(**found))
    except (OSError, ValueError, TypeError) as error:
        raise DemoError(f"{path} cannot be read ({error}); remove {out} to start again") from error


def write(out: Path, options: Options) -> None:
    """Write the options of a run into its folder."""
    (out / _FILE).write_text(json.dumps(asdict(options), indent=1) + "\n")
