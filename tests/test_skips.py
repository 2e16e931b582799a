# SPDX-License-Identifier: Apache-2.0
"""A skip for want of a tool that the machine has is a failure."""

from __future__ import annotations

import shutil

from . import skips


def test_a_reason_that_names_a_missing_tool_is_justified(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert skips.unjustified(["needs nvcc", "needs aarch64-linux-gnu-g++", "needs a C compiler"]) == []


def test_a_reason_that_names_a_tool_of_this_machine_is_not(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert skips.unjustified(["nvcc compiles the kernels", "needs a processor with AMX"]) == [
        "nvcc compiles the kernels"
    ]
