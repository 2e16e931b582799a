# SPDX-License-Identifier: Apache-2.0
"""benchmarks/hybrids.py and benchmarks/starts.py train what they say, and continue where they stopped."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from benchmarks import readme_tables
from peftkern.tools.demo import training

from .test_scripts import STAMP, script

__all__ = ["script"]  # a fixture


@pytest.fixture
def arguments(tiny, tmp_path):
    """Of a short run on a tiny model, whose rows go to ``tmp_path / "rows.csv"``."""
    return [
        "--quick", "--model", str(tiny / "model"), "--data", str(tiny / "reviews.csv"), "--steps", "3",
        "--output", str(tmp_path / "rows.csv"),
    ]  # fmt: skip


def test_every_way_trains_what_it_says(script, arguments, capsys):
    rows = pd.DataFrame(script("hybrids").main([*arguments, "--seeds", "2"])).set_index("arm")
    assert set(rows) >= STAMP
    ways = ["lora", "prefix", "prompt", "lora + prefix"]
    assert list(rows.index) == ["untrained", *ways, *ways]
    parameters = rows["parameters"].groupby("arm").first()
    layers, heads, dim, width, length, rank = 2, 2, 8, 32, 5, 2
    assert parameters["prefix"] == length * layers * 2 * heads * dim
    assert parameters["prompt"] == length * width
    assert parameters["lora"] == layers * rank * (2 * width + width + heads * dim)
    assert parameters["lora + prefix"] == parameters["lora"] + parameters["prefix"]
    assert parameters["untrained"] == 0
    losses = rows["loss"].dropna().groupby("arm").agg(list)
    assert all(first != second for first, second in losses), "seeds change nothing"
    printed = capsys.readouterr().out
    assert "lora + prefix" in printed
    assert "±" in printed


def test_every_start_differs(script, arguments):
    rows = pd.DataFrame(script("starts").main([*arguments, "--seeds", "1"])).set_index("arm")
    assert len(set(rows["loss"].dropna())) == len(rows) - 1
    assert set(rows.index) > {f"prefix, {start}" for start in ("random", "zero", "vocabulary", "text")}
    for kind in ("prefix", "prompt"):
        assert rows["parameters"][[name for name in rows.index if name.startswith(kind)]].nunique() == 1


def test_a_stopped_run_continues(script, arguments, tmp_path, monkeypatch):
    module = script("hybrids")
    whole = module.main([*arguments, "--seeds", "1"])
    path = tmp_path / "rows.csv"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    names = []
    evaluate = training.evaluate
    monkeypatch.setattr(
        script("review_training"), "evaluate", lambda model, *rest: names.append(model) or evaluate(model, *rest)
    )
    again = module.main([*arguments, "--seeds", "1"])
    assert len(names) == 3, "runs that are in the file were repeated"
    for name in ("arm", "parameters", "accuracy"):
        assert [row[name] for row in again] == [row[name] for row in whole]
    assert [row["loss"] for row in again[1:]] == pytest.approx([row["loss"] for row in whole[1:]], rel=1e-4)
    names.clear()
    assert len(module.main([*arguments, "--seeds", "1", "--only", "lora"])) == 1
    assert not names
    module.main([*arguments, "--seeds", "1", "--only", "lora", "--length", "6"])
    assert len(names) == 1, "rows of other settings do not count"
    assert len(pd.read_csv(path)) == 6


def test_the_error_is_that_of_the_mean(script):
    mean, error = script("review_training").mean_and_error([0.7, 0.8, 0.9])
    assert mean == pytest.approx(0.8)
    assert error == pytest.approx(torch.tensor([0.7, 0.8, 0.9]).std().item() / 3**0.5)


def test_tables_have_the_mean_of_the_seeds(monkeypatch, tmp_path):
    rows = [
        {"arm": "untrained", "steps": 0, "parameters": 0, "accuracy": 0.745},
        {"arm": "lora + prefix", "steps": 9, "parameters": 12345, "accuracy": 0.8, "step_s": 1.0},
        {"arm": "lora + prefix", "steps": 9, "parameters": 12345, "accuracy": 0.9, "step_s": 2.0},
    ]
    pd.DataFrame(rows).to_csv(tmp_path / "hybrids.csv", index=False)
    names = ("prefix, random", "prefix, text", "prompt, text", "prefix, text")
    pd.DataFrame([{"arm": name, "accuracy": 0.7 + 0.1 * i} for i, name in enumerate(names)]).to_csv(
        tmp_path / "starts.csv", index=False
    )
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    lines = readme_tables.hybrids().splitlines()[2:]
    assert lines == ["| untrained | 0 | 74.5 | - |", "| lora + prefix | 12,345 | 85.0 ± 5.0 | 1.50 |"]
    lines = readme_tables.starts().splitlines()[2:]
    assert lines == ["| random | 70.0 | - |", "| text | 90.0 ± 10.0 | 90.0 |"]
