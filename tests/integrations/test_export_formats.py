# SPDX-License-Identifier: Apache-2.0
"""Exported keys and values come back bit-equal, in the documented layouts."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import pytest
import torch
import yaml
from safetensors.torch import load_file

from peftkern import PrefixKV, export, load_prefix, save_prefix
from peftkern.integrations.kv_file import KVFile, read_kv, write_kv
from peftkern.model_info import Origin
from tests.checkpoints import llama
from tests.integrations.files import DTYPES, GEOMETRY, UNEQUAL, UNIFORM, assert_bit_equal, lists, parameters


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", UNIFORM | UNEQUAL)
def test_kv_files_come_back_bit_equal(name, dtype, tmp_path):
    prefix = (UNIFORM | UNEQUAL)[name](dtype)
    prefix.origin = Origin("somebody/llama", "main", "SEQ_CLS")
    assert export(prefix, tmp_path, "kv", name="doc") == [tmp_path / "doc.safetensors"]
    contents = read_kv(tmp_path / "doc.safetensors")
    assert contents.dtype == dtype
    assert [pair is None for pair in contents.layers] == [shape is None for shape in prefix.shapes]
    back = load_prefix(tmp_path / "doc.safetensors")
    assert_bit_equal(back, prefix)
    assert back.origin == prefix.origin
    assert {x.dtype for x in back.parameters()} == {torch.float32}
    assert not any(x.requires_grad for x in load_prefix(tmp_path / "doc.safetensors", trainable=False).parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", UNIFORM)
def test_cartridges_come_back_bit_equal(name, dtype, tmp_path):
    prefix = UNIFORM[name](dtype)
    prefix.origin = Origin("somebody/llama: 3")
    export(prefix, tmp_path, "cartridges", name="doc")
    back = load_prefix(tmp_path / "doc")
    assert_bit_equal(back, prefix)
    assert back.origin.base_model_name_or_path == "somebody/llama: 3"


def test_keys_and_values_of_one_memory_are_written(tmp_path):
    """As models have them whose values are their keys, and parts of one tensor."""
    x = torch.randn(5, 2, 8)
    pairs = [(x, x), (x, x[:3].repeat(2, 1, 1)[:5]), (x[1:4], x[:3])]
    write_kv(tmp_path / "x.safetensors", KVFile(pairs, 5))
    for found, pair in zip(read_kv(tmp_path / "x.safetensors").layers, pairs, strict=True):
        assert all(torch.equal(*both) for both in zip(found, pair, strict=True))


def test_kv_tensors_have_the_documented_layout(tmp_path):
    prefix = PrefixKV(None, 5, **GEOMETRY)
    export(prefix, tmp_path, "kv", name="doc")
    tensors = load_file(tmp_path / "doc.safetensors")
    assert sorted(tensors) == sorted(f"layers.{i}.{part}" for i in range(3) for part in ("key", "value"))
    for layer, (key, value) in enumerate(prefix.layer_kv()):
        assert torch.equal(tensors[f"layers.{layer}.key"], key.transpose(0, 1))
        assert torch.equal(tensors[f"layers.{layer}.value"], value.transpose(0, 1))


def test_cartridges_have_the_layout_that_servers_read(tmp_path):
    """Tokasaurus asks every list for its first tensor and for as many layers, also where nothing is frozen."""
    for frozen in (0, 2):
        prefix = PrefixKV(None, 5, **GEOMETRY, num_frozen_tokens=frozen)
        export(prefix, tmp_path, "cartridges", name="doc", force=True)
        state = torch.load(tmp_path / "doc" / "cartridge.pt", weights_only=True)
        assert set(state) == {f"{a}_{b}" for a in ("trainable", "frozen", "fixed") for b in ("keys", "values")}
        for name, tensors in state.items():
            tokens = 5 - frozen if name.startswith("trainable") else frozen
            assert [list(x.shape) for x in tensors] == [[1, 2, tokens, 8]] * 3, name
        assert torch.equal(
            torch.cat([state["fixed_keys"][1], state["trainable_keys"][1]], 2)[0], prefix.layer_kv()[1][0]
        )
        config = yaml.safe_load((tmp_path / "doc" / "config.yaml").read_text())
        assert config == {"kv_cache_initializer": {"max_tokens": 5}}


@pytest.mark.parametrize("kind", ["frozen", "fixed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_files_of_cartridges_are_read(kind, dtype, tmp_path):
    """As its TrainableCache saves them, in lists of parameters; without frozen tokens, these lists are empty."""
    for wrap, frozen in ((list, 1), (parameters, 1), (parameters, 0)):
        state = lists(dtype=dtype, kind=kind, wrap=wrap, frozen=frozen)
        if not frozen:
            state |= {f"{kind}_keys": parameters([]), f"{kind}_values": parameters([])}
        torch.save(state, tmp_path / "cartridge.pt")
        (tmp_path / "config.yaml").write_text("model:\n  value:\n    pretrained_model_name_or_path: a/b\n")
        prefix = load_prefix(tmp_path)
        assert (prefix.lengths, prefix.num_frozen_tokens) == ((4 + frozen,) * 2, frozen)
        key, value = prefix.layer_kv()[1]
        assert torch.equal(key[:, frozen:], state["trainable_keys"][1][0].float())
        if frozen:
            assert torch.equal(value[:, :1], state[f"{kind}_values"][1][0].float())
        assert prefix.origin.base_model_name_or_path == "a/b"


def test_views_and_shared_storages_are_read(tmp_path, monkeypatch):
    """A tensor may be a strided part of a storage that others use, too, which is read once."""
    whole = torch.randn(2, 1, 4, 2, 8)
    keys = [x.transpose(1, 2) for x in whole]
    torch.save({"trainable_keys": keys, "trainable_values": keys}, tmp_path / "cartridge.pt")
    read, real = [], zipfile.ZipFile.read
    monkeypatch.setattr(
        zipfile.ZipFile, "read", lambda self, entry: (read.append(entry.filename), real(self, entry))[1]
    )
    key, value = load_prefix(tmp_path).layer_kv()[1]
    assert torch.equal(key, keys[1][0])
    assert torch.equal(value, keys[1][0])
    assert [name for name in read if "/data/" in name] == ["cartridge/data/0"]


def test_a_yaml_tag_constructs_nothing(tmp_path):
    torch.save(lists(), tmp_path / "cartridge.pt")
    trace = tmp_path / "executed"
    (tmp_path / "config.yaml").write_text(
        f"x: !!python/object/apply:os.system ['touch {trace}']\nmodel: {{pretrained_model_name_or_path: a/b}}\n"
    )
    assert load_prefix(tmp_path).origin.base_model_name_or_path == "a/b"
    assert not trace.exists()


def test_a_projection_is_evaluated(tmp_path):
    prefix = PrefixKV(None, 5, **GEOMETRY, projection=6)
    for to in ("kv", "cartridges"):
        export(prefix, tmp_path, to, name="doc")
    for path in (tmp_path / "doc.safetensors", tmp_path / "doc"):
        assert_bit_equal(load_prefix(path), prefix.bake())


def test_a_bank_becomes_a_file_per_prefix(tmp_path):
    singles = [PrefixKV(None, n, **GEOMETRY) for n in (3, 5)]
    written = export(PrefixKV.stack(singles), tmp_path, "kv", name="docs")
    assert [path.name for path in written] == ["docs-0.safetensors", "docs-1.safetensors"]
    for path, single in zip(written, singles, strict=True):
        assert_bit_equal(load_prefix(path), single)


def test_a_loaded_prefix_fits_the_model(tmp_path):
    prefix = PrefixKV(llama(), 4)
    export(prefix, tmp_path, "kv", name="doc")
    assert load_prefix(tmp_path / "doc.safetensors", model=llama()).origin == prefix.origin
    with pytest.raises(ValueError, match=r"doc\.safetensors: expected a prefix for the model's .*'num_layers': 3"):
        load_prefix(tmp_path / "doc.safetensors", model=llama(num_hidden_layers=3))


def test_folders_are_exported_under_their_names(tmp_path):
    for name in ("law", "tax"):
        save_prefix(PrefixKV(None, 5, **GEOMETRY), tmp_path / name)
    written = export([tmp_path / "law", str(tmp_path / "tax")], tmp_path / "served", "kv")
    assert [path.name for path in written] == ["law.safetensors", "tax.safetensors"]
    again = export(tmp_path / "served" / "law.safetensors", tmp_path / "served", "cartridges")
    assert again[0].parent.name == "law"
    assert export(again[0].with_name("cartridge.pt"), tmp_path / "again", "kv") == [
        tmp_path / "again/law.safetensors"
    ]


def test_a_server_reads_kv_files_without_transformers(tmp_path):
    export(PrefixKV(None, 2, **GEOMETRY), tmp_path, "kv", name="doc")
    script = (
        "import sys; from peftkern.integrations.kv_file import read_kv; print(read_kv(sys.argv[1]).lengths)\n"
        "heavy = {'transformers', 'triton', 'peft', 'peftkern.functional'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, tmp_path / "doc.safetensors"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, "[2, 2, 2]\n"), result.stderr
