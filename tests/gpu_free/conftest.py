# SPDX-License-Identifier: Apache-2.0
"""Tests marked ``interpreter`` run in a process of their own, as Triton reads TRITON_INTERPRET at import.

The first of a file starts ``pytest`` on all of that file that were selected; each then reports its own result.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

_REPORTS: dict[str, list[dict]] = {}  # node id -> serialised reports of setup, call, teardown


def pytest_addoption(parser):
    parser.addoption("--reports", type=Path, help="append each test's serialised reports to this file")


def pytest_runtest_logreport(report):
    if _file is not None:
        with _file.open("a") as lines:
            lines.write(json.dumps(_config.hook.pytest_report_to_serializable(config=_config, report=report)) + "\n")


_config: pytest.Config
_file: Path | None = None


def pytest_configure(config):
    global _config, _file
    _config, _file = config, config.getoption("--reports", default=None)


def pytest_runtest_protocol(item, nextitem):
    if item.get_closest_marker("interpreter") is None or os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if item.nodeid not in _REPORTS:
        same_file = [i for i in item.session.items if i.path == item.path and i.get_closest_marker("interpreter")]
        _run([i.nodeid for i in same_file], item.config.rootpath)
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for data in _REPORTS.get(item.nodeid, []):
        report = item.config.hook.pytest_report_from_serializable(config=item.config, data=data)
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    item.session._setupstate.teardown_exact(nextitem)  # of the tests before, that ran here
    return True


def _run(node_ids: list[str], root: Path) -> None:
    """Run tests in the interpreter and fill in their reports; one that has none counts as failed, with the output."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "reports"
        command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", f"--reports={file}", *node_ids]
        done = subprocess.run(
            command, cwd=root, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
        )
        for line in file.read_text().splitlines() if file.exists() else ():
            data = json.loads(line)
            _REPORTS.setdefault(data["nodeid"], []).append(data)
    for node_id in node_ids:
        if node_id not in _REPORTS:
            output = f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
            message = f"the interpreter's process ended before this test:\n{output}"
            report = pytest.TestReport(node_id, (node_id, None, node_id), {}, "failed", message, "call")
            _REPORTS[node_id] = [_config.hook.pytest_report_to_serializable(config=_config, report=report)]
