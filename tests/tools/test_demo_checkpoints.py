# SPDX-License-Identifier: Apache-2.0
"""What Ctrl-C, a full disk and a damaged file leave of a run of the demo."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from safetensors.torch import load_file

from peftkern.tools.cli import main
from peftkern.tools.demo import checkpoint, session
from peftkern.tools.demo.options import Options
from peftkern.tools.demo.training import ARMS, Pair

from .tiny_demo import interrupt_in_step, losses


@pytest.mark.parametrize("method", ["prefix", "prompt"])
def test_resume_after_ctrl_c_gives_the_losses_of_an_uninterrupted_run(
    command, method, tmp_path, monkeypatch, capsys, no_memory
):
    command += ["--method", method]
    assert main(command) == 0
    uninterrupted = losses(tmp_path / "out")
    assert all(abs(loss["stock"] - loss["peftkern"]) < 1e-5 for loss in uninterrupted), "the curves differ"
    final = load_file(tmp_path / "out/checkpoint-6/state.safetensors")

    out = tmp_path / "interrupted"
    with monkeypatch.context() as patched:
        interrupt_in_step(patched, 2)
        assert main([*command, "--out", str(out)]) == 130
    told = capsys.readouterr().out
    assert "Stopped" in told
    assert f"peftkern demo --resume --out {out}" in told
    assert [p.name for p in out.iterdir()] == ["checkpoint-3"], "the step at hand ends before the checkpoint"
    assert main(["demo", "--resume", "--out", str(out)]) == 0
    assert losses(out) == uninterrupted
    resumed = load_file(out / "checkpoint-6/state.safetensors")
    assert resumed.keys() == final.keys()
    assert all(torch.equal(resumed[name], final[name]) for name in final)


def test_the_checkpoint_after_ctrl_c_loads_with_peft(command, tiny, tmp_path, monkeypatch):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    interrupt_in_step(monkeypatch, 1)
    assert main(command) == 130
    folder = tmp_path / "out/checkpoint-2"
    state = load_file(folder / "state.safetensors")
    for arm in ARMS:
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny / "model"), folder / arm)
        weight = loaded.prompt_encoder["default"].embedding.weight
        assert torch.equal(weight, state[f"{arm}/prompt_encoder.default.embedding.weight"])
    assert not [p for p in folder.rglob("*") if p.suffix in {".bin", ".pt", ".pkl"}], "no pickle"


@pytest.fixture
def interruptible():
    """Let Ctrl-C interrupt, even if a shell runs the tests in the background and ignores it."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_stops_at_once(command, tmp_path, monkeypatch, capsys):
    def twice(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(session, "train_pair", twice)
    assert main(command) == 130
    assert "nothing was saved" in capsys.readouterr().out
    assert not list((tmp_path / "out").iterdir())
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_unfinished_run_is_neither_overwritten_nor_resumed_with_other_options(
    command, tmp_path, monkeypatch, capsys
):
    interrupt_in_step(monkeypatch, 0)
    assert main(command) == 130
    assert main(command) == 2
    assert "holds an unfinished run (1 of 6 steps)" in capsys.readouterr().err
    assert main([*command, "--resume", "--length", "7"]) == 2
    assert "--length 7: the checkpoint" in capsys.readouterr().err
    (tmp_path / "out/checkpoint-1/state.json").write_text("{")
    assert main([*command, "--resume"]) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_told(command, tmp_path, monkeypatch, capsys):
    interrupt_in_step(monkeypatch, 0)
    assert main(command) == 130
    tensors = tmp_path / "out/checkpoint-1/state.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:100])
    assert main(["demo", "--resume", "--out", str(tmp_path / "out")]) == 2
    assert "state.safetensors cannot be read" in capsys.readouterr().err


def test_a_failing_save_leaves_the_previous_checkpoint(command, tmp_path, monkeypatch):
    import safetensors.torch

    interrupt_in_step(monkeypatch, 0)
    assert main(command) == 130
    run = checkpoint.Progress(Options(), 1, [Pair(0, "stock", 1, {}, {})] * 2)

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpoint.save(tmp_path / "out", {}, run)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["checkpoint-1"]
    assert checkpoint.latest(tmp_path / "out") == tmp_path / "out/checkpoint-1"


def test_a_full_disk_is_told(command, monkeypatch, capsys, no_memory):
    def full(*_):
        raise OSError(28, "No space left on device", "out/demo.png")

    monkeypatch.setattr(session, "write_files", full)
    assert main(command) == 2
    assert "No space left on device: 'out/demo.png'" in capsys.readouterr().err
