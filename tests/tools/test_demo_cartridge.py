# SPDX-License-Identifier: Apache-2.0
"""The cartridge demo on a tiny random model and a made-up document; with ``-m real_weights`` on the real ones."""

from __future__ import annotations

import json
import os
import signal

import pytest
import torch

from peftkern import PrefixKV, load_prefix, self_study
from peftkern.self_study import Comparison
from peftkern.tools.cli import main
from peftkern.tools.demo.cartridge.documents import read_documents
from peftkern.tools.demo.cartridge.options import Options
from peftkern.tools.demo.cartridge.report import Findings, Row, headline
from tests.self_study.lab import TEXT, new_model, new_tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with ``model`` (Llama, 2 layers) and ``text.txt``."""
    folder = tmp_path_factory.mktemp("tiny")
    new_model().save_pretrained(folder / "model")
    new_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    return folder


@pytest.fixture
def command(tiny, tmp_path):
    """The command line of a short run, with results in ``tmp_path / "out"``."""
    return [
        "demo", "--method", "cartridge", "--model", str(tiny / "model"), "--data", str(tiny / "text.txt"),
        "--out", str(tmp_path / "out"), "--length", "3", "--questions", "6", "--eval-rows", "4", "--steps", "4",
        "--batch-size", "2", "--answer", "5", "--runs", "2", "--threads", "1",
    ]  # fmt: skip


def test_a_run_reports_every_row_and_leaves_every_file(command, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(command) == 0
    result = json.loads((out / "result.json").read_text())
    none, start, trained, whole = result["rows"]
    assert [row["tokens"] for row in result["rows"]] == [0, 3, 3, whole["tokens"]]
    assert whole["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert whole["agreement"]["mean"] == 1
    assert start["bytes"] == trained["bytes"] == 3 * 2 * 2 * 2 * 8 * 4, "tokens, layers, keys and values, heads, dims"
    assert len(trained["kl_of_runs"]) == len(result["losses"]) == 2
    assert none["kl"]["low"] <= none["kl"]["mean"] <= none["kl"]["high"]
    assert (out / "cartridge.png").read_bytes().startswith(b"\x89PNG")
    assert max(load_prefix(out / "cartridge").lengths) == 3
    printed = capsys.readouterr().out
    for words in ("no document", "truncated text (start)", "trained cartridge", "whole document", "same top-1"):
        assert words in printed
    assert main(command) == 2, "a run is not overwritten"
    assert "--resume" in capsys.readouterr().err


def test_two_documents_are_composed(command, tiny, tmp_path, monkeypatch, capsys):
    from peftkern.tools.demo.cartridge import documents

    monkeypatch.setattr(documents, "_TOPICS", {"break": "The break statement", "pass": "The pass statement"})
    at = command.index("--data")
    del command[at : at + 2]
    assert main([*command, "--runs", "1", "--compose"]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [row["name"] for row in result["composed"]] == [
        "no document", "first cartridge alone", "second cartridge alone", "both cartridges",
    ]  # fmt: skip
    assert [row["tokens"] for row in result["composed"]] == [0, 3, 3, 6]
    assert load_prefix(tmp_path / "out" / "both").num_prefixes == 2
    assert "teacher: both documents" in capsys.readouterr().out


def test_resume_after_ctrl_c_gives_the_results_of_an_uninterrupted_run(command, tmp_path, monkeypatch, capsys):
    assert main(command) == 0
    whole = tmp_path / "out"
    out = tmp_path / "interrupted"
    rate = self_study.Training.rate

    def interrupted(training, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return rate(training, step)

    with monkeypatch.context() as patched:
        patched.setattr(self_study.Training, "rate", interrupted)
        assert main([*command, "--out", str(out)]) == 130
    assert f"peftkern demo --method cartridge --resume --out {out}" in capsys.readouterr().out
    from_text = PrefixKV.from_text.__func__

    def rounded(*arguments, **options):
        """As on another machine."""
        prefix = from_text(PrefixKV, *arguments, **options)
        with torch.no_grad():
            for parameter in prefix.parameters():
                parameter.mul_(1 + 1e-6)
        return prefix

    monkeypatch.setattr(PrefixKV, "from_text", rounded)
    assert main(["demo", "--method", "cartridge", "--resume", "--out", str(out)]) == 0
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, out)]
    assert results[0]["losses"] == results[1]["losses"]
    assert results[0]["rows"] == results[1]["rows"]
    a, b = (load_prefix(folder / "cartridge").flat_values() for folder in (whole, out))
    assert torch.equal(a, b)


def test_a_file_that_cannot_be_continued_is_named_without_a_traceback(command, tmp_path, capsys):
    assert main([*command, "--runs", "1"]) == 0
    path = tmp_path / "out" / "first-questions.jsonl"
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 7'))
    assert main(["demo", "--method", "cartridge", "--resume", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "path: expected a file made with the same seed, got" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--length", "1"], "--length: expected at least 2"),
        (["--length", "500"], "--length: expected less than the"),
        (["--steps", "0"], "--steps: expected at least 1"),
        (["--lr", "nan"], "--lr: expected a positive number"),
        (["--compose"], "--compose: expected --no-compose with --data"),
        (["--seq", "9"], "--seq: expected none with --method cartridge"),
        (["--dtype", "bf16"], "--dtype: expected fp32"),
        (["--data", "missing.txt"], "--data missing.txt: cannot be read"),
        (["--resume"], "--resume: there is no run in"),
        (["--threads", "0"], "--threads: expected at least 1"),
        (["--method", "prefix"], "--questions: expected none without --method cartridge"),
    ],
)
def test_wrong_options_are_named(command, more, message, capsys):
    assert main([*command, *more]) == 2
    assert message in capsys.readouterr().err


def test_options_that_differ_from_the_run_to_resume_are_refused(command, capsys):
    assert main([*command, "--runs", "1"]) == 0
    assert main([*command, "--resume", "--steps", "5"]) == 2
    assert "--steps 5: the run in" in capsys.readouterr().err


def test_the_documents_are_long_enough_for_a_cartridge_of_128_tokens():
    documents = read_documents(None, 2)
    assert all(len(document.text.split()) > 1000 for document in documents)
    assert len({document.title for document in documents}) == 2


def test_the_headline_admits_a_loss():
    def row(tokens, kl):
        return Row.of("name", tokens, 8, [Comparison([kl, kl + 0.1], [0.5, 0.5])])

    rows = [row(0, 2.0), row(3, 1.0), row(3, 1.0), row(48, 0.0)]
    found = Findings(Options(), "model", 1, "text", {}, rows, [[1.0]], [], 1.0)
    assert "no closer" in headline(found)
    rows[2] = row(3, 0.25)
    assert "training closes 71% [" in headline(found)


@pytest.mark.real_weights
@pytest.mark.slow
def test_the_quick_run_on_the_real_model_comes_closer_to_the_teacher(tmp_path):
    assert main(["demo", "--method", "cartridge", "--quick", "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["rows"][-1]["tokens"] >= 2000
    assert result["rows"][1]["tokens"] <= result["rows"][-1]["tokens"] / 16
    assert result["gap_closed"]["low"] > 0.1
