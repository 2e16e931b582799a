# SPDX-License-Identifier: Apache-2.0
"""Rows of results in a CSV file, and comparisons of their providers. Standard library only."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]

#: Columns that identify a problem: everything but the provider and its results.
PROBLEM = ("model", "B", "Hq", "Hkv", "S", "cached", "D", "P", "window", "softcap", "dtype", "device", "threads",
           "direction")  # fmt: skip
COLUMNS = (
    *PROBLEM, "provider", "auto", "status", "reason", "p20_ms", "p50_ms", "p80_ms", "spread", "tflops", "gb_s",
    "peak_mb", "saved_mb", "error", "error_peft", "error_ratio", "cpu", "cores", "gpu", "arch", "cuda", "driver",
    "sm_mhz", "memory_mhz", "torch", "triton", "peftkern", "git", "date",
)  # fmt: skip
_NUMBERS = ("p20_ms", "p50_ms", "p80_ms", "spread", "tflops", "gb_s", "peak_mb", "saved_mb", "error", "error_peft",
            "error_ratio")  # fmt: skip
_INTEGERS = ("B", "Hq", "Hkv", "S", "cached", "D", "P", "window", "threads", "cores")


class Results:
    """A CSV file that grows with each batch of rows; without a path, rows are kept in memory only."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[Row] = read(path) if path is not None and path.exists() else []
        self.known = {problem(row) for row in self.rows}

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows and write them to the file."""
        rows = list(rows)
        self.rows += rows
        self.known |= {problem(row) for row in rows}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        begun = self.path.exists() and self.path.stat().st_size > 0
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if not begun:
                writer.writeheader()
            writer.writerows({name: _text(row.get(name)) for name in COLUMNS} for row in rows)


def problem(row: Row) -> tuple[str, ...]:
    """The columns that identify the problem, as text."""
    return tuple(_text(row.get(name)) for name in PROBLEM)


def _text(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.5g}"
    return "" if value is None else str(value)


def read(path: Path) -> list[Row]:
    """Read the rows of a file, with numbers as numbers and None for empty cells.

    Raises:
        ValueError: if the file lacks the columns of such rows.
    """
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        missing = [
            name for name in (*PROBLEM, "provider", "status", "p50_ms") if name not in (reader.fieldnames or ())
        ]
        if missing:
            raise ValueError(f"{path}: expected a CSV file of `peftkern bench`, got one without {', '.join(missing)}")
        return [_typed(row) for row in reader]


def _typed(row: dict[str, str]) -> Row:
    typed: Row = dict(row)
    for name in _NUMBERS:
        typed[name] = float(row[name]) if row.get(name) else None
    for name in _INTEGERS:
        typed[name] = int(row[name]) if row.get(name) else None
    typed["softcap"] = float(row["softcap"]) if row.get("softcap") else None
    typed["auto"] = row.get("auto") == "True"
    return typed


def groups(rows: Iterable[Row]) -> list[list[Row]]:
    """Group rows by problem, in order."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(problem(row), []).append(row)
    return list(found.values())


def title(row: Row) -> str:
    """Description of the row's problem."""
    parts = [row["model"] or "shape", f"B={row['B']}", f"S={row['S']}"]
    parts += [f"cached={row['cached']}"] if row["cached"] else []
    parts += [f"P={row['P']}", f"Hq={row['Hq']}", f"Hkv={row['Hkv']}", f"D={row['D']}"]
    parts += [f"{name}={row[name]:g}" for name in ("window", "softcap") if row[name]]
    where = f"{row['threads']} thread{'s' * (row['threads'] > 1)}" if row["device"] == "cpu" else row["device"]
    return " ".join([*parts, row["dtype"], f"{row['direction']},", where])


@dataclass(frozen=True)
class Comparison:
    """peftkern compared with its alternatives on one problem. Each is None if it was not timed."""

    rows: list[Row]
    ours: Row | None
    peft: Row | None
    best: Row | None  # the fastest alternative with a prefix
    no_prefix: Row | None  # torch's SDPA on the sequence alone

    @classmethod
    def of(cls, rows: list[Row]) -> Comparison:
        """Compare the rows of one problem. ``ours`` is the backend that ``auto`` runs."""
        ok = {row["provider"]: row for row in rows if row["status"] == "ok"}
        peers = [row for name, row in ok.items() if not is_ours(name) and name != "no-prefix"]
        ours = ok.get("peftkern") or next((row for row in ok.values() if row["auto"]), None)
        best = min(peers, key=lambda row: float(row["p50_ms"]), default=None)
        return cls(rows, ours, ok.get("peft") or ok.get("peft-eager"), best, ok.get("no-prefix"))

    def over(self, other: Row | None) -> float | None:
        """Speed-up of peftkern over ``other``: below 1, peftkern is slower."""
        if self.ours is None or other is None:
            return None
        return float(other["p50_ms"]) / float(self.ours["p50_ms"])

    @property
    def loses(self) -> bool:
        """Whether an alternative with a prefix is faster."""
        ratio = self.over(self.best)
        return ratio is not None and ratio < 1

    def __str__(self) -> str:
        if self.ours is None:
            return "peftkern was not timed"
        said = []
        for name, row in (
            ("PEFT's way", self.peft),
            ("the best alternative", self.best),
            ("no prefix", self.no_prefix),
        ):
            ratio = self.over(row)
            if ratio is not None and row is not None:
                which = "torch SDPA" if row is self.no_prefix else row["provider"]
                said.append(f"{ratio:.2f} times as fast as {name} ({which})")
        if not said:
            return "peftkern: nothing to compare it with"
        return f"peftkern is {', '.join(said)}" + (": it loses here" if self.loses else "")


def absent(rows: Iterable[Row]) -> list[tuple[str, str, str]]:
    """(provider, status, reason) of providers that were unavailable or not timed, without repetition."""
    keys = [(r["provider"], r["status"], r["reason"]) for r in rows if r["status"] in ("unavailable", "not timed")]
    return list(dict.fromkeys(keys))


def is_ours(provider: str) -> bool:
    """Whether a provider is peftkern."""
    return provider == "peftkern" or provider.startswith("peftkern-")
