# SPDX-License-Identifier: Apache-2.0
"""A folder of prefixes, and an engine that serves it."""

from __future__ import annotations

import pytest

from .vllm_connector import LENGTHS, Engine, write_prefix


@pytest.fixture
def folder(tmp_path):
    for seed, (name, length) in enumerate(LENGTHS.items()):
        write_prefix(tmp_path, name, length, seed)
    return tmp_path


@pytest.fixture
def engine(monkeypatch, folder):
    return Engine(monkeypatch, folder)
