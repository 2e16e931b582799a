# SPDX-License-Identifier: Apache-2.0
"""``peftkern bench``: providers agree, wrong ones are caught, rows survive an interruption, messages help."""

from __future__ import annotations

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from peftkern import reference
from peftkern.arguments import Call
from peftkern.tools import cli
from peftkern.tools.bench import attention, measuring, rows, session
from peftkern.tools.bench.checks import Judge
from peftkern.tools.bench.measuring import Timing, take_turns
from peftkern.tools.bench.providers import PROVIDERS, Calls, Problem, Provider, Unavailable, prepare, visible_keys
from peftkern.tools.bench.report import sections, write_report
from peftkern.tools.bench.rows import Comparison, Results
from peftkern.tools.bench.shapes import MODELS, Shape, sweep

SHAPES = [
    Shape(1, 4, 2, 1, 40, 7),
    Shape(2, 4, 1, 17, 16, 1),
    Shape(3, 2, 2, 63, 80, 130),
    Shape(2, 4, 2, 5, 16, 7, cached=12),
    Shape(2, 3, 3, 19, 8, 0),
    Shape(2, 4, 2, 33, 16, 9, window=12),
    Shape(1, 4, 2, 33, 16, 9, window=12, softcap=5.0),
]
QUICK = [
    "--model",
    "smollm2-135m",
    "--seq",
    "17",
    "--prefix",
    "5",
    "--dtype",
    "fp32",
    "--seconds",
    "0",
    "--no-memory",
]
TIMED = ("peft", "no-prefix", "peftkern")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", [n for n in PROVIDERS if n != "flex"])
def test_providers_compute_the_same(name, shape):
    """A provider that cannot run gives a reason."""
    problem = Problem.make(shape, torch.float32)
    calls = prepare(name, problem)
    if isinstance(calls, Unavailable):
        assert len(calls.reason) > 10, calls
        return
    judge = Judge(problem)
    for backward in (False, True):
        verdict = judge.judge(calls, backward, PROVIDERS[name].uses_prefix)
        assert not verdict.wrong, verdict.wrong


@pytest.mark.parametrize("name", ["peft", "two-calls", "no-prefix", "peftkern"])
def test_providers_are_right_in_half_precision(name):
    problem = Problem.make(SHAPES[2], torch.bfloat16)
    calls = prepare(name, problem)
    assert isinstance(calls, Calls)
    for backward in (False, True):
        assert not Judge(problem).judge(calls, backward, PROVIDERS[name].uses_prefix).wrong


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SHAPES[2], SHAPES[6]], ids=str)
def test_flex_attention_computes_the_same(shape):
    problem = Problem.make(shape, torch.float32)
    calls = prepare("flex", problem)
    assert isinstance(calls, Calls)
    assert calls.both is None, "a backward that FlexAttention does not have on CPUs"
    verdict = Judge(problem).judge(calls, False)
    assert not verdict.wrong, verdict.wrong


def test_the_common_providers_run_on_a_cpu():
    problem = Problem.make(SHAPES[2], torch.float32)
    run = {name for name in PROVIDERS if name != "flex" and isinstance(prepare(name, problem), Calls)}
    assert run >= {"peft", "peft-flash", "peft-math", "peft-eager", "two-calls", "no-prefix", "peftkern-reference"}


def test_the_bottom_right_flash_kernel_is_called_as_its_op_asks(monkeypatch):
    """A stand-in replaces the CUDA op: layout, bottom-right causality, and the window are right."""
    called = {}

    def op(q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, debug, *, scale, **window):
        called.update(max_q=max_q, max_k=max_k, is_causal=is_causal, **window)
        visible = torch.arange(max_k) <= torch.arange(max_q)[:, None] + max_k - max_q
        if window["window_size_left"] is not None:
            visible &= (
                torch.arange(max_q)[:, None] + max_k - max_q - torch.arange(max_k) <= window["window_size_left"]
            )
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = (q @ k.transpose(-1, -2) * scale).masked_fill(~visible, -torch.inf)
        return (torch.softmax(scores, -1) @ v).transpose(1, 2), None

    class Device:
        type = "cuda"

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", op)
    for shape in (SHAPES[3], SHAPES[5]):
        problem = Problem.make(shape, torch.bfloat16)
        with monkeypatch.context() as patch:
            patch.setattr(Problem, "device", Device())
            made = PROVIDERS["cat-flash"].make(problem)
        assert callable(made)
        verdict = Judge(problem).judge(Calls(lambda p=problem, m=made: m(*p.inputs), None, None), False)
        assert not verdict.wrong, verdict.wrong
        assert called["is_causal"]
        assert called["max_k"] == shape.P + shape.T


def test_where_everything_is_hidden_by_name():
    reasons = {n: prepare(n, Problem.make(SHAPES[6], torch.float32)) for n in ("peft", "cat-flash", "two-calls")}
    assert all(isinstance(reason, Unavailable) for reason in reasons.values())
    assert "softcap" in reasons["peft"].reason
    assert "window" in reasons["two-calls"].reason


def test_an_unknown_provider_is_named():
    with pytest.raises(ValueError, match=r"providers: expected some of peft, .*, got 'nonsense'"):
        prepare("nonsense", Problem.make(SHAPES[0], torch.float32))


def _plant(monkeypatch, name: str, change) -> None:
    """Change the output of a provider."""
    right = PROVIDERS[name]
    planted = replace(right, make=lambda problem: lambda *inputs: change(right.make(problem)(*inputs)))
    monkeypatch.setitem(PROVIDERS, name, planted)


def _last_element_off(out):
    return out + torch.zeros_like(out).index_fill_(2, torch.tensor([out.shape[2] - 1]), 0.01)


@pytest.mark.parametrize(
    "change",
    [lambda out: out * 1.001, lambda out: out.roll(1, 2), lambda out: out * torch.nan, _last_element_off],
    ids=["scaled", "rolled", "nan", "last row"],
)
def test_a_wrong_provider_is_reported_and_not_timed(monkeypatch, change):
    _plant(monkeypatch, "peftkern", change)
    measured = attention.measure(
        Shape(2, 4, 2, 63, 16, 5), "fp32", ["forward"], TIMED, seconds=0.0, with_memory=False
    )
    row = next(row for row in measured if row["provider"] == "peftkern")
    assert row["status"] == "wrong"
    assert row["reason"]
    assert "p50_ms" not in row
    assert [row["status"] for row in measured if row["provider"] != "peftkern"] == ["ok", "ok"]


def test_a_wrong_gradient_is_reported(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.clone()

        @staticmethod
        def backward(ctx, dout):
            return dout * 1.01

    _plant(monkeypatch, "two-calls", Wrong.apply)
    measured = attention.measure(
        Shape(2, 4, 2, 33, 16, 5), "fp32", ["forward", "forward+backward"], ["two-calls"], seconds=0.0,
        with_memory=False,
    )  # fmt: skip
    assert [row["status"] for row in measured] == ["ok", "wrong"]
    assert "dprefix_v errs by" in measured[1]["reason"]


def test_a_failing_provider_does_not_cost_the_others_their_rows(monkeypatch):
    def fail(problem):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setitem(PROVIDERS, "peft-math", Provider("fails", fail))
    measured = attention.measure(
        Shape(1, 2, 2, 9, 8, 3), "fp32", ["forward"], ["peft-math", "peft"], seconds=0.0, with_memory=False
    )
    assert [(row["status"], row["reason"]) for row in measured] == [
        ("failed", "RuntimeError: no such kernel"), ("ok", ""),
    ]  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masks_and_pairs_are_those_of_the_reference(shape):
    sizes = (1, shape.S, shape.T, 1, shape.P)
    sequence, prefix = reference.visibility(
        sizes, torch.device("cpu"), True, None, None, None, None, shape.window, True
    )
    parts = (prefix[:, :, :, 0].expand(1, 1, shape.S, shape.P), sequence.expand(1, 1, shape.S, shape.T))
    visible = visible_keys(shape, torch.device("cpu"))
    assert torch.equal(visible, torch.cat(parts, -1)[0, 0])
    assert shape.pairs == visible.sum().item()


def test_flops_and_bytes():
    shape = Shape(2, 4, 2, 8, 16, 3)
    assert shape.flops("forward") == 4 * 16 * 2 * 4 * shape.pairs
    assert shape.bytes("forward", 2) == 2 * (2 * 2 * 4 * 8 * 16 + 2 * 2 * 2 * 8 * 16 + 2 * 2 * 3 * 16)
    assert shape.flops("forward+backward") == shape.flops("forward") + shape.flops("backward")


def test_a_sweep_is_every_combination():
    shapes = sweep(["gpt2", "gemma-2-9b"], [16, 32], [4], [1, 2])
    assert len(shapes) == 8
    assert {(s.Hq, s.D, s.window, s.softcap) for s in shapes} == {(12, 64, None, None), (16, 256, 4096, 50.0)}
    for model in MODELS.values():
        assert model.Hq % model.Hkv == 0


def test_quantiles_and_turns():
    timing = Timing.of([float(i) for i in range(1, 10)])
    assert (timing.p20, timing.median, timing.p80) == (2.0, 5.0, 8.0)
    figures = take_turns({"a": lambda: None}, 0.0, at_least=4, clock=lambda call: [1.0, 2.0])
    assert figures["a"].median == 1.5


def test_much_slower_calls_are_timed_twice():
    seconds = {"fast": 1.0, "slow": 6.0}
    called = []
    calls = {name: (lambda name=name: called.append(name)) for name in seconds}
    take_turns(calls, 0.0, at_least=5, clock=lambda call: [call() or seconds[called[-1]]], drop_slower=5.0)
    assert called.count("fast") == 6, "once to warm up, then five rounds"
    assert called.count("slow") == 3


def test_backends_are_timed_in_turns():
    dtypes, shape = (torch.float32, torch.float32), (1, 2, 9, 8)
    call = Call("prefix_attention", torch.device("cpu"), *dtypes, shape, shape, (2, 3, 8), (), needs_grad=True)
    found = measuring.time_backends(call, ["reference"], 0.0, options={"softcap": 5.0})
    assert list(found) == ["reference"]
    assert 0 < found["reference"].seconds < 10
    assert found["reference"].host == 0, "on a CPU, launching is part of the call"


def test_memory_counts_what_is_allocated_and_kept():
    shape = Shape(2, 4, 4, 257, 64, 32)
    measured = attention.measure(shape, "fp32", ["forward+backward"], ["peft-eager", "peft"], seconds=0.0)
    scores = 2 * 4 * 257 * (257 + 32) * 4 / 1e6
    eager, sdpa = measured
    assert eager["peak_mb"] > scores
    assert eager["saved_mb"] > scores > sdpa["saved_mb"] > 0


def test_memory_that_cannot_be_measured_is_said(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("no more processes")

    monkeypatch.setattr(attention.memory, "in_own_process", fail)
    measured = attention.measure(Shape(1, 2, 2, 9, 8, 3), "fp32", ["forward"], ["peft"], seconds=0.0)
    assert measured[0]["status"] == "ok"
    assert measured[0]["reason"] == "memory was not measured: RuntimeError: no more processes"


def test_gpu_rows_say_on_which_gpu(monkeypatch):
    facts = SimpleNamespace(name="A GPU", major=9, minor=0, gcnArchName="gfx942")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: facts)
    monkeypatch.setattr(measuring.shutil, "which", lambda name: name)
    monkeypatch.setattr(measuring, "_output", lambda command: "580.1, 1980, 2619")
    row = measuring.stamp("cuda")
    assert (row["gpu"], row["arch"], row["driver"], row["sm_mhz"]) == ("A GPU", "sm_90", "580.1", "1980")
    assert set(row) <= set(rows.COLUMNS)


# results


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


# the command


def test_bench_shows_measures_and_writes(tmp_path, capsys):
    status = cli.main(["bench", *QUICK, "--providers", *TIMED, "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert status == 0, printed
    assert "times as fast as PEFT's way" in printed
    found = rows.read(tmp_path / "attention.csv")
    assert [row["status"] for row in found] == ["ok"] * 6
    for name in ("p20_ms", "p50_ms", "p80_ms", "tflops", "gb_s", "error"):
        assert all(row[name] > 0 for row in found), name
    assert all(row["cpu"] and row["torch"] and row["git"] and row["date"] for row in found)
    assert (tmp_path / "report.html").exists()

    assert cli.main(["bench", *QUICK, "--providers", *TIMED, "--output", str(tmp_path)]) == 2
    assert "add --resume" in capsys.readouterr().err
    more = [*QUICK, "--seq", "17", "18", "--providers", *TIMED, "--output", str(tmp_path), "--resume"]
    assert cli.main(["bench", *more]) == 0
    assert "2 of 4 problems are already in" in capsys.readouterr().out
    assert len(rows.read(tmp_path / "attention.csv")) == 12

    assert cli.main(["bench", "--from", str(tmp_path / "attention.csv")]) == 0
    assert "S=18" in capsys.readouterr().out


def test_named_shapes_are_measured(capsys, tmp_path):
    arguments = ["--shapes", "quick", "--dtype", "fp32", "--seconds", "0", "--no-memory", "--direction", "forward"]
    assert cli.main(["bench", *arguments, "--providers", *TIMED, "--output", str(tmp_path)]) == 0
    found = rows.read(tmp_path / "attention.csv")
    assert [(row["S"], row["D"]) for row in found] == [(33, 16)] * 3 + [(1025, 8)] * 3


def test_a_wrong_row_of_ours_gives_status_1(monkeypatch, capsys):
    _plant(monkeypatch, "peftkern", lambda out: out * 1.5)
    assert cli.main(["bench", *QUICK, "--providers", "peft", "peftkern", "--direction", "forward"]) == 1
    assert "wrong: out errs by" in capsys.readouterr().out


def test_what_is_interrupted_keeps_its_rows(monkeypatch, tmp_path, capsys):
    measure, calls = attention.measure, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measure(*arguments, **options)

    monkeypatch.setattr(session.attention, "measure", interrupted)
    status = cli.main(
        ["bench", *QUICK, "--seq", "5", "6", "--providers", "peft", "peftkern", "--output", str(tmp_path)]
    )
    assert status == 130
    assert "--resume continues" in capsys.readouterr().out
    with open(tmp_path / "attention.csv", newline="") as file:
        assert [row["S"] for row in csv.DictReader(file)] == ["5"] * 4
    assert (tmp_path / "report.md").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "llama-9"], "--model: expected some of gpt2, .*, got 'llama-9'"),
        (["--seq", "512", "0"], "--seq: expected at least 1, got 0"),
        (["--prefix", "-1"], "--prefix: expected at least 0, got -1"),
        (["--dtype", "fp8"], "--dtype: expected some of bf16, fp16, fp32, got 'fp8'"),
        (["--direction", "sideways"], "--direction: expected some of forward, .*, got 'sideways'"),
        (["--providers", "cublas"], "--providers: expected some of peft, .*, got 'cublas'"),
        (["--threads", "0"], "--threads: expected at least 1, got 0"),
        (["--seconds", "nan"], "--seconds: expected at least 0, got nan"),
        (["--device", "tpu"], "--device: expected some of cpu, cuda, got 'tpu'"),
        (["--resume"], "--resume: expected --output with the folder to continue in, got none"),
        (["--cpu-time", "--threads", "2"], "--cpu-time: expected --device cpu --threads 1, got .*--threads 2"),
        (["--output", __file__], "--output: expected a folder, got the file .*test_bench.py"),
        (["--from", "nowhere.csv"], "--from: expected a CSV file, got nowhere.csv"),
        (["--from", __file__], "--from .*expected a CSV file of `peftkern bench`, got one without model"),
    ],
)
def test_wrong_options_name_what_was_expected(arguments, message, capsys):
    import re

    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("peftkern bench: error: ")
    assert re.search(message, error), error


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_named(capsys):
    assert cli.main(["bench", "--device", "cuda"]) == 2
    assert "--device: expected a device that torch can use, got cuda: torch sees no GPU" in capsys.readouterr().err


def test_list_names_providers_and_models(capsys):
    assert cli.main(["bench", "--list"]) == 0
    printed = capsys.readouterr().out
    for name in (*PROVIDERS, *MODELS):
        assert name in printed, name


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_missing_packages_are_named(monkeypatch, capsys, tmp_path, package):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a))
    assert cli.main(["bench", "--output", str(tmp_path / "x")]) == 2
    assert f'not installed: {package}. Install with `pip install "peftkern[bench]"`' in capsys.readouterr().err


def test_measuring_needs_torch_alone():
    """Scripts on a bare machine measure without the packages that only print and draw."""
    code = (
        "import sys\n"
        "for name in ('rich', 'pandas', 'matplotlib', 'transformers', 'peft'): sys.modules[name] = None\n"
        "from peftkern.tools.bench import attention, shapes\n"
        "shape = shapes.Shape(1, 2, 2, 9, 8, 3)\n"
        "rows = attention.measure(shape, 'fp32', ['forward'], ['peft', 'peftkern'], seconds=0, with_memory=False)\n"
        "print([row['status'] for row in rows])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert done.stdout.strip() == "['ok', 'ok']", done.stderr


@pytest.mark.parametrize("name", ["attention", "checks", "measuring", "memory", "providers", "rows", "shapes"])
def test_each_module_can_be_imported_first(name):
    code = f"import peftkern.tools.bench.{name} as module; getattr(module, 'stamp', dict)()"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False
    )
    assert done.returncode == 0, done.stderr
