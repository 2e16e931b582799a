# SPDX-License-Identifier: Apache-2.0
"""Figures of the comparison."""

from __future__ import annotations

import pytest

from peftkern.self_study import Comparison


def test_the_interval_is_that_of_a_bootstrap():
    comparison = Comparison([float(i % 2) for i in range(100)], [1.0] * 100)
    mean, low, high = comparison.interval()
    assert mean == 0.5
    assert low == pytest.approx(0.4, abs=0.03)
    assert high == pytest.approx(0.6, abs=0.03)
    assert comparison.interval("agreement") == (1.0, 1.0, 1.0)
    assert comparison.interval() == (mean, low, high)
