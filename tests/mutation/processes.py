# SPDX-License-Identifier: Apache-2.0
"""Runs pytest on a copy of the checkout, in forks of a process that has imported everything but the package.

The copy is complete, so processes that tests start see a mutant too.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: What git ignores and the tests need.
BUILT = ("peftkern/libpeftkern_cpu.so", "peftkern/libpeftkern_cuda.so", "peftkern/_build_info.json")
#: The fast tests.
MARKERS = "not slow and not real_weights"
#: A mutant may allocate without end; a process with more resident bytes is ended.
MAX_MEMORY = 12 * 2**30
_LIBRARIES = ("transformers", "peft", "hypothesis", "safetensors.torch", "numpy")


def copy_checkout(folder: Path) -> Path:
    """A copy of the working tree in ``folder``, with what was built in place."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    for name in [*filter(None, listed), *BUILT]:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def preload(modules: Iterable[str] = ()) -> None:
    """Import libraries here, so that forked children need not."""
    import torch

    torch.set_num_threads(1)
    for name in (*_LIBRARIES, *modules):
        with contextlib.suppress(Exception):
            importlib.import_module(name)
    assert "peftkern" not in sys.modules, "the package must be imported in the children, where it is mutated"
    gc.freeze()


@dataclass
class Outcome:
    """How a run of tests ended.

    Attributes:
        status: ``passed``, ``failed``, ``crashed`` (the process died in a test, or pytest failed behind one),
            ``unstarted`` (pytest ended with an error before a test started) or ``timeout`` (of time or memory).
        test: the node id of the first test that failed, or of the one that did not end.
        seconds: how long it took.
        results: (node id, ``passed``, ``failed`` or ``skipped``, seconds) of each test that ended.
        output: the end of what it printed.
        started: whether a test started.
        collected: the node ids that pytest would run.
    """

    status: str
    test: str
    seconds: float
    results: list[tuple[str, str, float]]
    output: str
    started: bool = True
    collected: frozenset[str] = frozenset()


class _Reporter:
    """A plugin that writes a line per test to a file, and keeps the order in which tests were given."""

    def __init__(self, file: Path, order: list[str]) -> None:
        self.lines = file.open("w", buffering=1)
        self.order = {node_id: i for i, node_id in enumerate(order)}
        self.seconds, self.outcome = 0.0, "passed"

    @pytest.hookimpl(trylast=True)  # after the order of tests/conftest.py
    def pytest_collection_modifyitems(self, items: list) -> None:
        items.sort(key=lambda item: self.order.get(item.nodeid, len(self.order)))

    def pytest_collection_finish(self, session) -> None:
        self.lines.write(json.dumps(["collected", *(item.nodeid for item in session.items)]) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.seconds, self.outcome = 0.0, "passed"
        self.lines.write(json.dumps(["start", nodeid]) + "\n")

    def pytest_runtest_logreport(self, report) -> None:
        self.seconds += report.duration
        self.outcome = report.outcome if report.outcome != "passed" else self.outcome

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.lines.write(json.dumps(["end", nodeid, self.outcome, round(self.seconds, 4)]) + "\n")

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.lines.write(json.dumps(["end", report.nodeid or "collection", "failed", 0.0]) + "\n")


def run_tests(
    copy: Path, tests: list[str], timeout: float, plugins: Iterable = (), options: Iterable = ()
) -> Outcome:
    """Runs tests of the copy in a forked process, until one fails. ``plugins`` and ``options`` are pytest's."""
    scratch = copy.parent / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            _child(copy, scratch, tests, list(plugins), list(options))
        finally:
            os._exit(99)
    status = _wait(child, began + timeout)
    seconds = time.monotonic() - began
    return _outcome(scratch, status, seconds)


def _child(copy: Path, scratch: Path, tests: list[str], plugins: list, options: list[str]) -> None:
    os.setsid()
    output = os.open(scratch / "output", os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.chdir(copy)
    (scratch / "tmp").mkdir()
    os.environ |= {"PYTHONPATH": str(copy), "TMPDIR": str(scratch / "tmp"), "HF_HUB_OFFLINE": "1"}
    here = {"", ".", str(ROOT), str(Path.cwd())}
    sys.path[:] = [str(copy), *(path for path in sys.path if path not in here)]
    for name in list(sys.modules):
        if name.partition(".")[0] in ("tests", "__main__"):
            del sys.modules[name]
    importlib.invalidate_caches()
    reporter = _Reporter(scratch / "results", tests)
    command = ["-q", "-x", "-p", "no:cacheprovider", "-m", MARKERS, "--rootdir", str(copy), *options, *tests]
    command += ["--basetemp", str(scratch / "pytest")]
    code = pytest.main(command, plugins=[reporter, *plugins])
    sys.stdout.flush()
    os._exit(int(code))


def _wait(child: int, deadline: float) -> int | None:
    """The child's exit status, negative for a signal; None if it was killed for its time or memory."""
    pause = 0.005
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            _kill(child)  # what it started
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline or _resident(child) > MAX_MEMORY:
            _kill(child)
            os.waitpid(child, 0)
            return None
        time.sleep(pause)
        pause = min(0.1, pause * 1.5)


def _resident(process: int) -> int:
    """Bytes of memory in use; 0 where nobody can tell."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _outcome(scratch: Path, code: int | None, seconds: float) -> Outcome:
    file = scratch / "results"
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    results = [tuple(line[1:]) for line in lines if line[0] == "end"]
    started = [line[1] for line in lines if line[0] == "start"]
    output = (scratch / "output").read_text(errors="replace")[-3000:] if (scratch / "output").exists() else ""
    failed = [name for name, outcome, _ in results if outcome == "failed"]
    last = failed[0] if failed else started[-1] if started else ""
    collected = frozenset(name for line in lines if line[0] == "collected" for name in line[1:])
    if code is None:
        status = "timeout"
    elif code in (0, 5):
        status, last = "passed", ""
    elif not started:
        status = "unstarted"
    else:
        status = "failed" if failed else "crashed"
    return Outcome(status, last, seconds, results, output, bool(started), collected)


@contextlib.contextmanager
def planted(file: Path, source: bytes) -> Iterator[None]:
    """Within the block the file of the copy has other contents. No compiled code of it is left over, nor written."""
    original, stat = file.read_bytes(), file.stat()
    file.write_bytes(source)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**10))  # compiled code is recognised by time and size
    os.environ["PYTHONDONTWRITEBYTECODE"], sys.dont_write_bytecode = "1", True
    try:
        yield
    finally:
        del os.environ["PYTHONDONTWRITEBYTECODE"]
        sys.dont_write_bytecode = False
        file.write_bytes(original)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
