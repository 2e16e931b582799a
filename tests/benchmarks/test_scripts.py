# SPDX-License-Identifier: Apache-2.0
"""The benchmarks run, check what they time, and read their own results. Their times are not tested."""

from __future__ import annotations

import importlib
import math
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import readme_tables
from peftkern.tools.bench import memory, rows
from peftkern.tools.bench.measuring import cpu_name, take_turns

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
STAMP = {"cpu", "cores", "threads", "torch", "peftkern", "git", "date"}


@pytest.fixture
def script():
    """Imports a benchmark by its name."""
    return lambda name: importlib.import_module(f"benchmarks.{name}")


@pytest.mark.slow
def test_training_step(script, tmp_path):
    path = tmp_path / "rows.csv"
    script("end_to_end.__main__").main(["no-prefix", "--quick", "--threads", "1", "--output", str(path)])
    rows = pd.read_csv(path)
    assert set(rows) >= STAMP
    assert (rows[["peft_s", "peftkern_s", "no_prefix_s", "over_peft", "over_no_prefix"]] > 0).all(axis=None)


def test_host_time_of_calls_and_parts(script, capsys):
    ratios = script("host_time").main(["--repeats", "1", "--rounds", "1"])
    assert set(ratios) == {"forward", "forward and backward"}
    assert all(ratio > 0 for ratio in ratios.values())
    assert "whether to dispatch" in capsys.readouterr().out


def test_calls_take_turns():
    calls = []
    take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.0, at_least=4)
    assert "".join(calls) == "ab" + "abbaabba", "once to warm up, then each round from another call on"


def test_bars_are_judged_by_mean_and_by_worst(script):
    bars = script("bars")
    figure = bars.Figure("a", "attention", "", "x", mean=2.0, worst=1.5)
    for ratios, reached in (([2.0, 2.0], True), ([1.0, 8.0], False), ([1.6, 1.6], False)):
        mean, worst, verdict = bars.judge(figure, pd.DataFrame({"x": ratios}))
        assert mean == pytest.approx(math.prod(ratios) ** 0.5)
        assert worst == min(ratios)
        assert verdict == reached


def _step_rows(**columns) -> pd.DataFrame:
    row = {"dtype": "bf16", "threads": 1, "B": 1, "S": 512, "P": 20, "over_peft": 1.29, "over_no_prefix": 1.2}
    return pd.DataFrame([row | columns])


def test_a_bar_that_is_missed_or_not_measured_is_said_so(script, tmp_path, capsys):
    _step_rows().to_csv(tmp_path / "rows.csv", index=False)
    script("bars").show(step=tmp_path / "rows.csv")
    lines = {line.split("│")[1].strip(): line for line in capsys.readouterr().out.splitlines() if "bf16" in line}
    assert "1.29 / 1.29 │ " in lines["bf16 training step over PEFT, S=512, P=20"]
    assert "missed" in lines["bf16 training step over PEFT, S=512, P=20"]
    assert "not measured" in lines["bf16 training step over PEFT, S=1024, P=20"]
    assert "reached" in lines["bf16 training step over the frozen model without a prefix, S >= 512"]


@pytest.mark.parametrize("suffix", ["svg", "png"])
def test_plots_are_made_from_results(script, tmp_path, suffix):
    sizes = {"model": "m", "B": 1, "Hq": 2, "Hkv": 2, "cached": 0, "D": 8, "P": 4, "dtype": "bf16", "device": "cpu",
             "threads": 1, "direction": "forward", "status": "ok", "p20_ms": 1.0, "p80_ms": 3.0}  # fmt: skip
    results = rows.Results(tmp_path / "attention.csv")
    results.add(sizes | {"provider": name, "S": S, "p50_ms": 2.0} for name in ("peft", "peftkern") for S in (8, 16))
    _step_rows().to_csv(tmp_path / "step.csv", index=False)
    scaling = BENCHMARKS / "results" / "scaling_cpu.csv"
    (tmp_path / "scaling.csv").write_text(scaling.read_text())
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    names = ("attention", "step", "scaling", "other")
    script("plot").main([*(str(tmp_path / f"{name}.csv") for name in names), "--format", suffix])
    drawn = {path.name for path in tmp_path.glob(f"*.{suffix}") if path.stat().st_size > 1000}
    assert drawn == {f"{name}.{suffix}" for name in ("attention_over_S", "attention_times", "step", "scaling")}


def test_every_result_can_be_plotted_and_no_plot_is_in_git(script):
    plot, drawn = script("plot"), set()
    for path in sorted((BENCHMARKS / "results").rglob("*.csv")):
        figures = plot.figures_of(path)
        drawn |= {path.stem} if figures else set()
        for figure in figures.values():
            plot.plt.close(figure)
    recorded = {path.stem for path in (BENCHMARKS / "results").rglob("*.csv")}
    assert drawn == {"attention", "scaling_cpu", "training_step", "roofline", "step_parts"} & recorded
    assert {"attention", "scaling_cpu", "training_step"} <= drawn
    tracked = subprocess.run(["git", "ls-files", "*.svg", "*.png"], cwd=BENCHMARKS, capture_output=True, text=True)
    assert tracked.stdout == ""


def test_scaling(script, tmp_path, capsys):
    path = tmp_path / "scaling.csv"
    module = script("scaling")
    module.main(["--quick", "--dtype", "fp32", "--output", str(path)])
    rows = pd.read_csv(path)
    assert set(rows) >= STAMP
    assert set(rows["axis"]) == set(module.AXES)
    assert "wall at" in capsys.readouterr().out
    kept = rows[rows["axis"].eq("B") & rows["direction"].eq("forward")].groupby("provider")["prefix_mb"].agg(list)
    assert len(set(kept["peftkern"])) == 1, "what is kept of the prefix grows with the batch"
    assert kept["peft"] == sorted(set(kept["peft"])), "PEFT's way keeps the prefix once per sample"


def test_scalings_lines_are_fitted(script):
    module = script("scaling")
    x = pd.Series([1.0, 2.0, 4.0, 64.0]).to_numpy()
    assert module.fit("P", x, 3 + 2 * x) == pytest.approx((3, 2, 0), abs=1e-9)
    assert module.fit("S", x, 3 * x + 2 * x**2) == pytest.approx((3, 2, 0), abs=1e-9)


def test_every_backend_takes_a_turn(script, tmp_path):
    path = tmp_path / "choice.csv"
    rows = script("backend_choice").main(["--quick", "--dtypes", "fp32", "--output", str(path)])
    assert set(pd.read_csv(path)) >= {"cpu_ms", "reference_ms", "chosen", "over_best"}
    assert all(row["chosen"] == "cpu" for row in rows)


def test_the_longest_length_that_fits(script):
    longest = script("end_to_end.workers").longest
    tried = []

    def fits(length: int) -> bool:
        tried.append(length)
        return length <= 1000

    assert 1000 - 1000 // 8 <= longest(fits, 64, 8192) <= 1000
    assert len(tried) < 12
    assert longest(lambda length: False, 64, 512) == 0
    assert longest(lambda length: True, 64, 512) == 512


def test_models_are_cut_in_depth_and_vocabulary(script):
    module = script("end_to_end.models")
    for name, model in module.MODELS.items():
        config = module.config_of(name, 2)
        assert config.num_hidden_layers == 2
        assert config.hidden_size == model.hidden
        assert config.num_attention_heads == model.Hq
        assert config.vocab_size == max(64, model.vocab * 2 // model.layers)


def test_memory_can_be_limited():
    def allocate() -> None:
        torch.ones(100_000_000, dtype=torch.uint8)

    with memory.limited(400_000_000):
        allocate()
    with pytest.raises(RuntimeError) as error, memory.limited(20_000_000):
        allocate()
    assert memory.is_out_of_memory(error.value)
    assert not memory.is_out_of_memory(RuntimeError("shapes do not match"))
    allocate()


def test_decoding(script, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    arguments = ["decoding", "--quick", "--dtypes", "fp32", "--caches", "dynamic", "static", "--output", str(path)]
    script("end_to_end.__main__").main(arguments)
    rows = pd.read_csv(path)
    assert set(rows) >= STAMP
    assert list(rows["cache"]) == ["dynamic", "static"]
    assert (rows[["peft_ms_per_token", "ours_ms_per_token", "over_peft"]] > 0).all(axis=None)
    assert "static" in capsys.readouterr().out


@pytest.mark.slow
def test_end_to_end_steps_and_generation(script, tmp_path, capsys):
    path = tmp_path / "rows.csv"
    arguments = [
        "patch",
        "--quick",
        "--part",
        "step",
        "generate",
        "--no-memory",
        "--threads",
        "1",
        "--output",
        str(path),
    ]
    script("end_to_end.__main__").main(arguments)
    rows = pd.read_csv(path)
    assert set(rows) >= STAMP
    steps = rows[rows["part"] == "step"]
    assert list(steps[steps["data"] == "padded"]["arm"]) == ["PEFT", "patch", "patch + gc", "patch + packing"]
    assert (rows[["median_s", "tokens_per_s", "over_peft"]] > 0).all(axis=None)
    assert (steps["gradient_difference"] < 1e-3).all()
    assert set(rows["status"]) == {"ok"}
    printed = capsys.readouterr().out
    assert "patch + packing" in printed
    assert "generate" in printed


def test_a_step_that_is_wrong_is_not_timed(script, monkeypatch):
    module = script("end_to_end.patch")
    right = module.load

    def wrong(order, arm, *arguments):
        model = right(order, arm, *arguments)
        if arm == "patch":
            model.prompt_encoder["default"].embedding.weight.data.mul_(1.01)
        return model

    monkeypatch.setattr(module, "load", wrong)
    order = {"model": "tiny", "path": None, "layers": 2, "P": 5}
    with pytest.raises(AssertionError, match="tiny, patch: losses differ by"):
        module.compare(order, ["PEFT", "patch"], module.make_batch(64, 2, 9, True))


def test_generation_without_room_is_out_of_memory(script):
    module = script("end_to_end.patch")
    order = {"model": "tiny", "path": None, "layers": 2, "vocab": 128, "dtype": "fp32", "threads": 1, "B": 64, "S": 3,
             "P": 2000, "new_tokens": 2, "part": "generate", "data": "full", "budget_mb": 20}  # fmt: skip
    rows = {row["arm"]: row for row in module.measure_generate(order, 0.0)}
    assert rows["PEFT"]["status"] == "out of memory"
    assert rows["PEFT"]["tokens_per_s"] is None
    assert rows["patch"]["status"] == "ok"


@pytest.mark.slow
def test_end_to_end_longest(script, tmp_path):
    path = tmp_path / "rows.csv"
    script("end_to_end.__main__").main(
        ["patch", "--quick", "--part", "longest", "--threads", "1", "--output", str(path)]
    )
    rows = pd.read_csv(path).set_index("arm")
    assert 0 < rows.loc["PEFT", "longest_S"] < rows.loc["patch", "longest_S"]


def test_what_is_interrupted_is_written(script, monkeypatch, tmp_path):
    module = script("end_to_end.patch")

    def interrupted(order, *arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "measure_generate", interrupted)
    path = tmp_path / "rows.csv"
    about = {"part": "step", "model": "tiny", "dtype": "bf16", "threads": 1, "cpu": cpu_name()}
    before = [about | {"arm": "replaced"}, about | {"part": "longest", "arm": "another part"},
              about | {"cpu": "another", "arm": "another processor"}]  # fmt: skip
    pd.DataFrame(before).to_csv(path, index=False)
    arguments = [
        "patch",
        "--quick",
        "--part",
        "step",
        "generate",
        "--no-memory",
        "--threads",
        "1",
        "--output",
        str(path),
    ]
    script("end_to_end.__main__").main(arguments)
    rows = pd.read_csv(path)
    assert set(rows["part"]) == {"step", "longest"}
    assert "replaced" not in set(rows["arm"])
    assert {"another part", "another processor"} < set(rows["arm"])


def test_readme_tables_are_made_from_results(monkeypatch, tmp_path):
    """The tables show losses, runs out of memory, and what PEFT could not run."""
    assert readme_tables.RESULTS == BENCHMARKS / "results"
    monkeypatch.setattr(readme_tables, "RESULTS", tmp_path)
    assert readme_tables.alternatives() == ""
    assert readme_tables.end_to_end() == ""

    problem = {"model": "m", "B": 1, "Hq": 2, "Hkv": 2, "S": 8, "cached": 0, "D": 8, "P": 4, "dtype": "bf16",
               "device": "cpu", "threads": 1, "direction": "forward", "status": "ok", "error_ratio": 1,
               "cpu": "Intel(R) Xeon(R) Processor (avx512)"}  # fmt: skip
    times = [("peft", 8, 2.0), ("peftkern", 8, 1.0), ("two-calls", 16, 1.0), ("peft", 16, 3.0), ("peftkern", 16, 2.0)]
    results = rows.Results(tmp_path / "bench" / "xeon" / "attention.csv")
    results.add(problem | {"provider": name, "S": S, "p50_ms": ms} for name, S, ms in times)
    backward = {"direction": "forward+backward", "provider": "peftkern", "p50_ms": 3.0}
    results.add([problem | backward, problem | backward | {"provider": "no-prefix", "p50_ms": 1.5}])
    lines = readme_tables.alternatives().splitlines()
    assert lines[2] == "| Intel Xeon (avx512) | m, B=1 S=8 P=4, bf16 | 2.00 / 2.00 / - | - / - / 0.50 |"
    assert lines[3] == "| Intel Xeon (avx512) | m, B=1 S=16 P=4, bf16 | 1.50 / 0.50 / - | - |"

    base = {"model": "smollm2", "layers": 30, "dtype": "bf16", "threads": 2, "B": 4, "S": 256, "P": 32, "cpu": "CPU"}
    end = [
        base | {"part": "step", "data": "full", "arm": "PEFT", "over_peft": 1.0},
        base | {"part": "step", "data": "full", "arm": "patch", "over_peft": 1.5, "peak_over_peft": 4.0},
        base | {"part": "longest", "arm": "PEFT", "longest_S": 0, "budget_mb": 9, "status": "out of memory"},
        base | {"part": "longest", "arm": "patch", "longest_S": 512, "budget_mb": 9, "status": "the longest tried"},
        base | {"part": "generate", "arm": "PEFT", "status": "out of memory"},
        base | {"part": "generate", "arm": "patch", "status": "ok", "tokens_per_s": 100.0},
    ]
    pd.DataFrame(end).to_csv(tmp_path / "end_to_end.csv", index=False)
    text = readme_tables.end_to_end()
    assert "| SmolLM2-135M, bf16, B=4 P=32 S=256 | full | patch | 1.50 | 0.25 |" in text
    assert "| 9 | PEFT | 0 |" in text
    assert "| 9 | patch | 512 or more |" in text
    assert "| SmolLM2-135M, bf16 | 4 | 32 | 100 | out of memory | - |" in text


def test_the_table_of_plans_marks_what_auto_takes(script, capsys):
    script("plan_table").main(["--shapes", "4x2048x128", "1x8192x20:prompt"])
    text = capsys.readouterr().out
    assert "modelled us on sm_90" in text
    assert text.count("*") == 3, "one per shape, and the heading"
    with pytest.raises(SystemExit):
        script("plan_table").main(["--shapes", "4x2048"])
    assert "expected BxSxP" in capsys.readouterr().err
