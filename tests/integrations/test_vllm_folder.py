# SPDX-License-Identifier: Apache-2.0
"""Files that come, change and go while the connector serves their folder."""

from __future__ import annotations

import sys

import pytest

from peftkern.integrations.kv_file import read_kv
from peftkern.integrations.prefix_folder import PrefixFolder

from .vllm_connector import equal_pairs, params_of, write_prefix
from .vllm_stand_ins import DIM, HEADS, LAYERS, Request


def test_files_are_added_replaced_and_removed(engine, folder):
    pairs = write_prefix(folder, "new", 6, 5)
    first = engine.add(Request("1", [1], params_of("new")))
    (table,), _ = engine.schedule(first)
    assert equal_pairs(engine.read(table, 0, 6), pairs)
    pairs = write_prefix(folder, "new", 6, 6)
    second = engine.add(Request("2", [1], params_of("new")))
    assert second.cache_salt != first.cache_salt
    (table,), _ = engine.schedule(second)
    assert equal_pairs(engine.read(table, 0, 6), pairs)
    (folder / "new.safetensors").unlink()
    (table,), failed = engine.schedule(engine.add(Request("3", [1], params_of("new"))))
    assert failed == {table[0]}


def test_a_folder_keeps_the_prefixes_that_were_used_last(folder):
    size = LAYERS * 2 * HEADS * DIM * 4
    prefixes = PrefixFolder(folder, (5 + 8) * size)
    a, b = prefixes.get("a"), prefixes.get("b")
    assert prefixes.get("a") is a
    c = prefixes.get("c")
    assert prefixes.digests() == {c.digest}, "the newest stays, whatever its size"
    assert prefixes.get("b") is not b
    assert prefixes.get("b").digest == b.digest


@pytest.mark.parametrize("times", [1, 2, 3])
def test_a_file_that_is_replaced_while_it_is_read_is_read_again(folder, monkeypatch, times):
    prefix_folder = sys.modules[PrefixFolder.__module__]
    left = list(range(times))

    def read(path):
        contents = read_kv(path)
        if left:
            write_prefix(folder, "a", 6 + left.pop(0), seed=5)  # a rename
        return contents

    monkeypatch.setattr(prefix_folder, "read_kv", read)
    prefixes = PrefixFolder(folder, 0)
    if times < 3:
        assert prefixes.get("a").length == 5 + times
    else:
        with pytest.raises(ValueError, match="expected a file that stays while it is read, got 3 that were replaced"):
            prefixes.get("a")
