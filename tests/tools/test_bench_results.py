# SPDX-License-Identifier: Apache-2.0
"""Rows of ``peftkern bench``, their comparison and the report."""

from __future__ import annotations

import pytest

from peftkern.tools.bench import rows
from peftkern.tools.bench.report import sections, write_report
from peftkern.tools.bench.rows import Comparison, Results


def _row(provider: str, ms: float | None, status: str = "ok", **columns) -> dict:
    row = {"model": "m", "B": 1, "Hq": 2, "Hkv": 2, "S": 8, "cached": 0, "D": 8, "P": 4, "window": None,
           "softcap": None, "dtype": "bf16", "device": "cpu", "threads": 1, "direction": "forward",
           "provider": provider, "auto": provider == "peftkern-cpu", "status": status, "reason": ""}  # fmt: skip
    if ms is not None:
        row |= {"p20_ms": ms * 0.9, "p50_ms": ms, "p80_ms": ms * 1.1, "spread": 0.1, "tflops": 1.0, "gb_s": 1.0,
                "error": 1e-3, "error_peft": 1e-3, "error_ratio": 1.0}  # fmt: skip
    return row | {"cpu": "a cpu", "torch": "2", "git": "0", "date": "2026-01-01"} | columns


def _rows() -> list[dict]:
    return [
        _row("peft", 2.0), _row("two-calls", 0.5), _row("no-prefix", 0.4), _row("peftkern", 1.0),
        _row("peftkern-cpu", 1.0, peak_mb=3.0), _row("flex", None, "not timed", reason="slow | here"),
        _row("peft-math", None, "wrong", reason="out errs by 1.0"), _row("peft", 2.0, S=16),
        _row("peftkern", 0.5, S=16),
    ]  # fmt: skip


def test_a_comparison_says_where_we_lose():
    first, second = (Comparison.of(group) for group in rows.groups(_rows()))
    assert first.loses
    assert not second.loses
    assert first.over(first.peft) == 2.0
    assert first.over(first.best) == 0.5
    assert first.over(first.no_prefix) == 0.4
    assert "0.50 times as fast as the best alternative (two-calls)" in str(first)
    assert str(first).endswith("it loses here")


def test_rows_are_read_as_they_were_written(tmp_path):
    results = Results(tmp_path / "rows.csv")
    for row in _rows():
        results.add([row])
    again = Results(tmp_path / "rows.csv")
    assert again.known == results.known
    assert len(again.rows) == len(_rows())
    for read, row in zip(again.rows, _rows(), strict=True):
        for name, value in row.items():
            assert read[name] == (pytest.approx(value, 1e-4) if isinstance(value, float) else value), name


def test_a_report_names_losses_and_what_is_wrong(tmp_path):
    paths = write_report(_rows(), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in paths} == {"report.html", "report.md"}
    page, text = (tmp_path / "report.html").read_text(), (tmp_path / "report.md").read_text()
    assert page.count("<svg") == 3, "the page carries its plots"
    assert "src=" not in page
    for what in ("loses to the best alternative in 1", "out errs by 1.0", "two-calls", "geometric mean 2.83"):
        assert what in page, what
        assert what in text, what
    assert "slow \\| here" in text
    comparison = sections(_rows())[0]
    assert comparison[2][0][0] == "loses", "the worst row is not the first"


def test_a_report_of_nothing_but_reasons(tmp_path):
    paths = write_report([_row("flex", None, "unavailable", reason="no")], tmp_path)
    assert [path.name for path in paths] == ["report.html", "report.md"]
