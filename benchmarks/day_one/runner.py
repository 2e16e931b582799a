# SPDX-License-Identifier: Apache-2.0
"""Run each step in a process of its own, within the share of its phase, and keep what it has found so far.

A process that dies or hangs costs the item that it was running. The step goes on with the next item in a new process.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from .plan import LIMIT, REPORTING, Phase, Step, steps
from .record import FAULTS, OUT_OF_TIME, RESTART, Record, State
from .report import Report

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu_day_one.py"
#: Seconds below which no process is started, since it could not even import torch.
LEAST = 4.0
#: Seconds between two reports while steps run.
REFRESH = 0.5


@dataclass
class Run:
    """One run of the phases of a plan.

    Attributes:
        folder: for records, logs and profiles: ``raw`` of the folder of the results.
        phases: what to do.
        report: of the results.
        dry_run: tiny sizes on the CPU.
        only: names of steps; all if empty.
        limit: seconds for the whole run. Shares shrink in proportion if it is less than the usual limit.
        least: seconds below which no process is started.
        python: the interpreter and the script.
    """

    folder: Path
    phases: tuple[Phase, ...]
    report: Report
    dry_run: bool = False
    only: tuple[str, ...] = ()
    limit: float = LIMIT
    least: float = LEAST
    python: tuple[str, ...] = (sys.executable, str(SCRIPT))
    _refreshed: float = 0.0
    _unreported: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, keep_going: bool = False) -> int:
        """Run all steps that have items left, and report. The exit status of the command.

        A phase whose ``needs`` found a fault does not run, unless ``keep_going``.
        """
        begin = time.monotonic()
        end = begin + self.limit - REPORTING
        scale = min(1.0, self.limit / (sum(phase.share for phase in self.phases) + REPORTING))
        by_name = {phase.name: phase for phase in self.phases}
        for name in self._steps():
            Record(self.folder, name).begin()
        for phase in self.phases:
            faulty = self._faulty(by_name[phase.needs]) if phase.needs else []
            if faulty and not keep_going:
                self.report.stopped = f"Stopped after a fault in {', '.join(faulty)}. --keep-going goes on."
                print(self.report.stopped, flush=True)
                break
            start = time.monotonic()
            self._run_phase(phase, min(end, start + scale * phase.share))
            self.report.seconds[phase.name] = time.monotonic() - start
        else:
            self._second_round(end)
        self.refresh(force=True)
        print(self.report.table(), flush=True)
        return self.report.exit_status()

    def _second_round(self, end: float) -> None:
        """Give the time that was not used to the steps that ran out of it."""
        for phase in self.phases:
            wanted = self._steps().keys() & steps((phase,))
            if any(self._state(name).unfinished for name in wanted) and end - time.monotonic() > 2 * self.least:
                start = time.monotonic()
                self._run_phase(phase, end)
                self.report.extra[phase.name] = time.monotonic() - start

    def _steps(self) -> dict[str, Step]:
        return {n: step for n, step in steps(self.phases).items() if not self.only or n in self.only}

    def _state(self, name: str) -> State:
        return Record(self.folder, name).read()

    def _faulty(self, phase: Phase) -> list[str]:
        return [name for name in steps((phase,)) if self._state(name).status in FAULTS]

    def _run_phase(self, phase: Phase, end: float) -> None:
        wanted = [step for step in phase.steps if step.name in self._steps()]
        with concurrent.futures.ThreadPoolExecutor(max(1, len(wanted))) as pool:
            list(pool.map(lambda step: self._run_step(step, end, len(wanted)), wanted))
        self.refresh(force=True)

    def _run_step(self, step: Step, end: float, together: int) -> None:
        """Run processes of a step until every item has ended or the time is over."""
        start, record = time.monotonic(), Record(self.folder, step.name)
        log = self.folder / "logs" / f"{step.name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        while (left := end - time.monotonic()) >= self.least:
            state = record.read()
            if state.items is not None and not state.missing:
                break
            how, code = self._run_process(step, log, left, together)
            state, now = record.read(), time.monotonic()
            if how == "ended" and code == RESTART and state.missing:
                continue
            if how == "ended" and code in (0, RESTART) and not state.running:
                break
            line, details = _last_words(log, code)
            if state.running:
                status = "crashed" if how == "ended" else how
                record.end(state.running, status, now - state.since, line, details=details)
            elif how == "ended":
                item = "its start" if state.items is None else "its end"
                record.end(item, "crashed", now - start, line, details=details)
            if how == OUT_OF_TIME or not state.running:
                break
        state = record.read()
        print(f"{step.name}: {state.status}, {time.monotonic() - start:.1f} s", flush=True)

    def _run_process(self, step: Step, log: Path, limit: float, together: int) -> tuple[str, int | None]:
        """(how the process ended: by itself, out of time or hung; its exit status)."""
        command = [*self.python, "--step", step.name, "--folder", str(self.folder), "--limit", f"{limit - 1:.1f}"]
        start, record, seen = time.monotonic(), Record(self.folder, step.name), -1
        with log.open("a") as stream:
            process = subprocess.Popen(
                [*command, *["--dry-run"] * self.dry_run], stdout=stream, stderr=stream, stdin=subprocess.DEVNULL,
                env=self._environment(step, together), start_new_session=True, cwd=ROOT,
            )  # fmt: skip
        try:
            while process.poll() is None:
                time.sleep(0.05)
                now = time.monotonic()
                if record.path.exists() and record.path.stat().st_size != seen:
                    seen, state = record.path.stat().st_size, record.read()
                    self._unreported = True
                self.refresh()
                if now - start > limit:
                    return OUT_OF_TIME, None
                if seen >= 0 and state.running and now - state.since > step.item_limit:
                    return "hung", None
            return "ended", process.returncode
        finally:
            _stop(process)

    def _environment(self, step: Step, together: int) -> dict[str, str]:
        environment = dict(os.environ)
        if together > 1:
            environment.setdefault("OMP_NUM_THREADS", "2")
        if self.dry_run:
            environment |= {"XDG_CACHE_HOME": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}
            if step.name.startswith("correct_"):
                environment["TRITON_INTERPRET"] = "1"
        return environment

    def refresh(self, force: bool = False) -> None:
        """Write the report if an item has ended; without ``force`` no more often than :data:`REFRESH`."""
        with self._lock:
            if force or (self._unreported and time.monotonic() - self._refreshed > REFRESH):
                self._unreported = False
                self.report.write(logs=force)
                self._refreshed = time.monotonic()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the step and the processes that it started. The step writes to its log where it was."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)
            process.wait(0.5)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_words(log: Path, code: int | None) -> tuple[str, list[str]]:
    """A line about the end of a process, and the end of its log."""
    lines = [line.rstrip()[:300] for line in log.read_text(errors="replace").splitlines() if line.strip()][-15:]
    where = next((line.strip() for line in lines if line.lstrip().startswith("File ")), lines[-1] if lines else "")
    return ("" if code is None else f"ended with status {code}; ") + (where or "its log is empty"), lines
