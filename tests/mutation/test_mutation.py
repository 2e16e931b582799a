# SPDX-License-Identifier: Apache-2.0
"""The machinery of the mutation tests; and what is declared equivalent still exists. The campaign is a command."""

from __future__ import annotations

import ast
import contextlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from . import campaign, mutants, processes
from .mutants import Mutant
from .processes import ROOT

SOURCE = '''
from typing import TYPE_CHECKING, overload
__all__ = ["f", 1]
if TYPE_CHECKING:
    X = 1
LIMIT: int = 7
@overload
def f(x: int = 1) -> int: ...
@cached(maxsize=8)
def f(x, y, flag=True):
    """Adds 1."""
    if x < y and not flag:
        raise ValueError(f"{x + 1}", 2)
    for i in zip(x, y, strict=True):
        y += i
    return (x) - y
class A:
    def g(self):
        assert self.x == 1
        return True
'''


def test_every_fault_is_drawn_and_nothing_else():
    found = mutants.of_file("a.py", SOURCE.encode())
    assert {(x.function, x.old, x.new) for x in found} == {
        ("", "7 in LIMIT: int = 7", "8"), ("", "7 in LIMIT: int = 7", "(6)"),
        ("f", "True in def f(x, y, flag=True):", "False"),
        ("f", "x < y and not flag", "(not (x < y and not flag))"),
        ("f", "and in x < y and not flag", "or"), ("f", "< in x < y", "<="), ("f", "< in x < y", ">="),
        ("f", "not flag", "(flag)"), ("f", "+= in y += i", "-="), ("f", "(x) - y", "None"),
        ("f", "- in (x) - y", "+"),
        ("A.g", "True in return True", "False"),
    }  # fmt: skip
    for x in found:
        mutated = x.applied(SOURCE.encode())
        assert ast.dump(ast.parse(mutated)) != ast.dump(ast.parse(SOURCE)), x
        assert len(x.diff(SOURCE.encode()).splitlines()) == 2, x


def test_every_mutant_of_the_package_compiles_and_has_a_key_of_its_own():
    found = mutants.all_of(ROOT)
    assert len(found) > 5000
    assert len({x.key for x in found}) == len(found)
    for x in mutants.sample(found, 1, 300):
        ast.parse(x.applied((ROOT / x.path).read_bytes()))


def test_a_sample_outlives_changes_elsewhere():
    before = mutants.of_file("a.py", SOURCE.encode())
    after = mutants.of_file("a.py", ("# one more line\n" + SOURCE.replace("7", "9")).encode())
    kept = [{x.key for x in mutants.sample(xs, 3, 6) if x.function == "f"} for xs in (before, after)]
    assert len(kept[0] & kept[1]) >= 4
    assert mutants.sample(before, 3, 6) == mutants.sample(before[::-1], 3, 6)
    assert mutants.sample(before, 3, 6) != mutants.sample(before, 4, 6)


def test_what_is_declared_equivalent_exists_and_has_a_reason():
    for key, reason in campaign.equivalents().items():
        path = json.loads(key)[0]
        assert key in {x.key for x in mutants.of_file(path, (ROOT / path).read_bytes())}, f"no longer there: {key}"
        assert len(reason) > 20, key


PATH, TEST_FILE = "peftkern/layer_shapes.py", "tests/test_layer_shapes.py"


def _planted(before: bytes, text: bytes) -> Mutant:
    """Inserts a text before the first place of another one in :data:`PATH`."""
    source = (ROOT / PATH).read_bytes()
    place = source.index(before)
    line = source.count(b"\n", 0, place) + 1
    return Mutant(PATH, "", line, "", "planted", text.decode(), 0, place, place, text)


def small_campaign(folder: str) -> None:
    """Two planted mutants, one of them harmless, and five of a sample, with the tests of one file."""
    source = (ROOT / PATH).read_bytes()
    drawn = mutants.sample([x for x in mutants.of_file(PATH, source) if "len(" in x.text], 0, 5)
    sample = [_planted(b"import torch", b'"Mutated."\n'), _planted(b"import torch", b"1 / 0\n"), *drawn]
    lines: list[str] = []
    run = campaign.Campaign(Path(folder), lines.append)
    try:
        run.prepare([TEST_FILE])
        results = run.run(sample)
        assert (run.copy / PATH).read_bytes() == source, "the copy is as before"
        assert run.unreliable(results) == set()
        ran, run.attempt = run.attempt, None
        assert [x.status for x in run.run(sample)] == [x.status for x in results], "the results were not kept"
        run.attempt = ran
        hanging = _planted(b"import torch", b"while True: pass\n")
        tests, _ = run.lines.tests_for(hanging, 5.0)
        with campaign.planted(run.copy / PATH, hanging.applied(source)):
            assert campaign.run_tests(run.copy, tests, timeout=6.0).status == "timeout"
    finally:
        run.close()
    assert [x.status for x in results[:2]] == ["survived", "caught"], lines
    assert sum(x.status == "caught" for x in results[2:]) >= 2, lines
    campaign.report(results, lines.append)
    assert any("Mutated." in line for line in lines), "the survivor is not shown"


def _outcome_of(tmp_path, code, lines):
    (tmp_path / "results").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return processes._outcome(tmp_path, code, 1.0)


@pytest.mark.parametrize("code", [-11, 2, 3, 4, 99])
def test_a_run_without_a_test_has_not_started(tmp_path, code):
    outcome = _outcome_of(tmp_path, code, [])
    assert (outcome.status, outcome.started) == ("unstarted", False)
    outcome = _outcome_of(tmp_path, code, [["collected", "a::b"], ["start", "a::b"]])
    assert (outcome.status, outcome.test, outcome.collected) == ("crashed", "a::b", {"a::b"})


class _Scripted(campaign.Campaign):
    """A campaign without a copy, whose runs end as a script says."""

    def __init__(self, monkeypatch, script):
        self.script, self.is_mutated, self.copy, self.recorded = script, False, ROOT, []
        self.limit = lambda tests: 10.0 * len(tests)
        monkeypatch.setattr(campaign, "run_tests", self._next)

    @contextlib.contextmanager
    def plant(self):
        self.is_mutated = True
        yield
        self.is_mutated = False

    def _next(self, copy, tests, timeout, options=()):
        mutated, seconds, outcome = self.script.pop(0)
        assert (self.is_mutated, timeout) == (mutated, seconds), "another run was expected"
        return outcome

    def _record_again(self, test_files):
        self.recorded.append(test_files)


def _ended(status, test="", started=True, collected=()):
    return processes.Outcome(status, test, 1.0, [], "", started, frozenset(collected))


TESTS = ["a.py::f", "a.py::g"]


@pytest.mark.parametrize(("collected", "status"), [(TESTS, "unstarted"), (["a.py::f"], "renamed")])
def test_a_mutant_that_no_test_starts_with_is_caught_if_the_clean_copy_collects(monkeypatch, collected, status):
    script = [(True, 20.0, _ended("unstarted", started=False)),
              (False, 20.0, _ended("passed", started=False, collected=collected))]  # fmt: skip
    run = _Scripted(monkeypatch, script)
    assert run.verdict(TESTS, run.plant).status == status
    assert run.recorded == ([{"a.py"}] if status == "renamed" else [])


_HANGS, _PASSES = _ended("timeout", "a.py::g"), _ended("passed")


@pytest.mark.parametrize(
    ("then", "status"),
    [
        ([(False, 10.0, _PASSES), (True, 10.0, _HANGS)], "timeout"),
        ([(False, 10.0, _HANGS)], campaign.SLOW),
        ([(False, 10.0, _PASSES), (True, 10.0, _PASSES), (False, 20.0, _PASSES), (True, 40.0, _HANGS)], "timeout"),
        ([(False, 10.0, _PASSES), (True, 10.0, _PASSES), (False, 20.0, _PASSES), (True, 40.0, _PASSES)], "passed"),
    ],
)
def test_a_limit_must_be_exceeded_twice_and_only_with_the_mutant(monkeypatch, then, status):
    run = _Scripted(monkeypatch, [(True, 20.0, _HANGS), *then])
    assert run.verdict(TESTS, run.plant).status == status
    assert not run.script, "fewer runs than expected"


def test_an_equal_edit_before_it_changes_the_key():
    before = mutants.of_file("a.py", b"def f(x):\n    y = x + 1\n")
    after = mutants.of_file("a.py", b"def f(x):\n    y = x + 1\n    y = x + 1\n")
    assert not {x.key for x in before} & {x.key for x in after}


@pytest.mark.slow
def test_a_small_campaign(tmp_path):
    """In a process that has not imported the package."""
    code = f"from tests.mutation import test_mutation; test_mutation.small_campaign({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.partition("nanobind")[0][-3000:]
