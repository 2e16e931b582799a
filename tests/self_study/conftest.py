# SPDX-License-Identifier: Apache-2.0
"""A lab, its conversations and the targets of its teacher."""

from __future__ import annotations

import pytest

from peftkern.self_study import capture

from .lab import Lab


@pytest.fixture(scope="module")
def lab():
    return Lab()


@pytest.fixture(scope="module")
def conversations(lab, tmp_path_factory):
    return lab.synthesise(tmp_path_factory.mktemp("study") / "train.jsonl")


@pytest.fixture(scope="module")
def targets(lab, conversations):
    return capture(lab.model, lab.document, conversations, 8)
