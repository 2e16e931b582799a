# SPDX-License-Identifier: Apache-2.0
"""Rows of results in a CSV file, and comparisons of their providers. Runs without torch."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...files import append_to_file, replace_file

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
_SIZES = ("B", "Hq", "Hkv", "S", "D", "P", "threads")
_INTEGERS = ("B", "Hq", "Hkv", "S", "cached", "D", "P", "window", "threads", "cores")


class Results:
    """A CSV file that grows with each batch of rows; without a path, rows are kept in memory only.

    A row that an interrupted run has written in part is removed, and so are the others of its problem, which is then
    measured again.

    Attributes:
        rows: those of the file and the added ones.
        known: the problems that they belong to.
        note: what was removed; None if the file is whole.

    Raises:
        ValueError: naming the file and the line, for a file that is damaged before its last line, or has other
            columns.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.note: str | None = None
        if path is not None and path.exists():
            self._continue(path)
        self.known = {problem(row) for row in self.rows}

    def _continue(self, path: Path) -> None:
        data = path.read_bytes()
        records = list(_records(data, path))
        torn = None if not records or records[-1].complete else records.pop()
        if records:
            names = records.pop(0).cells
            if tuple(names) != COLUMNS:
                raise ValueError(f"{path}:1: expected the columns of this version, {','.join(COLUMNS)}, got others")
            self.rows = [_row(record, names, path) for record in records]
        elif torn is not None and not ",".join(COLUMNS).startswith(",".join(torn.cells)):
            raise ValueError(f"{path}:1: expected a CSV file of `peftkern bench`, got something else")
        if torn is None:
            return
        count, problems = len(self.rows), [problem(row) for row in self.rows]
        while self.rows and problem(self.rows[-1]) == problems[-1] and _may_be_of(torn, problems[-1]):
            self.rows.pop()
        kept = records[len(self.rows)].start if len(self.rows) < count else torn.start
        replace_file(path, data[:kept])
        again = count - len(self.rows)
        others = f", and {again} row{'s' * (again > 1)} of its problem" if again else ""
        self.note = f"{path}:{torn.line}: removed a row that an interrupted run has written in part{others}"

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows and write them to the file."""
        rows = list(rows)
        self.rows += rows
        self.known |= {problem(row) for row in rows}
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS)
        if not self.path.exists() or not self.path.stat().st_size:
            writer.writeheader()
        writer.writerows({name: _text(row.get(name)) for name in COLUMNS} for row in rows)
        append_to_file(self.path, text.getvalue().encode())


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
        ValueError: naming the file and the line, if the file lacks the columns of such rows or is damaged.
    """
    records = list(_records(path.read_bytes(), path))
    names = records[0].cells if records else []
    missing = [name for name in (*PROBLEM, "provider", "status", "p50_ms") if name not in names]
    if missing:
        raise ValueError(f"{path}: expected a CSV file of `peftkern bench`, got one without {', '.join(missing)}")
    return [_row(record, names, path) for record in records[1:]]


@dataclass(frozen=True)
class _Record:
    """A row of a file: its first line, the byte where it starts, its cells, and whether a line end follows."""

    line: int
    start: int
    cells: list[str]
    complete: bool


def _records(data: bytes, path: Path) -> Iterator[_Record]:
    """The rows of a CSV file, the header first; the last one may be incomplete."""
    size, line = 0, 1

    def lines() -> Iterator[str]:
        nonlocal size
        for text in io.StringIO(data.decode(errors="surrogateescape"), newline=""):
            size += len(text.encode(errors="surrogateescape"))
            yield text

    reader = csv.reader(lines(), strict=True)
    while True:
        start, line = size, reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            torn = data[start:]
            if size < len(data) or b"\n" in torn:
                raise ValueError(f"{path}:{line}: expected a row of CSV, got a damaged one ({error})") from error
            cells = torn.decode(errors="replace").split(",")
        if cells is None:
            return
        if cells:
            yield _Record(line, start, cells, data[size - 1 : size] == b"\n")


def _may_be_of(torn: _Record, problem: tuple[str, ...]) -> bool:
    """Whether an incomplete row, whose last cell may be cut, may be one of a problem."""
    *whole, cut = torn.cells[: len(PROBLEM)]
    return problem[: len(whole)] == tuple(whole) and problem[len(whole)].startswith(cut)


def _row(record: _Record, names: list[str], path: Path) -> Row:
    """A row with the types of its columns."""
    where = f"{path}:{record.line}"
    if len(record.cells) != len(names):
        raise ValueError(f"{where}: expected {len(names)} cells, got {len(record.cells)}")
    try:
        "".join(record.cells).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: expected UTF-8, got other bytes") from error
    return _typed(dict(zip(names, record.cells, strict=True)), where)


def _typed(row: dict[str, str], where: str) -> Row:
    typed: Row = dict(row)
    for name in (*_NUMBERS, "softcap"):
        typed[name] = _parsed(float, row, name, where)
    for name in _INTEGERS:
        typed[name] = _parsed(int, row, name, where)
    typed["auto"] = row.get("auto") == "True"
    for name in [*_SIZES, *(["p50_ms"] if row["status"] == "ok" else [])]:
        value = typed[name]
        if value is None or not (value > 0 or (name == "P" and value == 0)):
            raise ValueError(f"{where}: {name}: expected a number above 0, got {row[name]!r:.40}")
    return typed


def _parsed(kind: type[int] | type[float], row: dict[str, str], name: str, where: str) -> float | None:
    """The number in a cell; None for an empty one."""
    text = row.get(name)
    if not text:
        return None
    try:
        value = kind(text)
        if not math.isfinite(value):
            raise ValueError
    except (ValueError, OverflowError):
        noun = "an integer" if kind is int else "a number"
        raise ValueError(f"{where}: {name}: expected {noun}, got {text!r:.40}") from None
    return value


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
