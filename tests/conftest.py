# SPDX-License-Identifier: Apache-2.0
"""Shared fixtures: quiet determinism for every test, and poisoned memory for those that ask."""

from __future__ import annotations

import sys

import hypothesis
import pytest
import torch

from peftkern.backends import registry

hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, max_examples=50)
hypothesis.settings.load_profile("ci")


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


@pytest.fixture
def poisoned(monkeypatch):
    """Whatever the package allocates uninitialised starts as NaN, so an element left unwritten is seen."""
    new_empty = torch.Tensor.new_empty

    def new_nan(self, *args, **kwargs):
        tensor = new_empty(self, *args, **kwargs)
        if tensor.is_floating_point() and sys._getframe(1).f_globals["__name__"].startswith("peftkern"):
            tensor.fill_(float("nan"))
        return tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", new_nan)
