# SPDX-License-Identifier: Apache-2.0
"""Every kernel of the tile table, compiled without a GPU for every architecture, stays within its budgets."""

from __future__ import annotations

import os

import pytest
import torch

from peftkern.backends.triton import launch, tiles

from .aot import (
    SHARED_MEMORY,
    attention_launches,
    compile_launch,
    decode_launches,
    embedding_launches,
    packed_prefix_launches,
    table_launches,
)

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton compiles nothing there")
DOTS = {"fwd", "dq", "dkv", "prefix", "bias", "decode_prefix", "decode_sequence"}
MERGE_DOTS = {"prefix_merge_fwd", "prefix_merge_bwd"}
#: Head dims whose kernels may not spill at all. For others ptxas may give up a few registers, in bytes, for a further
#: block on a multiprocessor.
EXACT_HEAD_DIMS, FEW = (64, 128), 48
#: What else spills, in bytes: exact fp32 products, most of all of the widest rows in the smallest tile.
SPILLS = {
    ("dq", 256, torch.float32): 256, ("fwd", 64, torch.float32): 8, ("decode_prefix", 64, torch.float32): 8,
    ("prefix", 128, torch.float32): 8,
}  # fmt: skip
MATRIX_UNIT = {"sm_90": "HGMMA", "sm_100": "UTC.*MMA", "gfx942": "v_mfma", "gfx950": "v_mfma"}


def _table(head_dims, fast, dtype):
    return [
        pytest.param(arch, head_dim, dtype, marks=() if (arch, head_dim) in fast else pytest.mark.slow)
        for arch in tiles.ARCHITECTURES
        for head_dim in head_dims
    ]


def _check_budgets(compiled, head_dim=64, dtype=None):
    assert compiled.shared <= SHARED_MEMORY[compiled.arch], f"more shared memory than a block can have: {compiled}"
    few = 0 if head_dim in EXACT_HEAD_DIMS or compiled.arch.startswith("gfx") else FEW
    allowed = SPILLS.get((compiled.kernel, head_dim, dtype), few)
    assert compiled.spills <= allowed, f"registers spill: {compiled}"


@pytest.mark.parametrize(
    ("arch", "head_dim", "dtype"),
    [
        *_table((32, 64, 80, 96, 128, 192, 256), {("sm_90", 128)}, torch.bfloat16),
        *_table((32, 64, 128, 256), set(), torch.float32),
    ],
    ids=str,
)
def test_every_entry_of_the_table_fits_and_uses_the_tensor_cores(arch, head_dim, dtype):
    compiled = {c.kernel: c for c in (compile_launch(arch, x) for x in table_launches(arch, head_dim, dtype))}
    assert set(compiled) == {*DOTS, "prepare", "sum_partials", "decode_combine"}
    for c in compiled.values():
        _check_budgets(c, head_dim, dtype)
    if dtype == torch.float32:
        return
    for kernel in DOTS:
        c = compiled[kernel]
        assert c.tensor_cores > 0, f"no tensor core instructions: {c}"
        pipelined = c.tile[3] > 1 and not arch.startswith("gfx")
        assert c.async_copies > 0 or not pipelined, f"no asynchronous copies: {c}"
    assert compiled["fwd"].count(MATRIX_UNIT.get(arch, "HMMA")) > 0, str(compiled["fwd"])


#: Head dims of models with compressed keys, q and k before v: those of DeepSeek-V3, and of tiny models for tests.
COMPRESSED = {192: 128, 24: 16}


@pytest.mark.parametrize(
    ("arch", "head_dim", "dtype"),
    [
        *_table(COMPRESSED, {("sm_80", 24)}, torch.bfloat16),
        *_table(COMPRESSED, set(), torch.float32),
    ],
    ids=str,
)
def test_values_of_a_head_dim_of_their_own_fit(arch, head_dim, dtype):
    """Within the budgets of the wider head dim, with the tensor cores' instructions for both."""
    value_dim = COMPRESSED[head_dim]
    launches = [*table_launches(arch, head_dim, dtype, value_dim)]
    launches += attention_launches(arch, head_dim, dtype, prefix_len=16, backend="merge", value_dim=value_dim)
    launches += packed_prefix_launches(arch, head_dim, dtype, value_dim)
    compiled = {c.kernel: c for c in (compile_launch(arch, launch) for launch in launches)}
    assert {*DOTS, *MERGE_DOTS, "decode_combine", "concat_packed_fwd", "split", "merge_states"} <= set(compiled)
    for c in compiled.values():
        _check_budgets(c, 256 if head_dim > 128 else 32, dtype)
        dots = dtype != torch.float32 and c.kernel in {*DOTS, *MERGE_DOTS}
        assert c.tensor_cores > 0 or not dots, f"no tensor core instructions: {c}"


def test_instructions_per_tensor_core_instruction():
    """FlashAttention-2's forward for head dim 64 on sm_80 has 9.0, counted in torch's own library."""
    recorded = attention_launches("sm_80", 64, torch.bfloat16)[0]
    compiled = compile_launch("sm_80", recorded)
    assert compiled.kernel == "fwd"
    assert compiled.instructions.total() <= 9.0 * compiled.count("HMMA"), str(compiled)


@pytest.mark.parametrize(
    ("arch", "head_dim", "dtype"),
    [
        *_table((64, 128, 256), {("sm_90", 128)}, torch.bfloat16),
        *_table((64, 128), set(), torch.float32),
    ],
    ids=str,
)
def test_the_prefixs_own_kernels_fit_and_use_the_tensor_cores(arch, head_dim, dtype):
    """A short prefix takes one pass in each direction, a long one is visited in blocks."""
    short = min(32, tiles.tile(arch, "merge_bwd", head_dim, dtype).BLOCK_N)
    for prefix_len, backward in ((short, {"prefix_merge_bwd"}), (160, {"prepare", "dq", "prefix"})):
        launches = attention_launches(arch, head_dim, dtype, prefix_len=prefix_len, backend="merge")
        compiled = [compile_launch(arch, recorded) for recorded in launches]
        assert {c.kernel for c in compiled} == {"prefix_merge_fwd", "sum_partials", *backward}
        for c in compiled:
            _check_budgets(c, head_dim, dtype)
            dots = dtype != torch.float32 and c.kernel in {*MERGE_DOTS, *DOTS}
            assert c.tensor_cores > 0 or not dots, f"no tensor core instructions: {c}"
            if dots and c.kernel in MERGE_DOTS:
                wide = c.tile[0] >= 64 or arch.startswith("gfx")  # rows that wgmma and tcgen05 need
                assert c.count(MATRIX_UNIT.get(arch, "HMMA") if wide else "HMMA") > 0, str(c)


#: Where decoding converts an fp32 prefix, in bytes: wide rows in few warps.
CONVERSION = 256


@pytest.mark.parametrize(
    ("arch", "head_dim", "dtype"), _table((64, 128, 256), {("sm_86", 128)}, torch.bfloat16), ids=str
)
def test_an_fp32_prefix_fits_too(arch, head_dim, dtype):
    """PEFT keeps an fp32 prefix beside a model in half precision."""
    launches = decode_launches(arch, head_dim, dtype, torch.float32)
    for backend, prefix_len in (("triton", 32), ("merge", 32), ("merge", 160)):
        launches += attention_launches(arch, head_dim, dtype, torch.float32, prefix_len, backend=backend)
    for c in {recorded[0]: compile_launch(arch, recorded) for recorded in launches}.values():
        assert c.shared <= SHARED_MEMORY[arch], f"more shared memory than a block can have: {c}"
        few = 0 if head_dim in EXACT_HEAD_DIMS or arch.startswith("gfx") else FEW
        assert c.spills <= (CONVERSION if c.kernel == "decode_prefix" else few), f"registers spill: {c}"


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_kernels_of_concat_compile(arch):
    compiled = [compile_launch(arch, x) for x in attention_launches(arch, 64, torch.bfloat16, backend="concat")]
    assert {"concat_fwd", "concat_bwd"} <= {c.kernel for c in compiled}
    for c in compiled:
        _check_budgets(c)


@pytest.mark.parametrize(
    ("arch", "head_dim", "dtype"), _table((64, 128, 256), {("sm_80", 64)}, torch.bfloat16), ids=str
)
def test_kernels_of_packed_concatenation_fit(arch, head_dim, dtype):
    compiled = [compile_launch(arch, x) for x in packed_prefix_launches(arch, head_dim, dtype)]
    assert [c.kernel for c in compiled] == ["concat_packed_fwd", "split", "concat_bwd", "merge_states"]
    for c in compiled:
        _check_budgets(c, head_dim, dtype)


OPTIONS = {
    "key_mask": {"key_mask": torch.ones(2, 64, dtype=torch.bool)},
    "window": {"window": 32, "softcap": 30.0},
    "bias": {
        "bias": torch.zeros(1, 4, 64, 64, requires_grad=True), "prefix_bias": torch.zeros(4, 32, requires_grad=True)
    },
    "gate": {"gate": torch.zeros(4, requires_grad=True), "sinks": torch.zeros(4, requires_grad=True)},
    "dropout": {"dropout_p": 0.1, "dropout_seed": 1},
    "negative scale": {"scale": -0.125},
    "ragged bank": {
        "bank": (3,), "prefix_ids": torch.zeros(2, dtype=torch.int64), "prefix_lens": torch.ones(3, dtype=torch.int64)
    },
    "packed bank": {
        "batch": 1, "bank": (3,), "prefix_ids": torch.zeros(2, dtype=torch.int32), "window": 32,
        "cu_seqlens": torch.tensor([0, 20, 64], dtype=torch.int32),
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIONS)
def test_options_compile(name):
    """Options cost registers, so spills are allowed here. Each option must compile."""
    arch = "sm_80"
    for recorded in attention_launches(arch, 64, torch.bfloat16, torch.float32, **OPTIONS[name]):
        assert compile_launch(arch, recorded).shared <= SHARED_MEMORY[arch]


DECODE_OPTIONS = {
    "key_mask": {"key_mask": torch.ones(16, 2048, dtype=torch.bool)},
    "window": {"window": 512, "softcap": 30.0, "sinks": torch.zeros(8)},
    "ragged bank": {
        "bank": (3,), "prefix_ids": torch.zeros(16, dtype=torch.int32), "prefix_lens": torch.full((3,), 9)
    },
    "gate": {"gate": torch.zeros(8), "bias": torch.zeros(1, 1, 1, 2048), "prefix_bias": torch.zeros(8, 1)},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", DECODE_OPTIONS)
def test_decoding_options_compile(name):
    for recorded in decode_launches("sm_80", 64, torch.bfloat16, torch.float32, **DECODE_OPTIONS[name]):
        assert compile_launch("sm_80", recorded).shared <= SHARED_MEMORY["sm_80"]


@pytest.mark.parametrize("arch", ["sm_80", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_embedding_compiles(arch):
    launches = embedding_launches(arch)
    assert len(launches) == 2
    for recorded in launches:
        _check_budgets(compile_launch(arch, recorded))


def test_a_tile_too_large_for_the_registers_is_noticed(monkeypatch):
    """The budgets can fail."""
    monkeypatch.setattr(launch, "tile", lambda *_: tiles.Tile(64, 64, 4, 2))
    recorded = next(x for x in attention_launches("sm_80", 128, torch.bfloat16) if "prefix_kernel" in x[0].__name__)
    with pytest.raises(AssertionError, match="registers spill"):
        _check_budgets(compile_launch("sm_80", recorded))
