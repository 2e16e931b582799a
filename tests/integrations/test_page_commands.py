# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/cartridges.md, up to the server, on a tiny random model. A slow test asks the real server."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch

import peftkern
from peftkern.integrations.kv_file import read_kv
from peftkern.tools.cli import main
from tests.self_study.lab import TEXT, new_model, new_tokenizer

from .page_commands import page_commands


def test_the_page_has_at_most_ten_commands():
    assert list(page_commands()) == [
        "pip install", "peftkern demo", "peftkern export", "vllm serve", "curl http://localhost:8000/v1/completions",
    ]  # fmt: skip


def test_demo_and_export_write_what_the_server_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    new_model().save_pretrained("FOLDER")
    new_tokenizer().save_pretrained("FOLDER")
    Path("DOCUMENT.txt").write_text(TEXT)
    few = "--questions 4 --eval-rows 2 --steps 2 --batch-size 2 --answer 4 --runs 1 --length 3 --threads 1"
    commands = page_commands()
    for command in (f"{commands['peftkern demo']} {few}", commands["peftkern export"]):
        assert main(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    assert [path.name for path in Path("served").iterdir()] == ["document.safetensors"]
    served = read_kv("served/document.safetensors")
    trained = peftkern.load_prefix("study/cartridge")
    assert served.positions == 3
    for pair, (k, v) in zip(served.layers, trained.layer_kv(), strict=True):
        assert torch.equal(pair[0], k.transpose(0, 1))
        assert torch.equal(pair[1], v.transpose(0, 1))
