# SPDX-License-Identifier: Apache-2.0
"""Which test executes which lines of the package: recorded once per test file, and translated when sources change."""

from __future__ import annotations

import ast
import difflib
import functools
import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from .mutants import Mutant, files
from .processes import MARKERS, ROOT, Outcome, preload, run_tests

#: Folders whose test files are recorded, not their subfolders.
FOLDERS = (
    "tests", "tests/backends", "tests/native", "tests/testing", "tests/huggingface", "tests/gpu_free",
    "tests/self_study",
)  # fmt: skip
#: Test files that build, compile or install, or that test the tests.
NOT_RECORDED = (
    "tests/test_build.py", "tests/test_cover.py", "tests/test_readme.py", "tests/test_skips.py",
    "tests/gpu_free/test_aot.py", "tests/gpu_free/test_cuda_ptx.py", "tests/gpu_free/test_guard.py",
    "tests/gpu_free/test_report.py", "tests/gpu_free/test_shim.py", "tests/gpu_free/test_cuda_budgets.py",
    "tests/gpu_free/test_triton_interpreter.py", "tests/gpu_free/test_cuda_faults.py",
    "tests/huggingface/test_soak.py",
)  # fmt: skip
TIMEOUT = 1800
#: Behind the name of a test file: its tests in Triton's interpreter, which has a process of its own.
INTERPRETER = "#interpreter"
#: Seconds until that process runs its first test.
STARTUP = 10.0


def recorded_files(root: Path) -> list[str]:
    found = (path.relative_to(root).as_posix() for folder in FOLDERS for path in (root / folder).glob("test_*.py"))
    return sorted(set(found) - set(NOT_RECORDED))


def recordings(root: Path) -> list[str]:
    """What is recorded: test files, and again with :data:`INTERPRETER` behind it those that have such tests."""
    names = recorded_files(root)
    return names + [x + INTERPRETER for x in names if "mark.interpreter" in (root / x).read_text()]


class Tracer:
    """A pytest plugin that notes the lines of the package which each test executes, and those of its import."""

    def __init__(self, copy: Path, paths: list[str]) -> None:
        self.paths = {str(copy / path): path for path in paths}
        self.codes: dict = {}
        self.lines: set = set()
        self.tests: dict[str, dict[str, list[int]]] = {}

    def _call(self, frame, event, arg):
        code = frame.f_code
        path = self.codes.get(code, 0)
        if path == 0:
            path = self.codes[code] = self.paths.get(code.co_filename)
        return None if path is None else self._line

    def _line(self, frame, event, arg):
        if event == "line":
            self.lines.add((frame.f_code, frame.f_lineno))
        return self._line

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        self.lines = set()
        threading.settrace(self._call)
        sys.settrace(self._call)
        yield
        sys.settrace(None)
        threading.settrace(None)
        found = defaultdict(set)
        for code, line in self.lines:
            found[self.codes[code]].add(line)
        self.tests[item.nodeid] = {path: sorted(lines) for path, lines in found.items()}

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self):
        modules = [x for x in sys.modules if x.partition(".")[0] in ("torch", "transformers", "peft", "accelerate")]
        Path("../scratch/lines").write_text(json.dumps({"tests": self.tests, "modules": modules}))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


class LineMap:
    """The recordings in a folder.

    Attributes:
        folder: has a file per test file, and the sources that they speak of.
    """

    def __init__(self, folder: Path, root: Path = ROOT) -> None:
        self.folder, self.root = folder, root
        (folder / "sources").mkdir(parents=True, exist_ok=True)
        #: path -> line -> tests; node id -> seconds
        self.tests_of: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        self.seconds: dict[str, float] = {}
        self.modules: set[str] = set()
        self.sizes: dict[str, int] = {}
        self.interpreted: set[str] = set()
        #: test file -> seconds before its first test
        self.startup: dict[str, float] = {}

    def _file(self, name: str) -> Path:
        return self.folder / (re.sub("[/#]", "-", name) + ".json.gz")

    def missing(self) -> list[str]:
        """What has no recording, or one of another version of the test file or of what tests import."""
        return [x for x in recordings(self.root) if self._read(x) is None]

    def _read(self, name: str) -> dict | None:
        file = self._file(name)
        if not file.exists():
            return None
        data = json.loads(gzip.decompress(file.read_bytes()))
        return data if data["digest"] == self._digest_of(name) else None

    def _digest_of(self, name: str) -> str:
        return _digest((self.root / name.removesuffix(INTERPRETER)).read_bytes() + self._helpers)

    @functools.cached_property
    def _helpers(self) -> bytes:
        """A digest of what test files take cases, parameters and bounds from."""
        tests = (x for x in (self.root / "tests").rglob("*.py") if not x.name.startswith("test_"))
        found = [*tests, *(self.root / "peftkern" / "testing").rglob("*.py")]
        names = {x.relative_to(self.root).as_posix(): x for x in found}
        digest = hashlib.sha256()
        for name in sorted(x for x in names if not x.startswith("tests/mutation/")):
            digest.update(name.encode() + b"\0" + names[name].read_bytes())
        return digest.digest()

    def record(self, copy: Path, name: str) -> Outcome:
        """Runs a test file under the tracer."""
        interpreted = name.endswith(INTERPRETER)
        if interpreted and os.environ.get("TRITON_INTERPRET") != "1":
            return self._record_in_interpreter(copy, name)
        paths = files(copy)
        digests = {}
        for path in paths:
            source = (copy / path).read_bytes()
            digests[path] = _digest(source)
            (self.folder / "sources" / digests[path]).write_bytes(source)
        digest = self._digest_of(name)
        markers = f"({MARKERS}) and {'' if interpreted else 'not '}interpreter"
        options = ["--maxfail=1000", "-m", markers]
        test_file = name.removesuffix(INTERPRETER)
        outcome = run_tests(copy, [test_file], TIMEOUT, [Tracer(copy, paths)], options)
        if outcome.status in ("crashed", "unstarted"):
            return outcome
        file = copy.parent / "scratch" / "lines"
        found = json.loads(file.read_text()) if file.exists() else {"tests": {}, "modules": []}
        ended = {name: (result, seconds) for name, result, seconds in outcome.results}
        sets: list = []
        places: dict[str, int] = {}

        def place(path: str, lines: list[int]) -> int:
            key = f"{path} {lines}"
            if key not in places:
                places[key] = len(sets)
                sets.append([path, lines])
            return places[key]

        tests = {name: [*ended[name], [place(*x) for x in lines.items()]] for name, lines in found["tests"].items()
                 if name in ended}  # fmt: skip
        data = {"digest": digest, "sources": digests, "modules": found["modules"], "sets": sets, "tests": tests}
        self._file(name).write_bytes(gzip.compress(json.dumps(data).encode()))
        return outcome

    def _record_in_interpreter(self, copy: Path, name: str) -> Outcome:
        """Triton reads the variable at import, so another process records."""
        began = time.monotonic()
        command = [sys.executable, "-m", "tests.mutation.lines", str(self.folder), str(copy), name]
        environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        data = self._read(name)
        results = [(test, result, seconds) for test, (result, seconds, _) in (data or {"tests": {}})["tests"].items()]
        status = "crashed" if data is None else "passed"
        return Outcome(status, "", time.monotonic() - began, results, done.stdout + done.stderr)

    def load(self) -> None:
        """Reads all recordings. Tests that were skipped or failed are left out."""
        for known in (self.tests_of, self.seconds, self.modules, self.sizes, self.interpreted, self.startup):
            known.clear()
        for recording in recordings(self.root):
            data = self._read(recording)
            if data is None:
                continue
            self.modules.update(data["modules"])
            sets = [(path, self._translated(path, data["sources"].get(path), lines)) for path, lines in data["sets"]]
            for name, (result, seconds, indices) in data["tests"].items():
                file = name.partition("::")[0]
                if recording.endswith(INTERPRETER):
                    self.interpreted.add(name)
                else:  # what a file builds for all of its tests, the first one pays
                    self.startup.setdefault(file, max(0.0, seconds - 2.0))
                if result != "passed":
                    continue
                self.seconds[name] = seconds
                self.sizes[name] = sum(len(sets[i][1]) for i in indices)
                for path, lines in (sets[i] for i in indices):
                    for line in lines:
                        self.tests_of[path][line].add(name)

    def _translated(self, path: str, digest: str | None, lines: list[int]) -> list[int]:
        table = self._table(path, digest)
        return lines if table is None else [table[line] for line in lines if line in table]

    @functools.cache  # noqa: B019
    def _table(self, path: str, digest: str | None) -> dict[int, int] | None:
        """Line numbers of a recorded source -> those of today's; None if they are the same."""
        now = (self.root / path).read_bytes() if (self.root / path).exists() else b""
        if digest == _digest(now):
            return None
        before = (self.folder / "sources" / str(digest)).read_text().splitlines()
        matcher = difflib.SequenceMatcher(None, before, now.decode().splitlines(), autojunk=False)
        table = {}
        for a, b, size in matcher.get_matching_blocks():
            table.update({a + i + 1: b + i + 1 for i in range(size)})
        return table

    # choice of tests ------------------------------------------------------------------------------------------------

    def tests_for(self, mutant: Mutant, budget: float) -> tuple[list[str], int]:
        """The tests that may catch a mutant, those first that are likeliest to, and how many there are in all.

        First come tests that execute the line, then those that execute other lines of the function. A line that runs
        at import is looked for by the name that it binds. As many are returned as run in ``budget`` seconds.
        """
        tiers = [self._ranked(mutant, tier) for tier in self._tiers(mutant)]
        ordered = list(dict.fromkeys(name for tier in tiers for name in tier))
        chosen: list[str] = []
        started: set[tuple[str, bool]] = set()
        total = 0.0
        for name in ordered:
            seconds = self.seconds[name] + (0.0 if self._process(name) in started else self._startup(name))
            if not chosen or total + seconds <= budget:
                chosen.append(name)
                started.add(self._process(name))
                total += seconds
        return chosen, len(ordered)

    def expected(self, tests: list[str]) -> float:
        """About how many seconds tests take."""
        firsts = {self._process(name): name for name in tests}
        return sum(map(self._startup, firsts.values())) + sum(self.seconds.get(name, 1.0) for name in tests)

    def _process(self, name: str) -> tuple[str, bool]:
        """What tests share that start together: their file, and whether they run in the interpreter."""
        return name.partition("::")[0], name in self.interpreted

    def _startup(self, name: str) -> float:
        """Seconds before the first test of a file."""
        return STARTUP if name in self.interpreted else self.startup.get(name.partition("::")[0], 0.0)

    def _tiers(self, mutant: Mutant) -> Iterator[set[str]]:
        lines = self.tests_of[mutant.path]
        node, function = _around(self.root / mutant.path, mutant.line)
        statement = range(node.lineno, node.end_lineno + 1)
        yield set().union(*(lines.get(i, ()) for i in statement))
        if function is not None:
            first = function.body[0].lineno
            yield set().union(*(lines.get(i, ()) for i in range(first, function.end_lineno + 1)))
        for name in _bound(node):
            yield self._mentioning(name)
        if not any(lines.get(i) for i in statement):
            yield set().union(*lines.values())

    def _mentioning(self, name: str) -> set[str]:
        """Tests that execute a line in which a name occurs."""
        found: set[str] = set()
        for path in files(self.root):
            for i, line in enumerate((self.root / path).read_text().splitlines(), 1):
                if re.search(rf"\b{name}\b", line):
                    found |= self.tests_of[path].get(i, set())
        return found

    def _ranked(self, mutant: Mutant, tests: set[str]) -> list[str]:
        """Fast tests first, and those of a file that is named after the module.

        The variants of a parametrised test take turns with other tests, which are likelier to see something else.
        """
        stem = mutant.path.rpartition("/")[2].removesuffix(".py")
        variants: dict[str, int] = defaultdict(int)
        turns = {}
        for name in sorted(tests, key=lambda x: (self.seconds[x], self.sizes[x], x)):
            function = name.partition("[")[0]
            bonus = 0.2 if stem in name.partition("::")[0] else 1.0
            turns[name] = bonus * (self.seconds[name] + 0.05 + 0.3 * variants[function]) + self._startup(name)
            variants[function] += 1
        return sorted(turns, key=lambda x: (turns[x], x))


def _around(file: Path, line: int) -> tuple[ast.stmt, ast.FunctionDef | None]:
    """The smallest statement at a line, without the body of a compound one, and the function around it."""
    statement, function = None, None
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.stmt) and node.lineno <= line <= node.end_lineno:
            statement = node  # breadth first: inner ones come later
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                function = node
    if isinstance(getattr(statement, "body", None), list) and statement.body:
        statement = ast.copy_location(ast.Pass(), statement)
        statement.lineno = statement.end_lineno = line
    return statement, function


def _bound(node: ast.stmt) -> list[str]:
    """The names that an assignment at module or class level binds."""
    targets = (
        node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    )
    return [x.id for target in targets for x in ast.walk(target) if isinstance(x, ast.Name)]


if __name__ == "__main__":
    preload()
    _folder, _copy = map(Path, sys.argv[1:3])
    LineMap(_folder, _copy).record(_copy, sys.argv[3])
    sys.stdout.flush()
    os._exit(0)
