# SPDX-License-Identifier: Apache-2.0
"""The block sizes of each kernel on each GPU: a fixed table. Nothing is tuned at run time.

Every entry compiles to the tensor cores' instructions and, on NVIDIA with num_stages > 1, to asynchronous copies. For
head dims 64 and 128 nothing spills (fp32: 16 bytes); for others at most 48 bytes do, for fp32 dq at 256 at most 256
(``python -m tests.gpu_free.report`` prints the figures). The entries were chosen by these figures, not by
measurements. :mod:`.autotune` measures on request.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, get_args

import torch

Direction = Literal[
    "forward", "dq", "dkv", "prefix", "bias", "decode", "merge", "merge_long", "merge_bwd"
]  # fmt: skip


class Tile(NamedTuple):
    """BLOCK_M queries by BLOCK_N keys, computed by ``num_warps`` warps that load ``num_stages - 1`` blocks ahead."""

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
    "99 KB": {  # the instructions of sm_80, but at most 99 KB of shared memory per block
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

# the same for the kernels of the prefix alone, which keep up to BLOCK_N tokens on chip, except "merge_long"
_MERGE_HALF: dict[str, dict[int, tuple[tuple[int, int, int, int], ...]]] = {
    "sm_80": {
        64: ((64, 128, 4, 2), (64, 64, 8, 2), (16, 128, 4, 1)),
        128: ((64, 128, 8, 2), (64, 64, 8, 2), (32, 64, 8, 1)),
        256: ((64, 64, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    },
    "99 KB": {
        64: ((64, 128, 4, 2), (64, 64, 8, 2), (32, 128, 8, 1)),
        128: ((64, 128, 8, 1), (64, 64, 8, 2), (32, 64, 8, 1)),
        256: ((64, 64, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    },
    "sm_90": {
        64: ((128, 128, 8, 2), (64, 64, 8, 2), (32, 128, 8, 1)),
        128: ((64, 128, 8, 2), (32, 32, 4, 2), (32, 64, 8, 1)),
        256: ((32, 64, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    },
    "sm_100": {
        64: ((128, 128, 8, 2), (64, 64, 8, 2), (64, 128, 8, 1)),
        128: ((64, 128, 8, 2), (32, 32, 4, 2), (64, 128, 8, 1)),
        256: ((64, 64, 8, 1), (32, 32, 8, 1), (32, 32, 8, 1)),
    },
    "gfx94": {
        64: ((64, 64, 4, 2), (64, 64, 4, 2), (32, 64, 4, 1)),
        128: ((64, 64, 4, 2), (64, 32, 4, 1), (64, 32, 4, 1)),
        256: ((32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 4, 1)),
    },
}  # fmt: skip
_FAMILIES = {"sm_86": "99 KB", "sm_89": "99 KB", "sm_120": "99 KB", "gfx942": "gfx94", "gfx950": "gfx94"}

# fp32 products are exact (no TF32), so on NVIDIA they use no tensor cores; blocks are small enough that accumulators
# fit the registers
_FLOAT = {64: Tile(32, 32, 8, 1), 128: Tile(32, 16, 8, 1), 256: Tile(16, 16, 8, 1)}
_FLOAT_MERGE = {**_FLOAT, 64: Tile(16, 32, 8, 1)}
_FLOAT_OF: dict[Direction, dict[int, Tile]] = {
    "dq": {**_FLOAT, 128: Tile(16, 16, 8, 1)}, "bias": dict.fromkeys(_FLOAT, Tile(16, 16, 8, 1)),
    "merge": _FLOAT_MERGE, "merge_long": _FLOAT_MERGE, "merge_bwd": {**_FLOAT_MERGE, 128: Tile(16, 16, 8, 1)},
}  # fmt: skip
_FLOAT_AMD = {64: Tile(32, 32, 4, 1), 128: Tile(32, 16, 4, 1), 256: Tile(16, 16, 4, 1)}


@functools.lru_cache(maxsize=1024)
def tile(arch: str, direction: Direction, head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile of one kernel, a function of the arguments alone. For decoding, BLOCK_M is an upper limit.

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
    """``start`` and its neighbours: half or twice one block size, other warps, or one stage more or less.

    >>> [tuple(c) for c in candidates(Tile(16, 128, 4, 1))]
    [(16, 128, 4, 1), (32, 128, 4, 1), (16, 64, 4, 1), (16, 128, 8, 1), (16, 128, 4, 2)]
    """
    m, n, warps, stages = start
    blocks = [(m // 2, n), (2 * m, n), (m, n // 2), (m, 2 * n)]
    steps = [Tile(*block, warps, stages) for block in blocks if min(block) >= 16 and max(block) <= 128]
    steps.append(start._replace(num_warps=8 if warps == 4 else 4))
    return [start, *steps, *(start._replace(num_stages=s) for s in (stages - 1, stages + 1) if 1 <= s <= 4)]


def cuda_architecture(major: int, minor: int) -> str:
    """The newest architecture of the table that is not newer than a compute capability; if none, the capability.

    >>> cuda_architecture(8, 7), cuda_architecture(10, 3), cuda_architecture(7, 5)
    ('sm_86', 'sm_100', 'sm_75')
    """
    capability = 10 * major + minor
    older = [int(arch[3:]) for arch in ARCHITECTURES if arch.startswith("sm_") and int(arch[3:]) <= capability]
    return f"sm_{max(older, default=capability)}"
