# SPDX-License-Identifier: Apache-2.0
"""Progress of a run: bars on a terminal, lines in a log file."""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

#: Seconds between two lines in a log file.
INTERVAL = 15.0


class LogTicker:
    """Prints the stage of the run every :data:`INTERVAL` seconds if the console is not a terminal.

    A terminal shows bars instead. A thread prints, so that lines appear during a long step too.

    Attributes:
        stage: what the run does now; a running bar adds its counts.
        bars: the bars of the run, once there are any.
    """

    def __init__(self, console: Console) -> None:
        self.stage = "starting"
        self.bars: Progress | None = None
        self._console = console
        self._start = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._print_lines, daemon=True)

    def __enter__(self) -> LogTicker:
        if not self._console.is_terminal:
            self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()

    @property
    def elapsed(self) -> float:
        """Seconds since the run started."""
        return time.monotonic() - self._start

    def line(self) -> str:
        """The elapsed time and the stage: ``1 min 30 s: training, 7 of 26``."""
        running = [task for task in self.bars.tasks if not task.finished] if self.bars else []
        counts = [f"{task.description}, {task.completed:.0f} of {task.total:.0f}" for task in running if task.total]
        return f"{minutes(self.elapsed)}: {counts[-1] if counts else self.stage}"

    def _print_lines(self) -> None:
        while not self._stop.wait(INTERVAL):
            self._console.print(self.line())


def new_bars(console: Console) -> Progress:
    """Bars with a count, the remaining time and a note."""
    columns = (
        TextColumn("{task.description:<16}"), BarColumn(12), MofNCompleteColumn(),
        TimeRemainingColumn(compact=True, elapsed_when_finished=True), TextColumn("{task.fields[note]}"),
    )  # fmt: skip
    return Progress(*columns, console=console)


def minutes(seconds: float) -> str:
    """``4 min 05 s``, or ``35 s``."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole} min {rest:02d} s" if whole else f"{rest} s"
