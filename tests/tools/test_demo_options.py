# SPDX-License-Identifier: Apache-2.0
"""Options of the demo: exit code 2 and one message without a traceback for bad ones."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from peftkern.tools.cli import main
from peftkern.tools.demo.options import Options, add_arguments, resolve


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--length", "-1"], "--length: expected at least 1"),
        (["--lr", "nan"], "--lr: expected a positive number"),
        (["--eval-rows", "7"], "--eval-rows: expected an even number"),
        (["--eval-rows", "960"], "too few"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--length", "120"], "the model has 128"),
        (["--model", "/no/such/folder"], "is not a folder with a model"),
        (["--data", "/no/such.csv"], "--data /no/such.csv: cannot be read"),
        (["--out", "/dev/null/x"], "cannot be written"),
        (["--resume"], "there is no checkpoint"),
    ],
)
def test_bad_input_is_told_in_one_message(command, extra, words, capsys):
    assert main([*command, *extra]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("peftkern demo: error: ")
    assert words in printed.err
    assert "Traceback" not in printed.err + printed.out


def test_a_model_folder_without_weights_is_told(command, tiny, tmp_path, capsys):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text((tiny / "model/config.json").read_text())
    assert main([*command, "--model", str(tmp_path / "model")]) == 2
    assert "cannot be loaded" in capsys.readouterr().err


def test_missing_packages_are_named(command, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else find_spec(name))
    assert main(command) == 2
    assert 'not installed: rich. Install with `pip install "peftkern[demo]"`' in capsys.readouterr().err


def test_the_parser_needs_the_standard_library_only():
    code = (
        "import argparse, sys; from peftkern.tools.demo import add_arguments;"
        "add_arguments(argparse.ArgumentParser());"
        "sys.exit(' '.join({'torch', 'transformers', 'peft', 'rich', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, f"imported: {done.stderr}"


def test_quick_gives_way_to_what_is_said():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    options = resolve(parser.parse_args(["--quick", "--steps", "7"]))
    assert options.steps == 7
    assert options.seq < Options.seq
