# SPDX-License-Identifier: Apache-2.0
"""Products of test parameters, of which the fast lane runs a cover and the slow lane the rest."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def product(*axes: Iterable[Any], strength: int = 2, among: Callable[..., bool] = lambda *case: True) -> list[Any]:
    """All combinations of the axes' values, for ``pytest.mark.parametrize``. Those outside of a cover are slow.

    Args:
        axes: the values of each parameter.
        strength: how many parameters meet in all ways in the fast lane: 2 for every pair of values of any two
            parameters, 1 for every value of each parameter.
        among: takes a combination's values. Only combinations for which it is true can be fast.

    >>> [case.values for case in product("ab", (1, 2), (True, False)) if not case.marks]
    [('a', 1, True), ('a', 2, False), ('b', 1, False), ('b', 2, True)]
    """
    values = [list(axis) for axis in axes]
    # places instead of values, which need not be hashable
    cases = {
        places: tuple(axis[i] for axis, i in zip(values, places, strict=True))
        for places in itertools.product(*(range(len(axis)) for axis in values))
    }
    fast = cover([places for places, case in cases.items() if among(*case)], strength)
    return [pytest.param(*case, marks=() if x in fast else pytest.mark.slow) for x, case in cases.items()]


def cover(cases: list[tuple[int, ...]], strength: int) -> set[tuple[int, ...]]:
    """A few cases that have each set of ``strength`` values, of different parameters, which any of the cases has.

    Takes, again and again, the case with most sets that are missing, and of those the one with the rarest sets.
    """
    taken: set[tuple[int, ...]] = set()
    uses: Counter = Counter()

    def worth(case: tuple[int, ...]) -> tuple[int, int]:
        sets = _sets(case, strength)
        return sum(not uses[x] for x in sets), -sum(uses[x] for x in sets)

    missing = {x for case in cases for x in _sets(case, strength)}
    while missing:
        best = max(cases, key=worth)
        taken.add(best)
        uses.update(_sets(best, strength))
        missing -= uses.keys()
    return taken


def _sets(case: tuple[int, ...], strength: int) -> set[tuple[tuple[int, int], ...]]:
    """Sets of (parameter, value), each in the order of the parameters."""
    return set(itertools.combinations(enumerate(case), strength))
