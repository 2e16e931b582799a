# SPDX-License-Identifier: Apache-2.0
"""The command ``peftkern bench``: rows survive an interruption, and messages help."""

from __future__ import annotations

import csv

import pytest
import torch

from peftkern.tools import cli
from peftkern.tools.bench import attention, rows, session
from peftkern.tools.bench.providers import PROVIDERS
from peftkern.tools.bench.shapes import MODELS

from .planted import TIMED, plant

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
    plant(monkeypatch, "peftkern", lambda out: out * 1.5)
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
        (["--output", __file__], "--output: expected a folder, got the file .*test_bench_command.py"),
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
