# SPDX-License-Identifier: Apache-2.0
"""Tensors derived from constants: computed once per tensor and stream, and freed with it."""

from __future__ import annotations

import gc

import pytest
import torch

from peftkern.arguments import constant
from peftkern.backends import derived as module
from peftkern.backends.derived import derived


@pytest.fixture(autouse=True)
def _empty():
    module._entries.clear()
    yield
    module._entries.clear()


class _Counted:
    """Computes the doubled source, and counts."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x, facts=()):
        def compute():
            self.calls += 1
            return x * 2

        return derived("double", (x, None), facts, compute)


def test_the_same_constant_is_computed_once():
    double, x = _Counted(), constant(torch.arange(3))
    assert double(x) is double(x)
    assert double.calls == 1


def test_what_may_change_is_computed_each_time():
    """Writes through ``data``, numpy or a collective leave no trace on a tensor."""
    double, x = _Counted(), torch.arange(3)
    double(x)
    x.data.add_(1)
    assert double(x).tolist() == [2, 4, 6]
    assert double.calls == 2


def test_another_tensor_other_facts_and_another_stream_are_computed_apart(monkeypatch):
    double, x = _Counted(), constant(torch.arange(3))
    for y, facts in ((x, ()), (constant(x.clone()), ()), (x, (1,)), (constant(x.view(3)), ())):
        double(y, facts)
    assert double.calls == 4
    monkeypatch.setattr(module, "_stream", lambda device: 7)
    double(x)
    assert double.calls == 5


def test_nothing_is_remembered_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(module, "_is_capturing", lambda: True)
    double, x = _Counted(), constant(torch.arange(3))
    double(x)
    double(x)
    assert double.calls == 2
    assert not module._entries


def test_results_are_freed_with_their_source():
    double, x = _Counted(), constant(torch.arange(3))
    double(x)
    assert len(module._entries) == 1
    del x
    gc.collect()
    assert not module._entries


def test_at_most_eight_results_are_kept():
    double, xs = _Counted(), [constant(torch.arange(n)) for n in range(20)]
    for x in xs:
        double(x)
    assert len(module._entries) == 8
    double(xs[0])
    assert double.calls == 21


def test_a_result_without_sources_is_not_remembered():
    calls = []
    for _ in range(2):
        derived("nothing", (None,), (), lambda: calls.append(1))
    assert len(calls) == 2
