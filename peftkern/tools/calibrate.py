# SPDX-License-Identifier: Apache-2.0
"""Measure the backends on this machine, so that ``"auto"`` chooses by measured times: :func:`calibrate`.

The result is a pair of scale factors per backend, dtype and kind of call. It is written to a file in the user's cache
folder, one for the CPU and one for the GPU, and scales the rates that come with the package. A file that is
malformed, has another format or comes from another machine is ignored with a warning.

On a GPU the factors describe the time of the GPU. The time that Python takes to launch the kernels depends on the CPU
and is hidden behind larger calls, so it is written beside them, under ``hosts``, and enters no factor.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..arguments import Call
from ..backends import registry
from ..backends.cost import measured, model
from ..backends.machine import identity, machine_of, registered_flash
from ..files import replace_file
from .bench.measuring import time_backends

#: (B, Hq, Hkv, S, T, D, P): tiny, ordinary, long prefix, long sequence, decoding.
SHAPES = (
    (1, 2, 2, 3, 3, 32, 2), (2, 4, 2, 64, 64, 64, 8), (4, 8, 2, 128, 128, 64, 16), (2, 8, 8, 512, 512, 64, 32),
    (2, 8, 2, 256, 256, 128, 512), (1, 8, 2, 1024, 1024, 128, 64),
    (1, 8, 2, 1, 64, 64, 8), (8, 8, 2, 1, 512, 64, 64), (16, 16, 4, 1, 256, 128, 1024), (1, 16, 4, 1, 4096, 128, 64),
)  # fmt: skip
LARGE = ((4, 32, 8, 1024, 1024, 128, 128), (4, 32, 8, 2048, 2048, 128, 64), (8, 32, 8, 512, 512, 128, 2048))


class Row(NamedTuple):
    """One measurement, and the uncalibrated model's seconds for it: ``launches`` and ``work``.

    ``seconds`` are those of the device. ``host`` are those that the CPU takes to launch the kernels of a GPU.
    """

    backend: str
    kind: str
    shape: tuple[int, ...]
    seconds: float
    launches: float
    work: float
    host: float = 0.0


def calibrate(
    device: torch.device | str = "cpu",
    seconds: float = 60.0,
    shapes: Iterable[tuple[int, ...]] | None = None,
    dtypes: Iterable[torch.dtype] = (torch.float32, torch.bfloat16),
    note: Callable[[str], object] = lambda line: None,
    at_most: float = math.inf,
    file: Path | None = None,
) -> Path:
    """Measure the backends and write the factors. Unless ``file`` is given, ``"auto"`` uses them from now on.

    Args:
        device: the CPU or a GPU.
        seconds: time for measurements, without the compilation of kernels.
        shapes: rows like :data:`SHAPES`; those by default, on a GPU after :data:`LARGE`.
        dtypes: dtypes to measure.
        note: called with a line for each measurement.
        at_most: seconds after which no further shape is started.
        file: where to write; the file that ``"auto"`` reads by default.

    Returns:
        The path of the file.
    """
    device = torch.device(device)
    if shapes is None:
        shapes = LARGE * (device.type == "cuda") + SHAPES
    end = time.monotonic() + at_most
    rows = list(measure(device, seconds, tuple(shapes), tuple(dtypes), note, end))
    used, file = file is None, file or measured.path(device)
    content = {
        "format": measured.FORMAT, "machine": identity(device), "date": time.strftime("%Y-%m-%d"),
        "scales": {name: list(scale) for name, scale in fit(rows).items()}, "hosts": hosts(rows),
        "rows": [row._asdict() for row in rows],
    }  # fmt: skip
    replace_file(file, json.dumps(content, indent=1).encode())
    if used:
        registry.forget()
    return file


def read_rows(file: Path) -> list[Row]:
    """The measurements in a file that :func:`calibrate` wrote."""
    return [Row(**{**row, "shape": tuple(row["shape"])}) for row in json.loads(file.read_text())["rows"]]


def fit(rows: Iterable[Row]) -> dict[str, tuple[float, float]]:
    """Per kind the factors (a, b) that minimize the sum of ((a launches + b work) / seconds - 1)^2.

    Both are the same factor if the rows cannot separate them, or if one would be negative.

    >>> rows = [Row("cpu", "x", (), 2 * a + 3 * b, a, b) for a, b in ((1.0, 1.0), (1.0, 10.0))]
    >>> {name: tuple(round(s, 6) for s in scale) for name, scale in fit(rows).items()}
    {'x': (2.0, 3.0)}
    """
    kinds: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        kinds.setdefault(row.kind, []).append((row.launches / row.seconds, row.work / row.seconds))
    return {name: _least_squares(points) for name, points in kinds.items()}


def hosts(rows: Iterable[Row]) -> dict[str, float]:
    """Per kind the median seconds that the CPU takes to launch the kernels of a GPU."""
    kinds: dict[str, list[float]] = {}
    for row in rows:
        if row.host:
            kinds.setdefault(row.kind, []).append(row.host)
    return {name: statistics.median(values) for name, values in kinds.items()}


def _least_squares(points: list[tuple[float, float]]) -> tuple[float, float]:
    aa, ab, bb = (sum(p[i] * p[j] for p in points) for i, j in ((0, 0), (0, 1), (1, 1)))
    a, b = (sum(p[i] for p in points) for i in (0, 1))
    determinant = aa * bb - ab * ab
    if determinant > 1e-9 * aa * bb:
        launches, work = (a * bb - b * ab) / determinant, (b * aa - a * ab) / determinant
        if launches >= 0 and work >= 0:
            return launches, work
    total = aa + 2 * ab + bb
    common = (a + b) / total if total else 1.0
    return common, common


def measure(
    device: torch.device,
    seconds: float,
    shapes: tuple[tuple[int, ...], ...],
    dtypes: tuple[torch.dtype, ...],
    note: Callable[[str], object],
    end: float = math.inf,
) -> Iterator[Row]:
    """Every backend that can run a shape, taking turns on it: medians, forward and forward with backward."""
    share = seconds / max(1, 2 * len(shapes) * len(dtypes))
    for dtype in dtypes:
        machine = machine_of(device, dtype, registered_flash(), torch.get_num_threads())
        for shape in shapes:
            for training in (False, True)[: 2 if shape[3] > 1 else 1]:
                if time.monotonic() > end:
                    note("out of time")
                    return
                call = call_of_shape(shape, device, dtype, training)
                costs = registry.costs(call, machine)
                plans = registry.runnable_plans(call)
                modelled = {name: model.price(costs.get(name), call, machine) for name in plans}
                names = [name for name, times in modelled.items() if times is not None]
                for name, cost in time_backends(call, names, share).items():
                    times = modelled[name]
                    assert times is not None
                    note(f"{call}: {name} {cost.seconds * 1e3:.4g} ms, modelled {sum(times) * 1e3:.4g} ms")
                    yield Row(name, model.kind(call, name), shape, cost.seconds, *times, cost.host)


def call_of_shape(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, training: bool) -> Call:
    """The call that a row of :data:`SHAPES` describes."""
    batch, heads, kv_heads, queries, keys, dim, prefix = shape
    return Call(
        "prefix_attention", device, dtype, dtype, (batch, heads, queries, dim), (batch, kv_heads, keys, dim),
        (kv_heads, prefix, dim), (), training,
    )  # fmt: skip
