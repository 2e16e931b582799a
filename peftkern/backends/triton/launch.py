# SPDX-License-Identifier: Apache-2.0
"""From the arguments of a call to the launch of a kernel: tuples, tiles, grid, device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from ...arguments import AttentionArgs
from . import autotune
from .arguments import Matrices, flags_of, options_of, sizes_of
from .device import INTERPRETED, architecture, processors
from .tiles import Direction, Tile, tile

#: A call decodes if it has at most this many queries and at least this many keys, prefix included. Only then are
#: there so few blocks of rows, and so many keys, that splitting the keys pays for two extra launches.
DECODE_QUERIES, DECODE_KEYS = 16, 1024
#: Elements per program of an elementwise kernel.
WIDTH = 1024
LOG2E = 1.4426950408889634


def decodes(q_len: int, num_keys: int) -> bool:
    """Whether a call of these sizes, without dropout and packed sequences, takes the kernels for decoding."""
    return 1 <= q_len <= DECODE_QUERIES and num_keys >= DECODE_KEYS


def num_blocks(length: int, block: int) -> int:
    """The number of blocks that cover ``length``."""
    return -(-length // block)


def launch_kernel(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any
) -> None:
    """Launch ``kernel`` on ``device``, unless the grid is empty."""
    if all(grid):
        if INTERPRETED:
            from .interpreter import repair

            repair()
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            kernel[grid](*arguments, **constants)


class LaunchContext:
    """One call as its kernels take it."""

    def __init__(self, args: AttentionArgs) -> None:
        self.device, self.dtype = args.q.device, args.q.dtype
        self.q, self.k, self.v = (Matrices.of(x) for x in (args.q, args.k, args.v))
        #: prefix_k and prefix_v.
        self.prefix = Matrices.of(args.prefix_k), Matrices.of(args.prefix_v)
        #: The number of prefixes.
        self.bank = args.prefix_k.shape[0] if args.prefix_k.dim() == 4 else 1
        self.sizes, self.options, self.flags = sizes_of(args), options_of(args), flags_of(args)
        #: The sizes as the kernels take them.
        self.kernel_sizes = self.sizes.for_kernels()
        self.scale, self.arch = args.scale, architecture(args.q.device)
        self.kv_heads = self.sizes.num_heads // self.sizes.group
        self._tiles: dict[Direction, Tile] = {}

    @property
    def processors(self) -> int:
        """The number of multiprocessors of the device."""
        return processors(self.device)

    @property
    def decodes(self) -> bool:
        """Whether the kernels for decoding take this call."""
        plain = self.options.cu_seqlens is None and self.options.seed is None
        return plain and decodes(self.sizes.q_len, self.sizes.prefix_len + self.sizes.kv_len)

    def round_prefix(self) -> None:
        """Round a prefix wider than q to q's dtype, once.

        Otherwise each block of rows would read and round it again, in tiles that are too large for the wider dtype.
        """
        if self.prefix[0].ptr.dtype.itemsize > self.dtype.itemsize:
            prefix_k, prefix_v = (Matrices.of(x.ptr.to(self.dtype)) for x in self.prefix)
            self.prefix = prefix_k, prefix_v

    def tile(self, direction: Direction) -> Tile:
        """The tile of one kernel: the table's, or the tuned one. It stays the same throughout the call."""
        if direction not in self._tiles:
            block = self._table_tile(direction)
            if autotune.requested():
                block = autotune.chosen(direction, self._kind(direction), block)
            self._tiles[direction] = block
        return self._tiles[direction]

    def _table_tile(self, direction: Direction) -> Tile:
        return tile(self.arch, direction, max(self.flags.HEAD_DIM, self.flags.VALUE_DIM), self.dtype)

    def _kind(self, direction: Direction) -> str:
        """The key of all calls that share a tuned tile."""
        sizes, flags = self.sizes, self.flags
        dims = {"D": flags.HEAD_DIM} | ({} if flags.VALUE_DIM == flags.HEAD_DIM else {"Dv": flags.VALUE_DIM})
        tokens = dims | {"S": sizes.q_len, "T": sizes.kv_len, "P": sizes.prefix_len}
        options = [name for name, value in self.options._asdict().items() if value is not None]
        options += ["causal"] * self.flags.IS_CAUSAL + ["fp32_prefix"] * (self.prefix[0].ptr.dtype != self.dtype)
        tokens["H"] = sizes.batch * sizes.num_heads
        return autotune.key(self.arch, direction, self.dtype, tokens, tuple(options))

    def tune(self, direction: Direction, run: Callable[[], object]) -> None:
        """Time ``run`` with several tiles if PEFTKERN_AUTOTUNE=1 and this kind of call has no tuned tile yet."""
        if autotune.enabled() and all(self.q.ptr.shape):
            autotune.tune(direction, self._kind(direction), self._table_tile(direction), run)

    def row_programs(self, direction: Direction) -> int:
        """The number of programs of a kernel that runs one per block of rows, head and batch entry."""
        sizes = self.sizes
        return num_blocks(sizes.q_len, self.tile(direction).BLOCK_M) * sizes.num_heads * sizes.batch

    def launch(self, kernel: Any, block: Direction | Tile, programs: int, *arguments: Any, **constants: Any) -> None:
        """Launch ``kernel`` with a tile, and with those of the call's compile-time constants that it takes."""
        flags = {name: value for name, value in self.flags._asdict().items() if name in kernel.arg_names}
        block = block if isinstance(block, Tile) else self.tile(block)
        self.launch_untiled(kernel, programs, *arguments, **constants, **flags, **block._asdict())

    def launch_untiled(self, kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
        """Launch ``kernel`` with these arguments alone."""
        launch_kernel(kernel, (programs,), self.device, *arguments, **constants)
