# SPDX-License-Identifier: Apache-2.0
"""The benchmark of distillation runs, and both of its ways agree. Its times are not tested."""

from __future__ import annotations

import pandas as pd
import pytest

from benchmarks import distillation


@pytest.mark.slow
def test_both_ways_agree(tmp_path):
    path = tmp_path / "rows.csv"
    distillation.main(["--quick", "--threads", "1", "--repeats", "1", "--output", str(path)])
    rows = pd.read_csv(path)
    assert set(rows["part"]) == {"memory", "time", "teacher"}
    exact = rows[~rows["case"].str.endswith("eager") | (rows["dtype"] == "fp32")]
    assert exact["difference"].max() < 1e-5
    assert rows["difference"].max() < 2e-2
    assert (rows["ratio"] > 0).all()
