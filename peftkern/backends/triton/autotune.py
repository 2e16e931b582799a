# SPDX-License-Identifier: Apache-2.0
"""Opt-in tuning: ``PEFTKERN_AUTOTUNE=1`` times the neighbours of the table's tile and remembers the fastest.

The first call of each kind is timed before it runs. The timed runs write to outputs of their own. The fastest tiles
are written to a JSON file, which later processes read if the variable is set. Nothing is tuned while a CUDA graph is
captured. Tuned tiles may differ between machines, and so may the last bits of results. With the table's tiles they do
not.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from ...files import replace_file
from ...strict_json import json_object, read_bytes
from ...user_cache import user_cache
from .tiles import Direction, Tile, candidates

_tiles: dict[str, Tile] = {}  # tuned by this process, or read from the file
_read: Path | None = None  # the file that _tiles were read from
#: The tile that is being timed, in the thread that times it. It replaces every other tile of its direction.
_trial: ContextVar[tuple[Direction, Tile] | None] = ContextVar("trial", default=None)


def requested() -> bool:
    """Whether the user asked for tuning."""
    return os.environ.get("PEFTKERN_AUTOTUNE", "0") == "1"


def enabled() -> bool:
    """Whether the user asked for tuning, and this thread is not itself tuning."""
    return requested() and _trial.get() is None


def cache_file() -> Path:
    """The file of tuned tiles: in TRITON_CACHE_DIR, else in the user's cache folder.

    Raises:
        FileNotFoundError: for a user without a home folder.
    """
    if folder := os.environ.get("TRITON_CACHE_DIR"):
        return Path(folder) / "peftkern_tiles.json"
    return user_cache() / "tiles.json"


def key(arch: str, direction: Direction, dtype: torch.dtype, sizes: dict[str, int], options: tuple[str, ...]) -> str:
    """The key of all calls that share a tuned tile. Numbers of tokens are rounded up to powers of two.

    >>> key("sm_90", "dq", torch.bfloat16, {"D": 64, "S": 1000, "T": 1000, "P": 5}, ("window",))
    'sm_90 dq bfloat16 D64 S1024 T1024 P8 window'
    """
    rounded = {n: size if n in ("D", "Dv") else 1 << max(0, size - 1).bit_length() for n, size in sizes.items()}
    parts = [arch, direction, str(dtype).removeprefix("torch."), *(f"{n}{x}" for n, x in rounded.items()), *options]
    return " ".join(parts)


def chosen(direction: Direction, kind: str, default: Tile) -> Tile:
    """The tile for a kind of call: the one being timed, else the tuned one if tuning is enabled, else ``default``."""
    if (trial := _trial.get()) and trial[0] == direction:
        return trial[1]
    if not enabled():
        return default
    _read_file()
    return _tiles.get(kind, default)


def tune(direction: Direction, kind: str, default: Tile, run: Callable[[], Any]) -> None:
    """Time ``run``, which must have no side effects, with each candidate, unless the kind already has a tile."""
    _read_file()
    if kind in _tiles or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return
    times = {}
    for tile in candidates(default):
        token = _trial.set((direction, tile))
        try:
            times[tile] = _time(run)
        finally:
            _trial.reset(token)
    best = min(times, key=lambda tile: times[tile])
    if math.isfinite(times[best]):
        _tiles[kind] = best
        _write({kind: {"tile": list(best), "ms": times[best], "table": list(default), "table_ms": times[default]}})


def _time(run: Callable[[], Any]) -> float:
    """The median time in milliseconds; infinity if the tile does not fit the device."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    try:
        return float(do_bench(run, warmup=10, rep=40, return_mode="median"))
    except (OutOfResources, PTXASError, CompilationError):
        return math.inf


def _load(file: Path) -> dict[str, Any]:
    """The file's entries; none if it does not exist, and none with a warning if it is malformed."""
    try:
        entries = json_object(read_bytes(file))
        if all(len(e["tile"]) == 4 and all(type(n) is int and n > 0 for n in e["tile"]) for e in entries.values()):
            return dict(entries)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        pass
    warnings.warn(f"{file} holds no readable tiles: it is ignored, and the next tuned tile replaces it", stacklevel=2)
    return {}


def _read_file() -> None:
    global _read
    try:
        file = cache_file()
    except FileNotFoundError:  # the tiles of this process are all there are
        return
    if file != _read:
        _tiles.clear()
        _tiles.update({kind: Tile(*entry["tile"]) for kind, entry in _load(file).items()})
        _read = file


def _write(found: dict[str, Any]) -> None:
    """Add to the file in one step, because other processes may read and write it at the same time."""
    try:
        file = cache_file()
        entries = {**_load(file), **found}
        replace_file(file, json.dumps(dict(sorted(entries.items())), indent=1).encode())
    except OSError as error:
        warnings.warn(f"the tuned tiles are not saved: {error}", stacklevel=2)
