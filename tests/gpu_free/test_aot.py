# SPDX-License-Identifier: Apache-2.0
"""Every kernel that the tile table names, compiled without a GPU for every architecture, held to budgets."""

from __future__ import annotations

import os
from typing import get_args

import pytest
import torch

from peftkern.backends import triton as fused
from peftkern.backends.triton import tiles

from .aot import SHARED_MEMORY, attention_launches, compile_launch, embedding_launches

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton compiles nothing there")
FAST = {("sm_80", 64), ("sm_90", 128)}
CASES = [
    pytest.param(arch, head_dim, marks=() if (arch, head_dim) in FAST else pytest.mark.slow)
    for arch in tiles.ARCHITECTURES
    for head_dim in (64, 128)
]
DOTS = ("fwd", "dq", "dkv", "prefix")


def _within_the_device(compiled):
    assert compiled.shared <= SHARED_MEMORY[compiled.arch], f"more shared memory than a block can have: {compiled}"
    assert compiled.spills == 0, f"registers spill: {compiled}"


@pytest.mark.parametrize(("arch", "head_dim"), CASES)
def test_half_precision_kernels_fit_and_use_the_tensor_cores(arch, head_dim):
    compiled = [compile_launch(arch, launch) for launch in attention_launches(arch, head_dim, torch.bfloat16)]
    assert {c.kernel for c in compiled} == {*DOTS, "prepare", "sum_partials"}
    for c in compiled:
        _within_the_device(c)
        if c.kernel in DOTS:
            assert c.tensor_cores > 0, f"no tensor core instructions: {c}"
            assert c.async_copies > 0 or arch.startswith("gfx"), f"no asynchronous copies: {c}"
    matrix_unit = {"sm_90": "HGMMA", "sm_100": "UTC.*MMA"}.get(arch, "HMMA|v_mfma")
    assert next(c for c in compiled if c.kernel == "fwd").count(matrix_unit) > 0


MERGE_DOTS = {"prefix_merge_fwd", "prefix_merge_bwd"}


@pytest.mark.parametrize(("arch", "head_dim"), CASES)
def test_the_prefixs_own_kernels_fit_and_use_the_tensor_cores(arch, head_dim):
    """A short prefix in one pass each way, a long one in blocks."""
    for prefix_len, backward in ((32, {"prefix_merge_bwd"}), (160, {"prepare", "dq", "prefix"})):
        launches = attention_launches(arch, head_dim, torch.bfloat16, prefix_len=prefix_len, backend="two_part")
        compiled = [compile_launch(arch, launch) for launch in launches]
        assert {c.kernel for c in compiled} == {"prefix_merge_fwd", "sum_partials", *backward}
        for c in compiled:
            _within_the_device(c)
            assert c.tensor_cores > 0 or c.kernel not in {*MERGE_DOTS, *DOTS}, f"no tensor core instructions: {c}"
        matrix_unit = {"sm_90": "HGMMA", "sm_100": "UTC.*MMA"}.get(arch, "HMMA|v_mfma")
        assert all(c.count(matrix_unit) > 0 for c in compiled if c.kernel in MERGE_DOTS)


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_the_slots_kernels_compile(arch):
    compiled = [compile_launch(arch, x) for x in attention_launches(arch, 64, torch.bfloat16, backend="slot")]
    assert {"slot_fwd", "slot_bwd"} <= {c.kernel for c in compiled}
    for c in compiled:
        _within_the_device(c)


@pytest.mark.slow
@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
@pytest.mark.parametrize(("head_dim", "dtype"), [(256, torch.bfloat16), (64, torch.float32), (128, torch.float32),
                                                 (256, torch.float32)], ids=str)  # fmt: skip
def test_wide_heads_and_fp32_fit(arch, head_dim, dtype):
    for launch in attention_launches(arch, head_dim, dtype) + attention_launches(
        arch, head_dim, dtype, backend="two_part"
    ):
        compiled = compile_launch(arch, launch)
        assert compiled.shared <= SHARED_MEMORY[arch], str(compiled)


OPTIONS = {
    "key_mask": {"key_mask": torch.ones(2, 64, dtype=torch.bool)},
    "window": {"window": 32, "softcap": 30.0},
    "bias": {
        "bias": torch.zeros(1, 4, 64, 64, requires_grad=True), "prefix_bias": torch.zeros(4, 32, requires_grad=True)
    },
    "gate": {"gate": torch.zeros(4, requires_grad=True), "sinks": torch.zeros(4, requires_grad=True)},
    "dropout": {"dropout_p": 0.1, "dropout_seed": 1},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_options_compile(name):
    """Options cost registers, so spills are allowed here; that each compiles at all is what its users need."""
    arch = "sm_80"
    for launch in attention_launches(arch, 64, torch.bfloat16, torch.float32, **OPTIONS[name]):
        assert compile_launch(arch, launch).shared <= SHARED_MEMORY[arch]


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_embedding_compiles(arch):
    launches = embedding_launches(arch)
    assert len(launches) == 2
    for launch in launches:
        _within_the_device(compile_launch(arch, launch))


@pytest.mark.parametrize("arch", tiles.ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_table_covers_every_head_dim(arch, dtype):
    for direction in get_args(tiles.Direction):
        for head_dim in range(1, tiles.MAX_HEAD_DIM + 1):
            block = tiles.tile(arch, direction, head_dim, dtype)
            assert all(n >= 16 and n & (n - 1) == 0 for n in block[:2]), f"{arch} {direction} {head_dim}: {block}"


def test_a_tile_too_large_for_the_registers_is_noticed(monkeypatch):
    """The budgets can fail."""
    monkeypatch.setattr(fused, "tile", lambda *_: tiles.Tile(64, 64, 4, 2))
    launch = next(x for x in attention_launches("sm_80", 128, torch.bfloat16) if "prefix_kernel" in x[0].__name__)
    with pytest.raises(AssertionError, match="registers spill"):
        _within_the_device(compile_launch("sm_80", launch))
