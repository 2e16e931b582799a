# SPDX-License-Identifier: Apache-2.0
"""benchmarks/sharing.py runs, does not time what is wrong, and judges by its bars. Its times are not tested."""

from __future__ import annotations

import types

import pandas as pd
import pytest
import torch

import peftkern
from peftkern.huggingface.wiring import PATCH

from .test_scripts import STAMP, script

__all__ = ["script"]  # a fixture

QUICK = ("--quick", "--no-memory", "--threads", "1", "--dtypes", "fp32")


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces the patch by one that says which rows it ran, and changes the adapter by a factor."""

    def install(rows: tuple[int, int] | None, factor: float = 1.0) -> None:
        def patch(model, *, share):
            assert share == "prefixes"
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.data.mul_(factor)
            model.__dict__[PATCH] = types.SimpleNamespace(shared_rows=rows)

        monkeypatch.setattr(peftkern, "patch", patch)

    return install


def test_shared_text_runs_once_with_equal_results(script, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    script("sharing").main([*QUICK, "--only", "grpo", "choices", "no sharing", "duplicates", "--output", str(path)])
    rows = pd.read_csv(path).set_index("case")
    assert set(rows) >= STAMP
    assert set(rows["status"]) == {"ok"}
    assert (rows["speedup"] > 0).all()
    for case, least in (("grpo", 1.1), ("choices", 2), ("duplicates", 1.1)):  # short questions may run several times
        assert rows["rows_after"][case] < least * rows["rows_least"][case], f"{case}: shared text runs several times"
    assert "run once" in capsys.readouterr().out


@pytest.mark.slow
def test_every_batch(script, tmp_path):
    rows = script("sharing").main([*QUICK, "--part", "shapes", "adversarial"])
    assert {row["status"] for row in rows} == {"ok"}
    assert [row["case"] for row in rows if row["part"] == "shapes" and row["rows_after"] is None] == []


@pytest.mark.slow
def test_peaks_of_both_sides(script):
    (row,) = script("sharing").main(["--quick", "--threads", "1", "--dtypes", "fp32", "--only", "grpo"])
    if row["peak_ratio"] is None:
        pytest.skip("the system does not report peaks")
    assert 0 < row["peak_ratio"] < 10


def test_a_union_of_prefixes_equals_their_concatenation(script):
    rows = script("sharing").main([*QUICK, "--part", "union"])
    assert [row["status"] for row in rows] == ["ok", "ok"]


def test_what_is_wrong_is_not_timed(script, stand_in):
    stand_in((3, 1), factor=1.01)
    (row,) = script("sharing").main([*QUICK, "--only", "grpo"])
    assert row["status"].startswith("wrong: ")
    assert row["speedup"] is None
    assert row["missed"] == "equal"


@pytest.mark.parametrize(
    ("rows", "missed"), [((1_000_000, 1), "time"), ((1, 1_000_000), ""), (None, "rows")], ids=["slow", "fast", "none"]
)
def test_bars(script, stand_in, rows, missed):
    """A patch that changes nothing reaches a bar for more rows than before, and misses one for far fewer."""
    stand_in(rows)
    module = script("sharing")
    arguments = [*QUICK, "--only", "choices"]
    (row,) = module.main(arguments)
    assert row["status"] == "ok"
    assert missed in row["missed"]
    if missed:
        with pytest.raises(SystemExit) as stopped:
            module.main([*arguments, "--bars"])
        assert stopped.value.code == 1
    else:
        module.main([*arguments, "--bars"])


def test_batches_share_what_their_names_say(script):
    cases = script("sharing_cases")
    text = cases.Text(1000)
    batches = {name: case.make(cases.Text(1000)) for name, case in cases.CASES.items()}
    for name, batch in batches.items():
        assert batch.ids.shape == batch.mask.shape == batch.scored.shape
        assert not batch.scored[batch.mask == 0].any(), f"{name}: padding is scored"
        assert batch.answers < batch.ids.shape[1], f"{name}: a first token is scored"
    tokens = {name: int(batch.mask.sum()) for name, batch in batches.items()}
    least = {name: batch.least_rows() for name, batch in batches.items()}
    for name in ("no sharing", "common padding", "groups of 1"):
        assert least[name] > 0.99 * tokens[name], f"{name}: rows share text"
    assert least["all rows equal"] * 8 == tokens["all rows equal"]
    assert least["duplicates"] * 2 == pytest.approx(tokens["duplicates"], rel=0.01)
    assert tokens["grpo"] - least["grpo"] == pytest.approx(7 * 256, rel=0.01)
    padded = batches["common padding"]
    assert (padded.ids[1:, :56] == padded.ids[:-1, :56]).float().mean() > 0.4, "the padding is not common"
    pairs = [(text(3), text(2)), (text(2), text(4))]
    aligned, packed = cases.lay_out(pairs), cases.lay_out(pairs, aligned=False)
    assert aligned.mask.tolist() == [[1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1]]
    assert packed.mask.tolist() == [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]]
    assert aligned.answers == packed.answers == 4


def test_log_probabilities_are_those_of_log_softmax(script):
    function = script("sharing_cases").selective_log_softmax
    logits, ids = torch.randn(2, 3, 7), torch.randint(0, 7, (2, 3))
    expected = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    torch.testing.assert_close(function(logits, ids), expected)
    torch.testing.assert_close(function(logits.bfloat16(), ids).float(), expected, atol=0.05, rtol=0.05)
