# SPDX-License-Identifier: Apache-2.0
"""The results of a run in at most eight files: report.md, results.json with everything, a CSV per table, the logs."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .plan import Phase, Step, steps
from .record import FAULTS, Record, State

#: The most files that a run leaves.
FILES = 8
DRY_RUN = "**Dry run on a CPU with tiny sizes: nothing here is a measurement.**"


@dataclass
class Report:
    """The report of a run.

    Attributes:
        folder: where the files go.
        raw: the records, logs and profiles.
        phases: of all plans.
        dry_run: say that nothing here is a measurement.
        copy_to: another folder that receives the files; None for none.
        seconds: taken by each phase of its share.
        extra: taken by each phase of what others have left.
        stopped: why the run was stopped early; empty if it was not.
    """

    folder: Path
    raw: Path
    phases: tuple[Phase, ...]
    dry_run: bool = False
    copy_to: Path | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    extra: dict[str, float] = field(default_factory=dict)
    stopped: str = ""

    def states(self) -> dict[str, State]:
        """The state of every step that has a record."""
        records = {name: Record(self.raw, name) for name in steps(self.phases)}
        return {name: record.read() for name, record in records.items() if record.path.exists()}

    def exit_status(self) -> int:
        """0 if every item succeeded or cannot run here, 1 if there is a fault, 3 if only the time did not suffice."""
        statuses = [state.status for state in self.states().values()]
        if any(status in FAULTS for status in statuses):
            return 1
        return 3 if self.stopped or any(status in ("partial", "no time left") for status in statuses) else 0

    def table(self) -> str:
        """The phases and steps with their times, as a Markdown table."""
        lines = ["| phase | step | result | items | s | share, s | used | extra, s | |", "|---" * 9 + "|"]
        states = self.states()
        for phase in self.phases:
            if states.keys().isdisjoint(steps((phase,))):
                continue
            used = self.seconds.get(phase.name, 0.0)
            extra = f"{self.extra[phase.name]:.1f}" if phase.name in self.extra else ""
            lines.append(
                f"| **{phase.name}** | | | | {used:.1f} | {phase.share:g} | {used / phase.share:.0%} | {extra} | |"
            )
            for name in steps((phase,)):
                if name in states:
                    state = states[name]
                    taken = sum(end["seconds"] for end in state.ends.values())
                    done = f"{len(state.known) - len(state.missing)} of {len(state.known)}"
                    lines.append(f"| | {name} | {state.status} | {done} | {taken:.1f} | | | | {_headline(state)} |")
        return "\n".join(lines)

    def write(self, logs: bool = True) -> None:
        """Write all files; without ``logs``, the logs are left as they are."""
        self.folder.mkdir(parents=True, exist_ok=True)
        states = self.states()
        _write(self.folder / "results.json", json.dumps(self._content(states), indent=1))
        _write(self.folder / "report.md", self._markdown(states))
        for table, rows in self._tables(states).items():
            _write(self.folder / f"{table}.csv", _as_csv(rows))
        if logs:
            self._pack_logs()
        if self.copy_to is not None and self.copy_to != self.folder:
            self.copy_to.mkdir(parents=True, exist_ok=True)
            for file in sorted(x for x in self.folder.iterdir() if x.is_file())[:FILES]:
                shutil.copy(file, self.copy_to)

    def _content(self, states: dict[str, State]) -> dict[str, Any]:
        return {
            "dry_run": self.dry_run, "stopped": self.stopped, "exit_status": self.exit_status(),
            "phases": [
                {"name": p.name, "share": p.share, "seconds": round(self.seconds.get(p.name, 0.0), 1),
                 "extra": round(self.extra.get(p.name, 0.0), 1)}
                for p in self.phases
            ],
            "steps": {
                name: {"status": state.status, "missing": state.missing, "items": state.items, "ends": state.ends}
                for name, state in states.items()
            },
        }  # fmt: skip

    def _markdown(self, states: dict[str, State]) -> str:
        lines = [
            "# peftkern on this machine",
            "",
            *[DRY_RUN, ""] * self.dry_run,
            *[self.stopped, ""] * bool(self.stopped),
        ]
        lines += [self.table(), "", *_choices(states), *_compile_times(states)]
        for name, state in states.items():
            lines += [f"## {name}: {state.status}", ""]
            lines += [f"out of time for {len(state.missing)}: {', '.join(state.missing)[:400]}", ""] * bool(
                state.missing
            )
            for item, end in state.ends.items():
                lines.append(f"- {item}: {end['status']}, {end['seconds']:g} s: {end['line']}")
                lines += [f"      {detail}" for detail in end.get("details", ())[:60]]
            lines.append("")
        return "\n".join(lines)

    def _tables(self, states: dict[str, State]) -> dict[str, list[dict[str, Any]]]:
        tables: dict[str, list[dict[str, Any]]] = {}
        machine = states["machine"].ends.get("versions", {}) if "machine" in states else {}
        facts = next(iter(machine.get("rows", ())), {})
        for name, step in steps(self.phases).items():
            if step.table and name in states:
                tables.setdefault(step.table, []).extend(row | facts for row in _rows(step, states[name]))
        return {table: rows for table, rows in tables.items() if rows}

    def _pack_logs(self) -> None:
        partial = self.folder / ".logs.tar.gz"
        with tarfile.open(partial, "w:gz", compresslevel=4) as archive:
            for name in ("logs", "profiles"):
                if (self.raw / name).exists():
                    archive.add(self.raw / name, name)
        partial.replace(self.folder / "logs.tar.gz")


def restore(folder: Path, raw: Path) -> None:
    """Make the records of a run from its results.json, if it is all that is left of it."""
    file = folder / "results.json"
    if raw.exists() or not file.exists():
        return
    for name, step in json.loads(file.read_text())["steps"].items():
        record = Record(raw, name)
        if step["items"] is not None:
            record.write(items=step["items"])
        for end in step["ends"].values():
            record.write(**end)


def _rows(step: Step, state: State) -> list[dict[str, Any]]:
    """The rows of a step, each with the item it comes from; an item without rows gives its line."""
    rows = []
    for item, end in state.ends.items():
        base = {"step": step.name, "item": item, "status": end["status"]}
        rows += [{**base, **row} for row in end.get("rows") or [{"line": end["line"]}]]
    return rows


def _as_csv(rows: list[dict[str, Any]]) -> str:
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{x:.5g}" if isinstance(x, float) else x for k, x in row.items()} for row in rows)
    return stream.getvalue()


def _compile_times(states: dict[str, State]) -> list[str]:
    """A table of the kernels that Triton compiled: variants and seconds, over all processes."""
    compiled = [row for state in states.values() for end in state.ends.values() for row in end.get("compiled", ())]
    if not compiled:
        return []
    variants = Counter(row["kernel"] for row in compiled if not row["cached"])
    hits = Counter(row["kernel"] for row in compiled if row["cached"])
    lines = ["| Triton kernel | compiled | s each | from the cache |", "|---|---|---|---|"]
    for kernel in sorted({row["kernel"] for row in compiled}):
        taken = sum(row["s"] for row in compiled if row["kernel"] == kernel and not row["cached"])
        each = f"{taken / variants[kernel]:.2f}" if variants[kernel] else ""
        lines.append(f"| {kernel} | {variants[kernel]} | {each} | {hits[kernel]} |")
    return [*lines, ""]


def _choices(states: dict[str, State]) -> list[str]:
    """A table of the shapes whose plans were timed: the choice of ``auto``, the fastest plan, the alternatives."""
    ends = states["attention"].ends.values() if "attention" in states else ()
    shapes: dict[str, dict[str, dict[str, Any]]] = {}
    for row in (row for end in ends for row in end.get("rows", ()) if "error" in row):
        shapes.setdefault(row["shape"], {})[row["what"]] = row
    lines = ["| shape | auto | us | fastest plan | us | PEFT, us | no prefix, us |", "|---|---|---|---|---|---|---|"]

    def time(row: dict[str, Any] | None) -> float:
        return math.inf if row is None else row.get("both_us", row["forward_us"])

    for shape, rows in shapes.items():
        best = min((row for name, row in rows.items() if "plan" in row and name != "auto"), key=time, default=None)
        auto, others = rows.get("auto"), [time(rows.get(name)) for name in ("peft", "no-prefix")]
        if best and auto:
            cells = [shape, auto["plan"], time(auto), best["plan"], time(best), *others]
            lines.append("| " + " | ".join(f"{x:.1f}" if isinstance(x, float) else x for x in cells) + " |")
    return [*lines, ""] if len(lines) > 2 else []


def _headline(state: State) -> str:
    """The first fault, or nothing."""
    for name, end in state.ends.items():
        if end["status"] in FAULTS:
            return f"{name}: {end['line']}"[:160].replace("|", "/")
    return ""


def _write(path: Path, text: str) -> None:
    """Write the file completely or not at all, in case the run is stopped."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    partial.replace(path)
