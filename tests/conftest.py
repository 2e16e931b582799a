# SPDX-License-Identifier: Apache-2.0
"""The order of the tests, their skips by reason, and fixtures: a fixed seed, fresh plans, poisoned memory."""

from __future__ import annotations

import sys

import hypothesis
import pytest
import torch

from peftkern.backends import registry

from . import skips

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("ci")


#: Folders from the fastest to the slowest; a failure in a fast test is seen early.
ORDER = (
    "architecture", "", "native", "tools", "testing", "backends", "docs", "examples", "self_study", "huggingface",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    def rank(item) -> int:
        folder = item.nodeid.removeprefix("tests/").rpartition("/")[0].partition("/")[0]
        return ORDER.index(folder) if folder in ORDER else len(ORDER)

    items.sort(key=rank)


def _skips(config):
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    return skips.reasons(reporter.stats.get("skipped", ())) if reporter else {}


def pytest_terminal_summary(terminalreporter, config):
    found = _skips(config)
    if found:
        terminalreporter.section("skipped, by reason")
        for reason, count in sorted(found.items()):
            terminalreporter.line(f"{count:5} {reason}")
    for reason in skips.unjustified(found):
        terminalreporter.line(f"FAILED: skipped although this machine has the tool: {reason}", red=True)


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput") and skips.unjustified(_skips(session.config)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def _seed():
    """Every test starts from the same random state, on one thread unless it says otherwise."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _fresh_plans():
    """Plans and estimates are cached; a test that replaces a kernel or a library must not meet those of another."""
    registry.forget()
    yield
    registry.forget()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with ``model`` and ``reviews.csv`` for the demo and the benchmarks."""
    from .tools.tiny_demo import write_assets  # imports transformers, which most tests do without

    return write_assets(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def poisoned(monkeypatch):
    """Whatever the package allocates uninitialised starts as NaN, so an element left unwritten is seen."""

    def poison(name: str) -> None:
        allocate = getattr(torch.Tensor, name)

        def allocate_nan(self, *args, **kwargs):
            tensor = allocate(self, *args, **kwargs)
            if tensor.is_floating_point() and sys._getframe(1).f_globals["__name__"].startswith("peftkern"):
                tensor.fill_(float("nan"))
            return tensor

        monkeypatch.setattr(torch.Tensor, name, allocate_nan)

    poison("new_empty")
    poison("new_empty_strided")
