# SPDX-License-Identifier: Apache-2.0
"""Exports replace files together, in one step each, or not at all."""

from __future__ import annotations

import os
import re

import pytest
import torch

from peftkern import PrefixKV, export, load_prefix
from peftkern.files import replace_files
from peftkern.integrations.kv_file import KVFile, read_kv, write_kv
from tests.integrations.files import GEOMETRY, UNEQUAL, UNIFORM, assert_bit_equal


def test_nothing_is_written_unless_everything_can_be(tmp_path):
    fine, wrong = (UNIFORM["prefix"](torch.float32), UNEQUAL["ragged"](torch.float32))
    with pytest.raises(ValueError, match="layer 1"):
        export([fine, wrong], tmp_path / "new", "cartridges")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["file", "link to nothing", "link to a file"])
def test_nothing_is_written_where_a_folder_cannot_be(kind, tmp_path):
    """The bank's second cartridge needs a folder of this name."""
    (tmp_path / "precious").write_text("old")
    if kind == "file":
        (tmp_path / "doc-1").touch()
    else:
        (tmp_path / "doc-1").symlink_to(tmp_path / ("nothing" if kind == "link to nothing" else "precious"))
    before = sorted(tmp_path.rglob("*"))
    bank = PrefixKV(None, 2, **GEOMETRY, num_prefixes=2)
    message = f"folder: expected a folder, or nothing yet, at {tmp_path / 'doc-1'}, got something else"
    for options in ({}, {"force": True}):
        with pytest.raises(ValueError, match=re.escape(message)):
            export(bank, tmp_path, "cartridges", name="doc", **options)
        with pytest.raises(ValueError, match=re.escape(message)):
            export(bank, tmp_path / "doc-1" / "deep" / "er", "kv", **options)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_leaves_no_file(tmp_path, monkeypatch):
    """Not even the first of several cartridges, which lie in folders of their own."""
    left = [None] * 3  # four files would be written

    def fsync(descriptor, real=os.fsync):
        if not left:
            raise OSError(28, "No space left on device")
        left.pop()
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="No space left"):
        export(PrefixKV(None, 2, **GEOMETRY, num_prefixes=2), tmp_path, "cartridges", name="doc")
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_existing_files_stay_without_force(tmp_path):
    prefix = PrefixKV(None, 2, **GEOMETRY)
    (tmp_path / "target").write_text("precious")
    (tmp_path / "a.safetensors").write_text("old")
    (tmp_path / "b.safetensors").symlink_to(tmp_path / "target")
    (tmp_path / "c.safetensors").symlink_to(tmp_path / "nothing")
    (tmp_path / "d.safetensors").mkdir()
    for name in "abcd":
        with pytest.raises(ValueError, match=rf"{name}\.safetensors: expected no file of this name, or force=True"):
            export(prefix, tmp_path, "kv", name=name)
    for name in "abc":
        export(prefix, tmp_path, "kv", name=name, force=True)
        assert_bit_equal(load_prefix(tmp_path / f"{name}.safetensors"), prefix)
    with pytest.raises(ValueError, match=r"d\.safetensors: expected no file"):
        export(prefix, tmp_path, "kv", name="d", force=True)
    assert (tmp_path / "target").read_text() == "precious", "a link was followed"
    assert not (tmp_path / "nothing").exists()
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_a_crash_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    old, new = (PrefixKV(None, 2, **GEOMETRY) for _ in range(2))
    export(old, tmp_path, "kv", name="doc")

    def crash(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        export(new, tmp_path, "kv", name="doc", force=True)
    assert os.listdir(tmp_path) == ["doc.safetensors"]
    assert_bit_equal(load_prefix(tmp_path / "doc.safetensors"), old)


def test_contents_do_not_change_with_the_file(tmp_path):
    """A server keeps what it has read, also if somebody writes into the file."""
    path = tmp_path / "doc.safetensors"
    export(PrefixKV(None, 2, **GEOMETRY), tmp_path, "kv", name="doc")
    layers = read_kv(path).layers
    before = [x.clone() for pair in layers for x in pair]
    with path.open("r+b") as file:
        file.write(bytes(path.stat().st_size))
    assert all(map(torch.equal, [x for pair in layers for x in pair], before))


def test_wrong_contents_are_not_written(tmp_path):
    x = torch.randn(3, 2, 8)
    for layers, message in (
        ([(x, x[:2])], "layers.0.value: expected the tokens and heads of the key"),
        ([(x, x), (x.half(), x.half())], "layers.1.key: expected F32, as the first tensor, got F16"),
        ([None], "layers: expected keys and values of at least one layer"),
    ):
        with pytest.raises(ValueError, match=message):
            write_kv(tmp_path / "new" / "doc.safetensors", KVFile(layers, 3))
    with pytest.raises(ValueError, match="positions: expected an integer from 3"):
        write_kv(tmp_path / "new" / "doc.safetensors", KVFile([(x, x)], 2))
    assert not (tmp_path / "new").exists()


def test_files_are_replaced_together(tmp_path, monkeypatch):
    """All are on the disk before the first appears."""
    steps = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, real=real, name=name: (steps.append(name), real(*a))[1])
    replace_files(tmp_path, {"a": b"1", "b": b"2"})
    assert steps == ["fsync", "fsync", "replace", "replace", "fsync"]
