# SPDX-License-Identifier: Apache-2.0
"""Runs a sample of mutants and keeps the results in a file, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from . import mutants
from .lines import LineMap, recordings
from .mutants import Mutant
from .processes import BUILT, ROOT, Outcome, copy_checkout, planted, preload, run_tests

FOLDER = ROOT / ".mutation"
EQUIVALENT = Path(__file__).with_name("equivalent.json")
#: The share of the mutants that can be caught which must be.
REQUIRED = 0.95
#: Most tests and files of the first, short run.
FIRST_TESTS, FIRST_FILES = 40, 4
#: Why a mutant that exceeds its limit is not caught; such a result is not kept.
SLOW = "exceeds its limit without the mutant too"


@dataclasses.dataclass
class Result:
    """What became of a mutant.

    Attributes:
        key: :attr:`.Mutant.key`.
        state: :func:`state_of` the checkout it was run in.
        status: ``caught``, ``survived`` or ``equivalent``.
        how: ``failed``, ``crashed``, ``timeout``, ``unstarted`` (the package or its tests cannot be imported any
            more), :data:`SLOW`, or the reason why a mutant is equivalent.
        test: the test that caught it.
        ran: how many tests ran.
        of: how many tests execute the line, its function, or what reads its name.
        seconds: how long they took.
        where: the file and the line at that time.
        diff: the changed lines.
    """

    key: str
    state: str
    status: str
    how: str
    test: str
    ran: int
    of: int
    seconds: float
    where: str
    diff: str


class CampaignError(Exception):
    """The tests cannot tell anything about a mutant."""


def state_of(root: Path, budget: float) -> str:
    """Names what a result depends on: the sources, the tests with all that they use, the library and the budget."""
    digest = hashlib.sha256(f"{budget:g}".encode())
    sources = (x for folder in ("peftkern", "tests", "csrc") for x in (root / folder).rglob("*") if x.is_file())
    names = {x.relative_to(root).as_posix() for x in sources if "__pycache__" not in x.parts}
    names |= {x for x in ("pyproject.toml", *BUILT) if (root / x).is_file()}
    names.discard(EQUIVALENT.relative_to(ROOT).as_posix())
    for name in sorted(names):
        digest.update(name.encode() + b"\0" + hashlib.sha256((root / name).read_bytes()).digest())
    return digest.hexdigest()[:16]


def equivalents() -> dict[str, str]:
    """Mutants that no test can catch, by their keys, and the reason."""
    entries = json.loads(EQUIVALENT.read_text())
    return {json.dumps([x[name] for name in mutants.KEY]): x["reason"] for x in entries}


class Campaign:
    """Mutants in a copy of the checkout.

    Args:
        folder: keeps recordings of lines and results.
        say: prints a line.
        budget: how many seconds of tests a mutant must survive, as recorded: about four times what they take here.
    """

    def __init__(self, folder: Path = FOLDER, say: Callable[[str], None] = print, budget: float = 60.0) -> None:
        self.folder, self.say, self.budget = folder, say, budget
        self.work = Path(tempfile.mkdtemp(prefix="peftkern-mutation-"))
        self.copy = copy_checkout(self.work / "copy")
        (folder / "build").mkdir(parents=True, exist_ok=True)
        (self.copy / "build").symlink_to((folder / "build").absolute())  # what tests build is built once
        self.state = state_of(self.copy, budget)
        self.lines = LineMap(folder, self.copy)
        self.results_file = folder / "results.jsonl"

    def close(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)

    def prepare(self, only: Iterable[str] | None = None) -> None:
        """Records the lines of test files that are new or have changed, or of some of them."""
        preload()
        missing = self.lines.missing() if only is None else list(only)
        for i, test_file in enumerate(missing, 1):
            outcome = self.lines.record(self.copy, test_file)
            failed = [name for name, result, _ in outcome.results if result == "failed"]
            note = f", without {len(failed)} that failed under the tracer" if failed else ""
            if outcome.status in ("crashed", "unstarted", "timeout"):
                note += f", {outcome.status}: {outcome.output[-300:]}"
            count, seconds = len(outcome.results), outcome.seconds
            self.say(f"recorded [{i}/{len(missing)}] {test_file}: {count} tests, {seconds:.0f} s{note}")
        self.lines.load()
        preload(sorted(self.lines.modules))

    def earlier(self, keep_caught: bool = False) -> dict[str, Result]:
        """Results in this state of the checkout, by key; with ``keep_caught`` also of mutants caught in any other."""
        lines = self.results_file.read_text().splitlines() if self.results_file.exists() else []
        found = [Result(**json.loads(line)) for line in lines]
        found = [x for x in found if x.status != "caught" or "::" in x.test or x.how == "unstarted"]
        return {x.key: x for x in found if x.state == self.state or (keep_caught and x.status == "caught")}

    def run(self, sample: list[Mutant], keep_caught: bool = False) -> list[Result]:
        """Runs a sample; appends each result to the file as soon as it is known."""
        known, reasons, results = self.earlier(keep_caught), equivalents(), []
        for i, mutant in enumerate(sample, 1):
            where = f"{mutant.path}:{mutant.line}"
            if mutant.key in reasons:
                source = (self.copy / mutant.path).read_bytes()
                result = Result(mutant.key, self.state, "equivalent", reasons[mutant.key], "", 0, 0, 0.0, where,
                                mutant.diff(source))  # fmt: skip
            elif mutant.key in known:
                result = dataclasses.replace(known[mutant.key], where=where)
            else:
                result = self.attempt(mutant)
                if result.how != SLOW:
                    with self.results_file.open("a") as file:
                        file.write(json.dumps(dataclasses.asdict(result)) + "\n")
            results.append(result)
            by = f"{result.how}: {result.test}" if result.status == "caught" else f"{result.ran} of {result.of} tests"
            self.say(f"[{i}/{len(sample)}] {result.status:10} {result.seconds:5.1f} s  {where}  {by}")
        return results

    def attempt(self, mutant: Mutant) -> Result:
        """Runs the tests for one mutant until one fails: a few likely ones first, then the rest."""
        source = (self.copy / mutant.path).read_bytes()
        plant = functools.partial(planted, self.copy / mutant.path, mutant.applied(source))
        tests, count = self.lines.tests_for(mutant, self.budget)
        first, files = [], set()
        for name in tests[:FIRST_TESTS]:
            file = name.partition("::")[0]
            if file in files or len(files) < FIRST_FILES:
                files.add(file)
                first.append(name)
        rest = [name for name in tests if name not in set(first)]
        status, how, test, seconds = "survived", "", "", 0.0
        for part in (first, rest):
            if part and status == "survived" and not how:
                outcome = self.verdict(part, plant)
                seconds += outcome.seconds
                if outcome.status == SLOW:
                    how = SLOW
                elif outcome.status == "renamed":  # recorded again: the tests have other names
                    return self.attempt(mutant)
                elif outcome.status != "passed":
                    status, how, test = "caught", outcome.status, outcome.test
        where = f"{mutant.path}:{mutant.line}"
        return Result(mutant.key, self.state, status, how, test, len(tests), count, round(seconds, 2), where,
                      mutant.diff(source))  # fmt: skip

    def limit(self, tests: list[str]) -> float:
        """Seconds after which a run of tests hangs."""
        return 60 + 5 * self.lines.expected(tests)

    def verdict(self, tests: list[str], plant: Callable[[], contextlib.AbstractContextManager]) -> Outcome:
        """Runs tests with a mutant; what the clean copy does as well says nothing about the mutant.

        The status is that of the run, or :data:`SLOW`, or ``renamed`` if tests had to be recorded again.

        Args:
            tests: their node ids.
            plant: plants the mutant.
        """
        with plant():
            outcome = run_tests(self.copy, tests, self.limit(tests))
        if outcome.status == "timeout":
            outcome = self._again(tests, plant, outcome)
        if outcome.status in (SLOW, "timeout") or outcome.started:
            return outcome
        lost = self._not_collected(tests)
        if not lost:
            return dataclasses.replace(outcome, status="unstarted")
        self._record_again({name.partition("::")[0] for name in lost})
        return dataclasses.replace(outcome, status="renamed")

    def _again(self, tests: list[str], plant: Callable, outcome: Outcome) -> Outcome:
        """Whether a run that exceeded its limit does so because of the mutant: the test that hung, then all."""
        for part, factor in (([outcome.test] if "::" in outcome.test else tests, 1), (tests, 2)):
            clean = run_tests(self.copy, part, self.limit(part))
            if clean.status == "timeout":
                return dataclasses.replace(outcome, status=SLOW)
            if clean.status == "unstarted":
                return dataclasses.replace(clean, status="unstarted", started=False)
            with plant():
                again = run_tests(self.copy, part, factor * self.limit(part))
            if again.status != "passed" or part == tests:
                return again
        return again

    def _not_collected(self, tests: list[str]) -> set[str]:
        """Those of some tests that the clean copy does not collect."""
        test_files = sorted({name.partition("::")[0] for name in tests})
        return set(tests) - run_tests(self.copy, test_files, self.limit(tests), options=["--collect-only"]).collected

    def _record_again(self, test_files: set[str]) -> None:
        """Records test files of which the clean copy does not collect all tests. Fails if it still does not."""
        self.prepare([x for x in recordings(self.copy) if x.partition("#")[0] in test_files])
        known = sorted(x for x in self.lines.seconds if x.partition("::")[0] in test_files)
        lost = sorted(self._not_collected(known))
        if lost:
            raise CampaignError(f"recorded tests that the copy does not collect without a mutant: {lost[:5]}")

    def unreliable(self, results: list[Result]) -> set[str]:
        """Tests that caught a mutant but fail without one too."""
        tests = sorted({x.test for x in results if x.status == "caught" and "::" in x.test})
        timeout = 300 + 5 * self.lines.expected(tests)
        outcome = run_tests(self.copy, tests, timeout, options=["--maxfail=1000"]) if tests else None
        passed = {name for name, result, _ in outcome.results if result == "passed"} if outcome else set()
        return set(tests) - passed


def share_caught(results: list[Result]) -> float:
    """The caught ones of those that can be caught."""
    possible = [x for x in results if x.status != "equivalent"]
    return sum(x.status == "caught" for x in possible) / max(1, len(possible))


def report(results: list[Result], say: Callable[[str], None] = print) -> None:
    """The survivors with their diffs, the equivalent ones with reasons, and the total."""
    for title, status in (("equivalent", "equivalent"), ("survivors", "survived")):
        found = [x for x in results if x.status == status]
        if found:
            say(f"\n{title}:")
        for x in found:
            _, function, *_ = json.loads(x.key)
            note = x.how or (f"{x.ran} of {x.of} tests passed" if x.of else "no fast test executes it")
            say(f"\n{x.where} {function}: {note}")
            say("\n".join(f"    {line}" for line in x.diff.splitlines()))
    counts = {status: sum(x.status == status for x in results) for status in ("caught", "survived", "equivalent")}
    total, seconds = len(results), sum(x.seconds for x in results)
    say(f"\n{counts['caught']} of {total} mutants caught, {counts['survived']} survived, {counts['equivalent']} "
        f"declared equivalent: {share_caught(results):.1%} of those that can be caught, in {seconds / 60:.1f} min "
        "of tests")  # fmt: skip
