# SPDX-License-Identifier: Apache-2.0
"""Runs cases for some minutes: first those that failed before, then new ones."""

from __future__ import annotations

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
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the worker)

    def _start(self) -> subprocess.Popen:
        self.rest = b""
        self.errors.truncate(0)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
        return subprocess.Popen(
            self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, cwd=ROOT, env=environment
        )

    def failure(self, name: str, patience: float = PATIENCE) -> Failure | None:
        """Runs one case. Returns how it failed, if it did."""
        if self.process is None:
            self.process = self._start()
        self.process.stdin.write(f"{name}\n".encode())
        self.process.stdin.flush()
        what, deadline = f"case {name}", time.monotonic() + patience
        while True:
            answer = self._line(deadline)
            if answer is None:
                return Failure(name, f"{what}\n{self._end()}")
            if "start" in answer:
                what = answer["start"]
            elif "passed" in answer:
                return None
            else:
                return Failure(name, f"{what}\n{answer['failed']}")

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
            failure = worker.failure(name)
            count += 1
            failures += [failure] if failure else []
        number = 0
        while time.monotonic() - began < 60 * minutes:
            failure = worker.failure(f"{seed}:{number}")
            number += 1
            count += 1
            if failure:
                failures.append(failure)
                say(str(failure))
            _remember(file, list(dict.fromkeys(x.name for x in failures))) if failure else None
            if count % 500 == 0:
                say(f"{count} cases, {len(failures)} failed, {time.monotonic() - began:.0f} s")
    finally:
        worker.close()
    _remember(file, list(dict.fromkeys(x.name for x in failures)))
    rate = count / (time.monotonic() - began) * 3600
    say(f"{count} cases of seed {seed}, {rate:.0f} per hour, {len(failures)} failed")
    return count, rate, failures
