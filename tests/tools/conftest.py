# SPDX-License-Identifier: Apache-2.0
"""A short run of the demo on a tiny random model and made-up reviews."""

from __future__ import annotations

import pytest

from peftkern.tools.demo import session
from peftkern.tools.demo.training import ARMS


@pytest.fixture
def command(tiny, tmp_path):
    """The command line of a short run on the tiny assets, with results in ``tmp_path / "out"``."""
    return [
        "demo", "--model", str(tiny / "model"), "--data", str(tiny / "reviews.csv"), "--out", str(tmp_path / "out"),
        "--dtype", "fp32", "--length", "5", "--steps", "6", "--batch-size", "4", "--seq", "24", "--eval-rows", "12",
        "--threads", "1",
    ]  # fmt: skip


@pytest.fixture
def no_memory(monkeypatch):
    """Leave out the measuring process, which takes seconds to start."""
    sizes = {arm: {"peak": 2000, "saved": 1000, "rounding": 0.0} for arm in ARMS}
    monkeypatch.setattr(session, "measure", lambda *_: sizes)
