# SPDX-License-Identifier: Apache-2.0
"""How large a block each kernel takes on each GPU: a fixed table, no tuning when it runs.

The entries compile with the tensor cores' instructions and, on NVIDIA, with asynchronous copies where num_stages > 1;
for head dims 64 and 128 without spills (16 bytes in fp32), for others with at most 48 bytes, fp32 dq at 256 with 256
(``python -m tests.gpu_free.report`` prints the figures). They were chosen from that, not from measurements;
:mod:`.autotune` measures, for those who ask for it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch

Direction = Literal[
    "forward", "dq", "dkv", "prefix", "bias", "decode", "merge", "merge_long", "merge_bwd"
]  # fmt: skip


class Tile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys, by ``num_warps`` warps, with loads ``num_stages - 1`` blocks ahead."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


INTERPRETER = "interpreter"
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
MAX_HEAD_DIM = 256

DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
_FUSED_DIRECTIONS, _MERGE_DIRECTIONS = DIRECTIONS[:6], DIRECTIONS[6:]

# family -> largest head dim of the row -> tiles in the order of _FUSED_DIRECTIONS, for fp16 and bf16
_HALF: dict[str, dict[int, tuple[tuple[int, int, int, int], ...]]] = {
    "sm_80": {
        64: ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 32, 4, 1), (64, 64, 4, 3)),
        128: ((128, 64, 8, 3), (128, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 4, 1), (64, 64, 4, 3)),
        256: ((64, 32, 8, 2), (64, 32, 8, 2), (32, 64, 8, 2), (32, 64, 8, 2), (16, 16, 4, 1), (32, 32, 4, 2)),
    },
    "99 KB": {  # of shared memory for a block, with the instructions of sm_80
        64: ((128, 64, 8, 2), (128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 4, 1), (64, 64, 4, 2)),
        128: ((128, 64, 8, 3), (128, 32, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (32, 32, 4, 1), (64, 64, 4, 2)),
        256: ((64, 32, 8, 2), (64, 16, 8, 2), (32, 32, 4, 2), (32, 32, 8, 1), (16, 16, 4, 1), (32, 32, 4, 2)),
    },
    "sm_90": {
        64: ((128, 64, 4, 3), (128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (64, 64, 4, 3)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (64, 64, 4, 3)),
        256: ((64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 1), (16, 16, 4, 1), (32, 32, 4, 2)),
    },
    "sm_100": {
        64: ((128, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (64, 64, 4, 3)),
        128: ((128, 64, 8, 3), (128, 64, 8, 2), (64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (64, 64, 4, 3)),
        256: ((64, 32, 8, 2), (128, 32, 8, 2), (64, 64, 8, 1), (64, 64, 8, 1), (16, 16, 4, 1), (32, 32, 4, 2)),
    },
    "gfx94": {
        64: ((128, 64, 4, 2), (128, 32, 8, 2), (64, 64, 4, 2), (64, 64, 4, 2), (64, 64, 8, 1), (64, 64, 4, 2)),
        128: ((128, 32, 8, 2), (64, 32, 4, 2), (32, 64, 4, 2), (32, 64, 4, 2), (64, 64, 8, 1), (64, 32, 4, 2)),
        256: ((64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    },
}  # fmt: skip

# the same for the kernels of the prefix part alone: up to BLOCK_N tokens stay on chip, except in "merge_long"
_MERGE_HALF: dict[str, dict[int, tuple[tuple[int, int, int, int], ...]]] = {
    "sm_80": {
        64: ((64, 128, 4, 2), (64, 64, 8, 2), (32, 128, 4, 1)),
        128: ((64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
        256: ((64, 64, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    },
    "99 KB": {
        64: ((64, 128, 4, 2), (64, 64, 8, 2), (32, 128, 4, 1)),
        128: ((64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1)),
        256: ((64, 64, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    },
    "sm_90": {
        64: ((128, 128, 8, 2), (64, 64, 8, 2), (64, 128, 8, 1)),
        128: ((64, 128, 8, 2), (64, 32, 4, 2), (64, 64, 8, 1)),
        256: ((32, 64, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    },
    "sm_100": {
        64: ((128, 128, 8, 2), (64, 64, 8, 2), (64, 128, 8, 1)),
        128: ((64, 128, 8, 2), (64, 64, 8, 2), (64, 128, 8, 1)),
        256: ((64, 64, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    },
    "gfx94": {
        64: ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 1)),
        128: ((64, 64, 4, 2), (64, 32, 4, 1), (64, 32, 4, 1)),
        256: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    },
}  # fmt: skip
_FAMILIES = {"sm_86": "99 KB", "sm_89": "99 KB", "sm_120": "99 KB", "gfx942": "gfx94", "gfx950": "gfx94"}

# fp32 products are exact (no TF32), on NVIDIA without tensor cores: what counts is that accumulators fit registers
_FLOAT = {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)}
_FLOAT_MERGE = {**_FLOAT, 64: Tile(16, 32, 8, 1)}
_FLOAT_OF: dict[Direction, dict[int, Tile]] = {
    "dq": {**_FLOAT, 128: Tile(16, 16, 8, 1)}, "bias": dict.fromkeys(_FLOAT, Tile(16, 16, 8, 1)),
    "merge": _FLOAT_MERGE, "merge_long": _FLOAT_MERGE,
}  # fmt: skip
_FLOAT_AMD = {64: Tile(32, 32, 4, 1), 128: Tile(32, 16, 4, 1), 256: Tile(16, 16, 4, 1)}


def tile(arch: str, direction: Direction, head_dim: int, dtype: torch.dtype) -> Tile:
    """The block of one kernel, a function of its arguments alone; for decoding BLOCK_M is the most it may be.

    >>> tile("sm_90", "forward", 80, torch.bfloat16)
    Tile(BLOCK_M=128, BLOCK_N=64, num_warps=8, num_stages=3)
    """
    if arch == INTERPRETER:
        return Tile(32, 128 if direction in ("merge", "merge_bwd") else 16, 1, 1)
    row = next(size for size in (64, 128, 256) if head_dim <= size)
    if dtype == torch.float32:
        if arch.startswith("gfx"):
            return _FLOAT_AMD[row]
        return _FLOAT_OF.get(direction, _FLOAT)[row]
    table, directions = _HALF, _FUSED_DIRECTIONS
    if direction in _MERGE_DIRECTIONS:
        table, directions = _MERGE_HALF, _MERGE_DIRECTIONS
    return Tile(*table[_FAMILIES.get(arch, arch)][row][directions.index(direction)])


def candidates(start: Tile) -> list[Tile]:
    """``start`` and what is one step away from it: half or twice a block, other warps, a stage more or less.

    >>> [tuple(c) for c in candidates(Tile(16, 128, 4, 1))]
    [(16, 128, 4, 1), (32, 128, 4, 1), (16, 64, 4, 1), (16, 128, 8, 1), (16, 128, 4, 2)]
    """
    m, n, warps, stages = start
    blocks = [(m // 2, n), (2 * m, n), (m, n // 2), (m, 2 * n)]
    steps = [Tile(*block, warps, stages) for block in blocks if min(block) >= 16 and max(block) <= 128]
    steps.append(start._replace(num_warps=8 if warps == 4 else 4))
    return [start, *steps, *(start._replace(num_stages=s) for s in (stages - 1, stages + 1) if 1 <= s <= 4)]


def cuda_architecture(major: int, minor: int) -> str:
    """The newest architecture of the table that is no newer than a compute capability; else the capability itself.

    >>> cuda_architecture(8, 7), cuda_architecture(10, 3), cuda_architecture(7, 5)
    ('sm_86', 'sm_100', 'sm_75')
    """
    capability = 10 * major + minor
    older = [int(arch[3:]) for arch in ARCHITECTURES if arch.startswith("sm_") and int(arch[3:]) <= capability]
    return f"sm_{max(older, default=capability)}"
