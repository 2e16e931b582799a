# SPDX-License-Identifier: Apache-2.0
"""Tensors derived from index tensors: computed once, and again as soon as a source changes or is another one."""

from __future__ import annotations

import gc

import pytest
import torch

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


def test_the_same_tensor_is_computed_once():
    double, x = _Counted(), torch.arange(3)
    assert double(x) is double(x)
    assert double.calls == 1


def test_a_change_in_place_is_seen():
    double, x = _Counted(), torch.arange(3)
    double(x)
    x.add_(1)
    assert double(x).tolist() == [2, 4, 6]
    assert double.calls == 2


def test_an_equal_tensor_and_other_facts_are_computed_apart():
    double, x = _Counted(), torch.arange(3)
    for y, facts in ((x, ()), (x.clone(), ()), (x, (1,)), (x.view(3), ())):
        double(y, facts)
    assert double.calls == 4


def test_results_are_freed_with_their_source():
    double, x = _Counted(), torch.arange(3)
    double(x)
    assert len(module._entries) == 1
    del x
    gc.collect()
    assert not module._entries


def test_at_most_eight_results_are_kept():
    double, xs = _Counted(), [torch.arange(n) for n in range(20)]
    for x in xs:
        double(x)
    assert len(module._entries) == 8
    double(xs[0])
    assert double.calls == 21


def test_inference_tensors_have_no_version_and_are_not_remembered():
    double = _Counted()
    with torch.inference_mode():
        x = torch.arange(3)
        double(x)
        x.add_(1)
        assert double(x).tolist() == [2, 4, 6]


def test_a_result_without_sources_is_not_remembered():
    calls = []
    for _ in range(2):
        derived("nothing", (None,), (), lambda: calls.append(1))
    assert len(calls) == 2
