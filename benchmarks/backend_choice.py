# SPDX-License-Identifier: Apache-2.0
"""Compare the backend that `auto` chooses with the fastest one: every backend that can run a call takes turns.

    python -m benchmarks.backend_choice                   shapes and features on the CPU
    python -m benchmarks.backend_choice --device cuda

A row per call: the time of each backend, the choice of `auto`, and its time relative to the fastest backend. Writes
results/backend_choice_DEVICE.csv.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import peftkern
from peftkern.arguments import Call
from peftkern.tools import calibrate
from peftkern.tools.bench.measuring import stamp, time_backends
from peftkern.tools.bench.providers import DTYPES

from .common import RESULTS, progress, show, write

#: The shapes of the calibration, and others: (B, Hq, Hkv, S, T, D, P).
SHAPES = (
    *calibrate.SHAPES, (1, 1, 1, 1, 1, 8, 1), (1, 1, 1, 2, 2, 16, 0), (3, 4, 2, 17, 17, 40, 7),
    (1, 9, 3, 333, 333, 64, 130), (16, 9, 3, 31, 31, 64, 20), (1, 4, 4, 64, 64, 64, 4096),
    (64, 9, 3, 1, 128, 64, 128),
)  # fmt: skip
FEATURE_SHAPE = (2, 4, 2, 96, 96, 64, 24)


def features() -> dict[str, Callable[[], dict[str, Any]]]:
    """Options for calls of FEATURE_SHAPE, by feature."""
    batch, heads, _, queries, keys, _, prefix = FEATURE_SHAPE
    return {
        "non-causal": lambda: {"causal": False},
        "key_mask": lambda: {"key_mask": torch.arange(keys) < torch.tensor([[keys], [keys // 2]])},
        "window": lambda: {"window": 32},
        "softcap": lambda: {"softcap": 20.0},
        "sinks": lambda: {"sinks": torch.zeros(heads)},
        "bias": lambda: {"bias": torch.zeros(1, heads, queries, keys)},
        "prefix_bias": lambda: {"prefix_bias": torch.zeros(heads, prefix)},
        "gate": lambda: {"gate": torch.ones(heads)},
        "dropout": lambda: {"dropout_p": 0.1, "dropout_seed": 7},
        "bank": lambda: {"prefix_ids": torch.tensor([1, 0][:batch])},
    }


def cases(device: torch.device, dtypes: list[str]) -> Iterator[tuple[Call, dict[str, Any]]]:
    """Calls and their options."""
    for name in dtypes:
        dtype = DTYPES[name]
        for training in (False, True):
            for shape in SHAPES:
                yield calibrate.call_of_shape(shape, device, dtype, training), {}
            for feature, options in features().items():
                call = calibrate.call_of_shape(FEATURE_SHAPE, device, dtype, training)
                prefix = (2, *call.prefix_shape) if feature == "bank" else call.prefix_shape
                given = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in options().items()}
                yield replace(call, features=(feature,), prefix_shape=prefix), given


def measure(call: Call, options: dict[str, Any], seconds: float, at_least: int = 5) -> dict[str, object]:
    """One row."""
    explanation = peftkern.explain(call)
    names = [name for name, reasons in explanation.reasons.items() if not reasons]
    costs = time_backends(call, names, seconds, at_least, options)
    times = {name: cost.seconds for name, cost in costs.items()}
    chosen = explanation.chosen
    assert chosen is not None
    row = {"call": str(call), "dtype": str(call.dtype).removeprefix("torch."), "training": call.needs_grad}
    row |= {f"{name}_ms": value * 1e3 for name, value in times.items()}
    return row | {"chosen": chosen, "over_best": times[chosen] / min(times.values())} | stamp()


def main(arguments: list[str] | None = None) -> list[dict[str, object]]:
    """Measure, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["fp32", "bf16"])
    parser.add_argument("--seconds", type=float, default=0.5, help="time per call (default %(default)s)")
    parser.add_argument("--output", type=Path, help="CSV file; default benchmarks/results/backend_choice_DEVICE.csv")
    parser.add_argument("--quick", action="store_true", help="every ninth call, and write nothing")
    options = parser.parse_args(arguments)
    calls = list(cases(torch.device(options.device), options.dtypes))[:: 9 if options.quick else 1]
    seconds, rounds = (0.0, 2) if options.quick else (options.seconds, 5)
    rows = list(progress([
        (str(call), lambda call=call, given=given: [measure(call, given, seconds, rounds)]) for call, given in calls
    ]))  # fmt: skip
    names = [name for name in peftkern.backends.BACKENDS if any(f"{name}_ms" in row for row in rows)]
    time = functools.partial("{:.3f}".format)
    show("milliseconds per backend, and the choice of 'auto'", ("call", *names, "auto", "over the best"), (
        [str(row["call"]), *(time(row[f"{n}_ms"]) if f"{n}_ms" in row else "-" for n in names), str(row["chosen"]),
         f"{row['over_best']:.2f}"]
        for row in rows
    ))  # fmt: skip
    output = options.output or (None if options.quick else RESULTS / f"backend_choice_{options.device}.csv")
    if output:
        write(rows, output)
    return rows


if __name__ == "__main__":
    main()
