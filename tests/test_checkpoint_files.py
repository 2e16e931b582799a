# SPDX-License-Identifier: Apache-2.0
"""Checkpoint files: crashes while saving, damaged files, and files of other programs or models."""

from __future__ import annotations

import json
import os
import shutil
import stat

import peft
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from peftkern import PrefixKV, load_prefix, save_prefix
from tests.checkpoints import GEOMETRY, ONLY_OURS, OURS, assert_same, files, llama, prefix_config


class Crash(BaseException):
    """Like KeyboardInterrupt: nothing catches it by accident."""


def _crash_at(monkeypatch, what, call):
    """The call-th use of a step of saving crashes."""
    real, calls = getattr(os, what), []

    def dies(*args):
        calls.append(args)
        if len(calls) == call:
            raise Crash
        return real(*args)

    monkeypatch.setattr(os, what, dies)


STEPS = [("fsync", 1), ("fsync", 2), ("replace", 1), ("replace", 2), ("fsync", 3)]


@pytest.mark.parametrize(("what", "call"), STEPS, ids=[f"{what} {call}" for what, call in STEPS])
@pytest.mark.parametrize("old", ["prefix", "prompt", "length per layer", None])
def test_a_crash_loses_nothing(old, what, call, tmp_path, monkeypatch):
    """After the crash the folder contains the old checkpoint or the new one, and no temporary files."""
    before, after = (OURS | ONLY_OURS)[old]() if old else None, OURS["projection"]()
    if before is not None:
        save_prefix(before, tmp_path)
    with monkeypatch.context() as patch:
        _crash_at(patch, what, call)
        with pytest.raises(Crash):
            save_prefix(after, tmp_path)
    assert set(os.listdir(tmp_path)) <= {"adapter_model.safetensors", "adapter_config.json"}
    survivor = before if (what, call) in STEPS[:3] else after
    if survivor is None:
        assert os.listdir(tmp_path) == []
    else:
        assert_same(load_prefix(tmp_path), survivor)
    save_prefix(after, tmp_path)
    assert_same(load_prefix(tmp_path), after)


def test_killed_between_the_files_it_loads(tmp_path):
    """A killed process leaves new weights, the old config, and a temporary file."""
    old, new = OURS["prompt"](), ONLY_OURS["length per layer"]()
    save_prefix(old, tmp_path)
    save_prefix(new, tmp_path / "new")
    shutil.copy(tmp_path / "new" / "adapter_model.safetensors", tmp_path)
    (tmp_path / ".adapter_config.json.0.tmp").write_text("{")
    assert_same(load_prefix(tmp_path), new)


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path):
    save_prefix(OURS["prefix"](), tmp_path)
    (tmp_path / "plain").touch()
    modes = {name: stat.S_IMODE((tmp_path / name).stat().st_mode) for name in os.listdir(tmp_path)}
    assert len(set(modes.values())) == 1, modes


@given(cut=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_named(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("truncated")
    save_prefix(PrefixKV(None, 2, **GEOMETRY), folder)
    path = folder / "adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(ValueError, match="got a truncated or foreign file") as error:
        load_prefix(folder)
    assert str(path) in str(error.value)
    prefix = PrefixKV(None, 2, **GEOMETRY)
    save_prefix(prefix, folder)
    assert_same(load_prefix(folder), prefix)


def _pickle(folder, zipped):
    torch.save({"prompt_embeddings": torch.zeros(5, 64)}, folder / "x", _use_new_zipfile_serialization=zipped)
    os.replace(folder / "x", folder / "adapter_model.safetensors")


def _edit_config(text="", **changes):
    """A folder saved by PEFT, with its config changed, replaced by a text, or removed (None)."""

    def edit(folder):
        peft.get_peft_model(llama(), prefix_config()).save_pretrained(folder, save_embedding_layers=False)
        path = folder / "adapter_config.json"
        config = json.loads(path.read_text())
        path.unlink()
        if text is not None:
            path.write_text(text or json.dumps({**config, **changes}))

    return edit


def _rename_tensor(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({"lora_A": tensors["prompt_embeddings"].clone()}, folder / "adapter_model.safetensors")


def _header(**changes):
    def edit(folder):
        path = folder / "adapter_model.safetensors"
        with safe_open(path, "pt") as file:
            own = json.loads(file.metadata()["peftkern"])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        save_file(tensors, path, {"peftkern": json.dumps({**own, **changes})})

    return edit


NO_FILE = "adapter_model.safetensors: expected a safetensors file, got none"
BAD_CONFIG = "adapter_config.json: expected PEFT's config"
BAD_FOLDERS = {
    "no weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), NO_FILE),
    "no folder": (shutil.rmtree, NO_FILE),
    "only a pickle": (
        lambda folder: os.replace(folder / "adapter_model.safetensors", folder / "adapter_model.bin"),
        "adapter_model.bin is a pickle",
    ),
    "pickle under our name": (lambda folder: _pickle(folder, True), "got a pickle, which is not read"),
    "old pickle under our name": (lambda folder: _pickle(folder, False), "got a pickle, which is not read"),
    "git-lfs pointer": (
        lambda folder: (folder / "adapter_model.safetensors").write_text(
            "version https://git-lfs.github.com/spec/v1"
        ),
        "got a truncated or foreign file",
    ),
    "no config": (_edit_config(text=None), BAD_CONFIG),
    "config cut": (_edit_config(text='{"peft'), BAD_CONFIG),
    "config a list": (_edit_config(text="[]"), "got a JSON list"),
    "lora": (_edit_config(peft_type="LORA"), "expected peft_type to be one of PREFIX_TUNING, CARTRIDGE"),
    "field missing": (_edit_config(num_layers=None), "num_layers: expected an int from 1 to 65536, got None"),
    "field of wrong type": (
        _edit_config(token_dim="16"),
        "token_dim: expected an int from 1 to 2147483647, got '16'",
    ),
    "zero heads": (
        _edit_config(num_attention_heads=0),
        "num_attention_heads: expected an int from 1 to 2147483647, got 0",
    ),
    "odd token_dim": (_edit_config(token_dim=17), "token_dim: expected a multiple of 2 heads, got 17"),
    "more tokens": (
        _edit_config(num_virtual_tokens=6),
        "expected floats (F64, F32, F16, BF16) [6, 64], got F32 [5, 64]",
    ),
    "huge": (_edit_config(num_layers=10**9), "num_layers: expected an int from 1 to 65536, got 1000000000"),
    "foreign tensors": (_rename_tensor, "expected 'prompt_embeddings' in the weights, got ['lora_A']"),
    "newer": (_header(peftkern_format=2), "expected peftkern_format 1, got 2"),
    "header of more layers": (
        _header(num_layers=3, lengths=[5, 5, 5]),
        "expected floats (F64, F32, F16, BF16) [5, 96]",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_bad_folders_are_named(name, tmp_path):
    folder = tmp_path / "adapter"
    save_prefix(OURS["prefix"](), folder)
    spoil, message = BAD_FOLDERS[name]
    spoil(folder)
    before = files(folder) if folder.exists() else None
    with pytest.raises(ValueError, match="adapter_") as error:
        load_prefix(folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)
    assert before == (files(folder) if folder.exists() else None)


def test_integers_are_no_prefix(tmp_path):
    _edit_config()(tmp_path)
    save_file({"prompt_embeddings": torch.zeros(5, 64, dtype=torch.int64)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"prompt_embeddings: expected floats \(.*\) \[5, 64\], got I64"):
        load_prefix(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 3}, "'num_layers': 3"),
        ({"num_key_value_heads": 4}, "'num_kv_heads': 4"),
        ({"head_dim": 16}, "'head_dim': 16"),
    ],
)
def test_a_prefix_for_another_model_is_refused(changes, words, tmp_path):
    save_prefix(OURS["prefix"](), tmp_path)
    with pytest.raises(ValueError, match="expected a prefix for the model's") as error:
        load_prefix(tmp_path, model=llama(**changes))
    for word in (words, "somebody/llama", str(tmp_path)):
        assert word in str(error.value)


def test_a_prompt_for_another_model_is_refused(tmp_path):
    save_prefix(OURS["prompt"](), tmp_path)
    with pytest.raises(ValueError, match=r"\{'embed_dim': 64\}, got one for \{'embed_dim': 32\}"):
        load_prefix(tmp_path, model=llama(hidden_size=64).config)


def test_a_classifier_that_peft_saved_beside_it_is_kept(tmp_path):
    """SEQ_CLS adapters contain the classifier: loading names it, and saving does not overwrite it."""
    bert = transformers.BertForSequenceClassification(
        transformers.BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, vocab_size=60)
    )
    theirs = peft.get_peft_model(bert, peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=5))
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    with pytest.warns(UserWarning, match=r"expected a prefix alone; not loaded: \[.*classifier"):
        prefix = load_prefix(tmp_path)
    before = files(tmp_path)
    with pytest.raises(ValueError, match=r"expected to replace a prefix alone, got also \[.*classifier"):
        save_prefix(prefix, tmp_path)
    assert files(tmp_path) == before


def test_only_prefixes_are_saved(tmp_path):
    with pytest.raises(ValueError, match="prefix: expected a PrefixKV or a SoftPrompt, got Linear"):
        save_prefix(torch.nn.Linear(2, 2), tmp_path / "new")
    assert not (tmp_path / "new").exists()
