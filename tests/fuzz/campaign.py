# SPDX-License-Identifier: Apache-2.0
"""Runs cases for some minutes: first those that failed before, then new ones."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
#: Names of cases that failed, one a line. A case that passes again is taken out.
FAILING = ROOT / ".hypothesis" / "peftkern-fuzz"
WORKER = (sys.executable, "-m", "tests.fuzz.worker")
#: Seconds after which a case hangs.
PATIENCE = 180


@dataclasses.dataclass
class Failure:
    """A case that failed: its name, and what it is and what happened."""

    name: str
    text: str

    def __str__(self) -> str:
        return f"{self.text}\nagain: python -m tests.fuzz --case {self.name}"


class Worker:
    """A process that runs cases; another one is started where it ended."""

    def __init__(self, command: tuple[str, ...] = WORKER) -> None:
        self.command = command
        self.process: subprocess.Popen | None = None
        self.rest = b""
        self.last = ""  # the case that this process ran before
        self.errors = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 (as long as the worker)

    def _start(self) -> subprocess.Popen:
        self.rest, self.last = b"", ""
        self.errors.seek(0)  # the process writes where this file object stands
        self.errors.truncate()
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        return subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, bufsize=0, cwd=ROOT,
            env=environment,
        )  # fmt: skip

    def failure(self, name: str, patience: float = PATIENCE) -> Failure | None:
        """Runs one case. Returns how it failed, if it did.

        If the process ended before this case started, the failure is that of the case before, and this one did not
        run.
        """
        if self.process is None:
            self.process = self._start()
        what, deadline = "", time.monotonic() + patience
        with contextlib.suppress(BrokenPipeError):  # it has ended, which is what reading finds
            self.process.stdin.write(f"{name}\n".encode())
        while True:
            answer = self._line(deadline)
            if answer is None and not what and self.last and time.monotonic() < deadline:
                return Failure(self.last, f"case {self.last}, after it had answered\n{self._end()}")
            if answer is None:
                return Failure(name, f"{what or f'case {name}'}\n{self._end()}")
            if "start" in answer:
                what = answer["start"]
                continue
            self.last = name
            return None if "passed" in answer else Failure(name, f"{what}\n{answer['failed']}")

    def failures(self, name: str) -> list[Failure]:
        """Runs one case, in another process if the one at hand has ended since the case before."""
        found = self.failure(name)
        if found is None or found.name == name:
            return [found] if found else []
        again = self.failure(name)
        return [found, again] if again else [found]

    def _line(self, deadline: float) -> dict | None:
        """The next answer; None if the process ended, or does not answer."""
        while b"\n" not in self.rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self.process.stdout.fileno(), 65536) if ready else b""
            if not data:
                return None
            self.rest += data
        line, _, self.rest = self.rest.partition(b"\n")
        return json.loads(line)

    def _end(self) -> str:
        """How the process ended, with its stack. One that hangs is ended here."""
        try:
            status = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            status = None
            self.close()
        self.process = None
        self.errors.seek(0)
        stack = self.errors.read().decode(errors="replace")[:2000]
        if status is None:
            return f"does not end\n{stack}"
        return f"{signal.Signals(-status).name if status < 0 else f'exit status {status}'}\n{stack}"

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def remembered(file: Path) -> list[str]:
    return file.read_text().split() if file.exists() else []


def _remember(file: Path, names: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{name}\n" for name in names))


def run(
    seed: int, minutes: float, say: Callable[[str], None] = print, file: Path = FAILING, worker: Worker | None = None
) -> tuple[int, float, list[Failure]]:
    """Runs cases of a seed, after those that failed before.

    Returns:
        How many ran, the rate per hour, and the failures.
    """
    worker, failures, names = worker or Worker(), [], remembered(file)
    began, count = time.monotonic(), 0
    say(f"seed {seed}, {minutes:g} minutes; {len(names)} cases that failed before come first")
    try:
        for name in names:
            failures += worker.failures(name)
            count += 1
        number = 0
        while time.monotonic() - began < 60 * minutes:
            found = worker.failures(f"{seed}:{number}")
            number += 1
            count += 1
            for failure in found:
                failures.append(failure)
                say(str(failure))
            _remember(file, list(dict.fromkeys(x.name for x in failures))) if found else None
            if count % 500 == 0:
                say(f"{count} cases, {len(failures)} failed, {time.monotonic() - began:.0f} s")
    finally:
        worker.close()
    _remember(file, list(dict.fromkeys(x.name for x in failures)))
    rate = count / (time.monotonic() - began) * 3600
    say(f"{count} cases of seed {seed}, {rate:.0f} per hour, {len(failures)} failed")
    return count, rate, failures
