# SPDX-License-Identifier: Apache-2.0
"""Which kernels a call launches with how many blocks, on which device, and which tiles the blocks walk."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import shim as host


@pytest.fixture(scope="module")
def probes() -> ctypes.CDLL:
    return host.probes()


# -- tiles -----------------------------------------------------------------------------------------

ROWS = 16  # of a tile, in the probe


def _walk(probes, lengths: list[int], packed: bool, group: int, ids, only: int, first: int, end: int, step: int):
    """The (sequence, tile) pairs that a walk visits, or with a negative step the bound of the numbers of tiles."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).int()
    ids = torch.tensor(ids or [0] * len(lengths), dtype=torch.int32)
    out = torch.empty(sum(lengths) * group + 1, 2, dtype=torch.int32)
    count = probes.probe_walk(
        ctypes.c_void_p(bounds.data_ptr() if packed else 0), ctypes.c_void_p(ids.data_ptr()), len(lengths),
        int(bounds[-1]) if packed else lengths[0], group, only, first, end, step, ctypes.c_void_p(out.data_ptr()),
    )  # fmt: skip
    if step < 0:
        return count
    first_rows = {int(b): i for i, b in enumerate(bounds[:-1]) if lengths[i]} if packed else None
    return [(first_rows[x] if packed else x, tile) for x, tile in out[:count].tolist()]


LENGTHS = st.lists(st.integers(0, 70), min_size=1, max_size=9)


@settings(max_examples=200, deadline=None)
@given(
    lengths=LENGTHS, packed=st.booleans(), group=st.sampled_from([1, 3, 4, 16]), splits=st.integers(1, 7),
    only=st.integers(-1, 2), data=st.data(),
)  # fmt: skip
def test_walks_visit_each_tile_once(probes, lengths, packed, group, splits, only, data):
    """Whether blocks take ranges of numbers or every so-manieth, of all sequences or of those of one prefix."""
    if not packed:
        lengths = lengths[:1] * len(lengths)
    ids = data.draw(st.lists(st.integers(-1, 2), min_size=len(lengths), max_size=len(lengths)))
    tiles = [-(-n * group // ROWS) for n in lengths]
    expected = [(i, t) for i, n in enumerate(tiles) for t in range(n) if only < 0 or ids[i] == only]
    count = _walk(probes, lengths, packed, group, ids, -1, 0, 0, -1)
    assert sum(tiles) <= count <= sum(tiles) + len(lengths) - 1
    assert packed or count == sum(tiles)
    ranges = [(count * i // splits, count * (i + 1) // splits, 1) for i in range(splits)]
    strides = [(i, count, splits) for i in range(splits)]
    by_range, by_stride = (
        [tile for walk in walks for tile in _walk(probes, lengths, packed, group, ids, only, *walk)]
        for walks in (ranges, strides)
    )
    assert by_range == expected
    assert sorted(by_stride) == expected
