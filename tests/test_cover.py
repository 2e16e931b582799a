# SPDX-License-Identifier: Apache-2.0
"""The cover of a product has every pair of values, in far fewer cases, and nothing is lost."""

from __future__ import annotations

import itertools

import pytest

from .cover import product

AXES = (range(7), "abc", (True, False), ([1], [2]))


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_the_fast_cases_have_every_set_of_values(strength):
    cases = product(*AXES, strength=strength)
    assert [case.values for case in cases] == list(itertools.product(*AXES)), "the slow lane has the rest"
    fast = [case.values for case in cases if not case.marks]
    assert len(fast) <= {1: 7, 2: 22, 3: 45}[strength] < len(cases) == 84
    for places in itertools.combinations(range(len(AXES)), strength):
        for values in itertools.product(*(AXES[place] for place in places)):
            assert any(tuple(case[place] for place in places) == values for case in fast), values


def test_the_values_of_a_short_axis_take_turns():
    fast = [case.values for case in product(range(6), "ab", strength=1) if not case.marks]
    assert [sum(x == letter for _, x in fast) for letter in "ab"] == [3, 3]


def test_only_chosen_cases_are_fast():
    cases = product(range(4), range(4), among=lambda x, y: x < y)
    assert [case.values for case in cases if not case.marks] == list(itertools.combinations(range(4), 2))
    assert not any(not case.marks for case in product(range(4), range(4), among=lambda x, y: False))
