# SPDX-License-Identifier: Apache-2.0
"""The record of a step: a file with one JSON object per line, to which every item is written as soon as it ends.

A line says that a run begins (``run``), which items there are (``items``), that an item starts (``start``), or how it
ended (``end``). The process of the step writes the record. If it dies, the runner adds how the running item ended. A
line that was cut off by a kill is ignored.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

#: How items end that need not run again.
DONE = ("ok", "left out")
#: How items end that are faults, the worst first.
FAULTS = ("wrong", "crashed", "hung", "failed")
#: An item that the end of its step's time has cut off.
OUT_OF_TIME = "out of time"
#: Exit status of a process that must end, since CUDA is unusable in it, while its step can go on in another one.
RESTART = 75


@dataclass
class State:
    """What a record says: the items of the step, how they ended, and the running item with its start.

    ``items`` is None until the step has said which items there are.
    """

    items: list[str] | None = None
    ends: dict[str, dict[str, Any]] = field(default_factory=dict)
    running: str = ""
    since: float = 0.0

    @property
    def known(self) -> list[str]:
        """The items, and whatever else has ended."""
        return list(dict.fromkeys([*(self.items or ()), *self.ends]))

    @property
    def missing(self) -> list[str]:
        """Items for which the time did not suffice."""
        return [name for name in self.known if name not in self.ends or self.ends[name]["status"] == OUT_OF_TIME]

    @property
    def unfinished(self) -> bool:
        """Whether more time would help."""
        return bool(self.missing) or self.status == "no time left"

    @property
    def status(self) -> str:
        """``ok``, ``left out``, one of :data:`FAULTS`, ``partial`` or ``no time left``."""
        statuses = [end["status"] for end in self.ends.values()]
        for fault in FAULTS:
            if fault in statuses:
                return fault
        if self.missing or self.items is None:
            return "partial" if any(status in DONE for status in statuses) else "no time left"
        return "ok" if "ok" in statuses else "left out"


class Record:
    """The record of one step in a folder."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f"{name}.jsonl"

    def write(self, **event: Any) -> None:
        """Add a line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as stream:
            if stream.tell():
                stream.seek(-1, 2)
                if stream.read(1) != b"\n":  # a kill has cut off the last line
                    stream.write(b"\n")
            stream.write(json.dumps(event).encode() + b"\n")

    def begin(self) -> None:
        """Begin a run, in which items run again that had not succeeded."""
        self.write(run=time.time())

    def end(self, item: str, status: str, seconds: float, line: str, **more: Any) -> None:
        """Write how an item ended."""
        self.write(end=item, status=status, seconds=round(seconds, 2), line=line, **more)

    def read(self) -> State:
        """What the record says about the present run, with the successes of earlier ones."""
        state = State()
        for event in self._events():
            if "run" in event:
                state.ends = {name: end for name, end in state.ends.items() if end["status"] in DONE}
                state.running = ""
            elif "items" in event:
                state.items = event["items"]
            elif "start" in event:
                state.running, state.since = event["start"], event["at"]
            elif "end" in event:
                state.ends[event["end"]] = event
                state.running = ""
        return state

    def _events(self) -> list[dict[str, Any]]:
        events = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else ():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                events.append(event)
        return events
