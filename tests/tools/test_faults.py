# SPDX-License-Identifier: Apache-2.0
"""The command line on damaged results, and where its output cannot be written."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from peftkern import PrefixKV, save_prefix
from peftkern.tools import cli, export
from peftkern.tools.bench import rows
from peftkern.tools.bench.rows import COLUMNS, Results

HEADER = ",".join(COLUMNS) + "\r\n"


def _row(provider: str, **columns) -> dict:
    row = dict.fromkeys(COLUMNS) | {
        "model": "m", "B": 1, "Hq": 2, "Hkv": 2, "S": 8, "cached": 0, "D": 16, "P": 2, "dtype": "fp32",
        "device": "cpu", "threads": 1, "direction": "fwd", "provider": provider, "auto": False, "status": "ok",
        "p50_ms": 1.5,
    }  # fmt: skip
    return row | columns


@pytest.fixture
def path(tmp_path):
    """Rows of three providers for each of two problems, in two batches."""
    path = tmp_path / "attention.csv"
    results = Results(path)
    for tokens in (8, 16):
        results.add([_row(name, S=tokens, reason="a, b") for name in ("peft", "peftkern", "no-prefix")])
    return path


def _providers(path):
    return [(row["S"], row["provider"]) for row in rows.read(path)]


def _torn_places(data: bytes) -> list[int]:
    """Sizes at which the last batch of rows is cut, including within a cell, a quoted one and a line end."""
    lines = data.splitlines(keepends=True)
    starts = [sum(map(len, lines[:i])) for i in range(len(lines) + 1)]
    last = starts[-2]
    return [starts[4] + 1, starts[5] + 12, last + 1, last + 3, last + 40, data.rindex(b'"a, b') + 3, len(data) - 2,
            len(data) - 1]  # fmt: skip


@pytest.mark.parametrize("place", range(8))
def test_a_torn_last_row_is_removed_and_its_problem_measured_again(place, path):
    whole = path.read_bytes()
    path.write_bytes(whole[: _torn_places(whole)[place]])
    results = Results(path)
    # The first place is within the name of the model, so the row may be one of either problem.
    assert [row["S"] for row in results.rows] == ([8] * 3 if place else [])
    assert str(path) in results.note
    assert "removed a row that an interrupted run has written in part" in results.note
    for tokens in (16,) if place else (8, 16):
        results.add([_row(name, S=tokens, reason="a, b") for name in ("peft", "peftkern", "no-prefix")])
    assert path.read_bytes() == whole
    assert Results(path).note is None


def test_a_torn_header_is_written_again(path):
    path.write_text(HEADER[:40])
    results = Results(path)
    assert results.rows == []
    assert "removed a row" in results.note
    results.add([_row("peft")])
    assert _providers(path) == [(8, "peft")]


def test_an_empty_file_is_continued(path):
    path.write_text("")
    assert Results(path).note is None
    Results(path).add([_row("peft")])
    assert _providers(path) == [(8, "peft")]


def _replaced(line: int, old: bytes, new: bytes):
    def damage(data):
        lines = data.splitlines(keepends=True)
        assert old in lines[line - 1]
        lines[line - 1] = lines[line - 1].replace(old, new, 1)
        return b"".join(lines)

    return damage


DAMAGES = {
    "a text for a number": (_replaced(3, b",1.5,", b",fast,"), ":3: p50_ms: expected a number, got 'fast'"),
    "NaN": (_replaced(3, b",1.5,", b",nan,"), ":3: p50_ms: expected a number, got 'nan'"),
    "no time": (_replaced(4, b",1.5,", b",0,"), ":4: p50_ms: expected a number above 0, got '0'"),
    "no size": (_replaced(2, b"m,1,2,2,8", b"m,1,2,2,"), ":2: S: expected a number above 0, got ''"),
    "a huge number": (_replaced(2, b"m,1,", b"m," + b"9" * 5000 + b","), ":2: B: expected an integer, got '999"),
    "a cell less": (_replaced(5, b"m,1,", b"m,"), f":5: expected {len(COLUMNS)} cells, got {len(COLUMNS) - 1}"),
    "two rows in one line": (_replaced(2, b"\r\n", b""), f":2: expected {len(COLUMNS)} cells, got"),
    "an open quote": (_replaced(3, b'"a, b"', b'"a, b'), ":3: expected a row of CSV, got a damaged one"),
    "a quote in a cell": (_replaced(3, b'"a, b"', b'"a"b"'), ":3: expected a row of CSV, got a damaged one"),
    "bytes that are no text": (_replaced(2, b"m,1,", b"\xff\xfe,1,"), ":2: expected UTF-8, got other bytes"),
}


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("command", ["--resume", "--from"])
def test_a_damaged_file_is_refused_by_line(name, command, path, capsys):
    damage, message = DAMAGES[name]
    path.write_bytes(data := damage(path.read_bytes()))
    options = ["--from", str(path)] if command == "--from" else ["--output", str(path.parent), "--resume"]
    assert cli.main(["bench", *options]) == 2
    error = capsys.readouterr().err
    assert f"peftkern bench: error: {command}" in error
    assert str(path) + message in error
    assert error.count("\n") == 1
    assert path.read_bytes() == data, "a file is changed that is not torn"


def test_other_columns_are_not_continued(path, capsys):
    """Rows of this version would stand below the names of others."""
    path.write_text(HEADER.replace("model,B", "B,model"))
    assert cli.main(["bench", "--output", str(path.parent), "--resume"]) == 2
    assert f"{path}:1: expected the columns of this version, model,B," in capsys.readouterr().err
    path.write_text("something else")
    assert cli.main(["bench", "--output", str(path.parent), "--resume"]) == 2
    assert f"{path}:1: expected a CSV file of `peftkern bench`, got something else" in capsys.readouterr().err
    assert path.read_text() == "something else"


# Output that cannot be written


def _run(*arguments, stdout, unbuffered, **options):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONUNBUFFERED": "1"} if unbuffered else {}
    command = [sys.executable, "-m", "peftkern", *arguments]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment, **options)


COMMANDS = [["--help"], ["--version"], ["doctor"], ["doctor", "--json"], ["bench", "--help"], ["bench", "--list"]]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_full_output_is_an_error_of_one_line(arguments, unbuffered):
    with open("/dev/full", "w") as full:
        result = _run(*arguments, stdout=full, unbuffered=unbuffered)
    assert result.returncode in (1, 2)
    assert result.stderr.count("\n") == 1, result.stderr
    assert "error: [Errno 28] No space left on device" in result.stderr


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("arguments", COMMANDS, ids=" ".join)
def test_a_closed_pipe_ends_it_without_a_word(arguments, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = _run(*arguments, stdout=writer, unbuffered=unbuffered)
    finally:
        os.close(writer)
    assert result.returncode == 1
    assert result.stderr == ""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_what_was_written_before_the_output_failed_stays(tmp_path):
    save_prefix(PrefixKV(None, 2, num_layers=2, num_kv_heads=2, head_dim=8), tmp_path / "doc")
    with open("/dev/full", "w") as full:
        arguments = ("export", str(tmp_path / "doc"), "--to", "kv", "--output", str(tmp_path))
        result = _run(*arguments, stdout=full, unbuffered=False)
    assert result.returncode == 1
    assert result.stderr == "peftkern: error: [Errno 28] No space left on device: 'standard output'\n"
    assert (tmp_path / "doc.safetensors").exists()


def test_an_error_that_the_command_has_told_is_not_told_again(monkeypatch, capsys):
    """The output cannot be written either, but the first error is the one to mend."""

    class Full:
        def write(self, text):
            return len(text)

        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "run", lambda options: 2)
    monkeypatch.setattr(sys, "stdout", Full())
    assert cli.main(["export", "folder", "--to", "kv"]) == 2
    assert capsys.readouterr().err == ""
