# SPDX-License-Identifier: Apache-2.0
"""The tile table is a pure function within the devices' limits; tuning is tested with a fake timer."""

from __future__ import annotations

import json
from unittest import mock

import pytest
import torch

from peftkern.backends import Call
from peftkern.backends.triton import TritonBackend, autotune, device, launch, tiles
from peftkern.backends.triton.tiles import Tile
from peftkern.testing.bounds import check_backend
from peftkern.testing.cases import Shape, tensors

from .aot import SHARED_MEMORY

TABLE = Tile(128, 64, 8, 2)


@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_table_covers_every_head_dim(arch, dtype):
    for direction in tiles.DIRECTIONS:
        for head_dim in range(1, tiles.MAX_HEAD_DIM + 1):
            block = tiles.tile(arch, direction, head_dim, dtype)
            assert block == tiles.tile(arch, direction, head_dim, dtype)
            assert all(n in (16, 32, 64, 128) for n in block[:2]), f"{arch} {direction} {head_dim}: {block}"
            assert block.num_warps in (4, 8)
            assert 1 <= block.num_stages <= 4


@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
def test_keys_in_flight_fit_shared_memory(arch):
    """A lower bound, num_stages - 1 blocks of keys and values; test_aot.py checks the exact figure."""
    for head_dim in (32, 64, 80, 96, 128, 192, 256):
        for direction in ("forward", "dq", "decode"):
            block = tiles.tile(arch, direction, head_dim, torch.bfloat16)
            width = max(16, 1 << (head_dim - 1).bit_length())
            assert 2 * 2 * block.BLOCK_N * width * (block.num_stages - 1) <= SHARED_MEMORY[arch]


def test_an_old_gpu_is_told_why(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "architecture", lambda device: tiles.cuda_architecture(7, 5))
    half, shape = torch.float16, (1, 1, 1, 64)
    call = Call("prefix_attention", torch.device("cuda"), half, half, shape, shape, shape[1:])
    assert "sm_75 is older than sm_80" in " ".join(TritonBackend().plan(call).reasons)


@pytest.mark.parametrize("start", [TABLE, Tile(16, 16, 4, 1), Tile(128, 128, 8, 4)], ids=str)
def test_candidates_are_the_neighbours(start):
    found = tiles.candidates(start)
    assert found[0] == start
    assert len(found) == len(set(found))
    for tile in found[1:]:
        assert sum(a != b for a, b in zip(tile, start, strict=True)) == 1
        assert min(tile[:2]) >= 16
        assert max(tile[:2]) <= 128


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Enable tuning. ``bench.file`` is its file, and ``bench.times`` gives the milliseconds of a tile."""
    monkeypatch.setenv("PEFTKERN_AUTOTUNE", "1")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(autotune, "_read", None)
    monkeypatch.setattr(autotune, "_tiles", {})
    fake = mock.Mock(file=tmp_path / "cache" / "peftkern_tiles.json", times={}, timed=[])

    def time(run):
        run()
        tile = autotune._trial.get()[1]
        fake.timed.append(tile)
        return fake.times.get(tile, 1.0)

    monkeypatch.setattr(autotune, "_time", time)
    return fake


def test_the_fastest_is_kept_and_read_again(bench, monkeypatch):
    fastest = TABLE._replace(num_stages=3)
    bench.times = {fastest: 0.25, TABLE: 0.5}
    seen = []
    assert autotune.chosen("dq", "kind", TABLE) == TABLE
    autotune.tune(
        "dq", "kind", TABLE, lambda: seen.append((autotune.chosen("dq", "kind", TABLE), autotune.enabled()))
    )
    assert [tile for tile, _ in seen] == tiles.candidates(TABLE)
    assert not any(nested for _, nested in seen), "tuning within a timing"
    assert autotune.chosen("dq", "kind", TABLE) == fastest
    assert autotune.chosen("dq", "other", TABLE) == TABLE
    entry = {"tile": list(fastest), "ms": 0.25, "table": list(TABLE), "table_ms": 0.5}
    assert json.loads(bench.file.read_text()) == {"kind": entry}
    monkeypatch.setattr(autotune, "_read", None)  # as another process
    monkeypatch.setattr(autotune, "_tiles", {})
    autotune.tune("dq", "kind", TABLE, seen.clear)
    assert seen, "timed although the file knows it"
    assert autotune.chosen("dq", "kind", TABLE) == fastest
    monkeypatch.delenv("PEFTKERN_AUTOTUNE")
    assert autotune.chosen("dq", "kind", TABLE) == TABLE, "the file counts only where tuning is on"


def test_what_others_wrote_meanwhile_stays(bench):
    autotune.chosen("dq", "mine", TABLE)
    bench.file.parent.mkdir()
    bench.file.write_text(json.dumps({"theirs": {"tile": [16, 16, 4, 1]}}))
    autotune.tune("dq", "mine", TABLE, lambda: None)
    assert set(json.loads(bench.file.read_text())) == {"mine", "theirs"}
    assert [path.name for path in bench.file.parent.iterdir()] == [bench.file.name], "temporary files are left"


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"kind": {"tile": [1, 2]}}', '{"kind": 3}', '{"kind": {"tile": "16"}}']
)
def test_a_file_that_cannot_be_read_is_replaced(bench, text):
    bench.file.parent.mkdir()
    bench.file.write_text(text)
    with pytest.warns(UserWarning, match="holds no readable tiles"):
        assert autotune.chosen("dq", "kind", TABLE) == TABLE
    with pytest.warns(UserWarning, match="holds no readable tiles"):
        autotune.tune("dq", "kind", TABLE, lambda: None)
    assert set(json.loads(bench.file.read_text())) == {"kind"}


def test_a_folder_that_cannot_be_written_costs_a_warning(bench, monkeypatch, tmp_path):
    (tmp_path / "occupied").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "occupied"))
    monkeypatch.setattr(autotune, "_load", lambda file: {})
    with pytest.warns(UserWarning, match="the tuned tiles are not saved"):
        autotune.tune("dq", "kind", TABLE, lambda: None)


def test_tiles_that_do_not_fit_are_passed_over(bench):
    bench.times = dict.fromkeys(tiles.candidates(TABLE), float("inf"))
    autotune.tune("dq", "kind", TABLE, lambda: None)
    assert autotune.chosen("dq", "kind", TABLE) == TABLE
    assert not bench.file.exists()


def test_where_the_file_is(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert autotune.cache_file() == tmp_path / "peftkern" / "tiles.json"


@pytest.mark.interpreter
def test_a_tuned_call_is_right_and_changes_nothing_it_was_given(bench):
    """Forward and backward in the interpreter: each kernel is tuned once, then runs with the fastest tile."""
    fastest = Tile(16, 16, 1, 1)
    bench.times = {fastest: 0.5}
    inputs = tensors(Shape(B=1, Hq=2, Hkv=1, S=33, P=19, D=16), torch.float32)
    before = {name: x.clone() for name, x in inputs.items()}
    launched = []
    launch_kernel = launch.launch_kernel

    def record(kernel, grid, *arguments, **constants):
        launched.append((kernel.__name__, constants.get("BLOCK_M")))
        launch_kernel(kernel, grid, *arguments, **constants)

    with mock.patch.object(launch, "launch_kernel", record):
        check_backend("triton", inputs, {})
        first = len(bench.timed)
        launched.clear()
        check_backend("triton", inputs, {})
    assert len(bench.timed) == first == 4 * len(tiles.candidates(Tile(32, 16, 1, 1)))
    assert {block for name, block in launched if "sum" not in name} == {16}
    assert {entry.split()[1] for entry in json.loads(bench.file.read_text())} == {"forward", "dq", "dkv", "prefix"}
    assert all(torch.equal(inputs[name], x) for name, x in before.items())
