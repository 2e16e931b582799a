# SPDX-License-Identifier: Apache-2.0
"""Launches of the attention kernels: grids, splits, workspaces. Each function launches one step of a call."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...arguments import AttentionGradients
from .arguments import Matrices, Stats, dense
from .launch import LOG2E, WIDTH, LaunchContext, num_blocks
from .tiles import Tile

#: Blocks of keys in a split, at least.
_SPLIT_BLOCKS = 2


def forward(context: LaunchContext, out: Tensor, lse: Tensor) -> None:
    """Fill in out and lse by one kernel over prefix and sequence."""
    from .kernels.forward import _prefix_attention_fwd_kernel

    context.launch(
        _prefix_attention_fwd_kernel, "forward", context.row_programs("forward"),
        context.q, context.k, context.v, *context.prefix, Matrices.of(out), lse, context.options,
        *context.kernel_sizes, context.scale,
    )  # fmt: skip


class _Splits(NamedTuple):
    """How many programs attend to one run of keys, which is cut into ``number`` splits of ``size`` tokens."""

    tile: Tile
    programs: int
    number: int
    size: int


def _split(context: LaunchContext, tokens: int, rows: int, samples: int) -> _Splits:
    """Splits of ``tokens`` keys, enough to occupy the device; ``rows`` per key head and sample attend to them."""
    block = context.tile("decode")
    block = block._replace(BLOCK_M=min(block.BLOCK_M, max(16, 1 << (rows - 1).bit_length())))
    per_split = num_blocks(rows, block.BLOCK_M) * context.kv_heads * samples
    wanted = num_blocks(2 * context.processors, max(1, per_split))
    blocks = max(num_blocks(num_blocks(tokens, block.BLOCK_N), wanted), _SPLIT_BLOCKS)
    number = num_blocks(tokens, blocks * block.BLOCK_N)
    return _Splits(block, per_split * number, number, blocks * block.BLOCK_N)


def decode(context: LaunchContext, out: Tensor, lse: Tensor) -> None:
    """Fill in out and lse: one softmax per split of the prefix and of each sample's keys, then their merge."""
    from .kernels import decode as kernels

    sizes, options, flags = context.sizes, context.options, context.flags
    rows = sizes.group * sizes.q_len
    prefix = _split(context, sizes.prefix_len, rows * sizes.batch, 1)
    sequence = _split(context, sizes.kv_len, rows, sizes.batch)
    splits = prefix.number + sequence.number
    partial = lse.new_empty(splits, *lse.shape, flags.VALUE_DIM)
    partial_lse = lse.new_empty(splits, *lse.shape)
    context.launch(
        kernels._prefix_attention_decode_prefix_kernel, prefix.tile, prefix.programs,
        context.q, *context.prefix, partial, partial_lse, options, *context.kernel_sizes, context.scale,
        prefix.number, prefix.size,
    )  # fmt: skip
    context.launch(
        kernels._prefix_attention_decode_sequence_kernel, sequence.tile, sequence.programs,
        context.q, context.k, context.v, partial, partial_lse, options, *context.kernel_sizes, context.scale,
        prefix.number, sequence.number, sequence.size,
    )  # fmt: skip
    context.launch_untiled(
        kernels._prefix_attention_decode_combine_kernel, lse.numel(),
        partial, partial_lse, Matrices.of(out), lse, options, *context.kernel_sizes, prefix.number, splits,
        VALUE_DIM=flags.VALUE_DIM, BLOCK_DV=flags.BLOCK_DV, BLOCK_N=16,
    )  # fmt: skip


def row_statistics(
    context: LaunchContext, out: Matrices | None, dout: Matrices, lse: Tensor, dlse: Tensor | None, gated: bool
) -> Stats:
    """What the backward needs of each row. ``out`` None: the softmax is computed once more instead of rounded out."""
    from .kernels.backward import _prefix_attention_bwd_prepare_kernel

    per_row = [lse.new_empty(lse.shape) for _ in range(4 if gated else 2)]
    stats = Stats(per_row[0], per_row[1], *(per_row[2:] or (None, None)))
    context.launch(
        _prefix_attention_bwd_prepare_kernel, "forward", context.row_programs("forward"),
        context.q, context.k, context.v, *context.prefix, out, dout, lse.contiguous(), dense(dlse), stats,
        context.options, *context.kernel_sizes, context.scale,
    )  # fmt: skip
    return stats


def query_gradient(
    context: LaunchContext, dout: Matrices, stats: Stats, dq: Matrices, part_dq: Matrices | None = None,
    prefix_only: bool = False,
) -> None:  # fmt: skip
    """Fill in dq; with ``prefix_only``, dq = ``part_dq`` + the prefix's part."""
    from .kernels.backward import _prefix_attention_bwd_dq_kernel

    k, v = (None, None) if prefix_only else (context.k, context.v)
    context.launch(
        _prefix_attention_bwd_dq_kernel, "dq", context.row_programs("dq"),
        context.q, k, v, *context.prefix, dout, part_dq, dq, stats, context.options, *context.kernel_sizes,
        context.scale,
    )  # fmt: skip


def key_gradients(context: LaunchContext, dout: Matrices, stats: Stats, dk: Tensor, dv: Tensor) -> None:
    """Fill in dk and dv, of which one may be empty."""
    from .kernels.backward import _prefix_attention_bwd_dkv_kernel

    blocks = num_blocks(context.sizes.kv_len, context.tile("dkv").BLOCK_N)
    context.launch(
        _prefix_attention_bwd_dkv_kernel, "dkv", blocks * context.kv_heads * context.sizes.batch,
        context.q, context.k, context.v, dout, *(Matrices.of(x) if x.numel() else None for x in (dk, dv)),
        stats, context.options, *context.kernel_sizes, context.scale,
    )  # fmt: skip


def prefix_gradients(context: LaunchContext, dout: Matrices, stats: Stats, gradients: AttentionGradients) -> None:
    """Fill in dprefix_k, dprefix_v and dprefix_bias.

    Partial sums over splits of the rows, then their sum in order. The sizes and the device alone fix the splits.
    """
    from .kernels.backward import _prefix_attention_bwd_prefix_kernel

    sizes, flags, block = context.sizes, context.flags, context.tile("prefix")
    row_blocks = num_blocks(sizes.q_len, block.BLOCK_M) * sizes.batch
    matrices = context.bank * sizes.num_heads
    tiles = num_blocks(sizes.prefix_len, block.BLOCK_N) * matrices
    splits = max(1, min(row_blocks, num_blocks(2 * context.processors, max(1, tiles))))
    shape = (splits, context.bank, sizes.num_heads, sizes.prefix_len)
    dk, dv = (stats.lse.new_empty(*shape, dim) for dim in (flags.HEAD_DIM, flags.VALUE_DIM))
    dbias = stats.lse.new_empty(shape) if gradients.dprefix_bias.numel() else None
    context.launch(
        _prefix_attention_bwd_prefix_kernel, "prefix", tiles * splits,
        context.q, *context.prefix, dout, dk, dv, dbias, stats, context.options, *context.kernel_sizes, context.scale,
        context.bank, row_blocks, num_blocks(row_blocks, splits),
    )  # fmt: skip
    for partial, total in ((dk, gradients.dprefix_k), (dv, gradients.dprefix_v)):
        inner = sizes.prefix_len * partial.shape[-1]
        sum_partials(context, partial, total, splits, matrices * inner, sizes.group, inner)
    if dbias is not None:
        gradients.dprefix_bias.copy_(dbias.sum((0, 1)).sum_to_size(gradients.dprefix_bias.shape))


def sum_partials(
    context: LaunchContext, partial: Tensor, total: Tensor, splits: int, split_size: int, group: int, inner: int
) -> None:
    """total [outer, inner] = sum in order over splits and query heads of partial [splits, outer, group, inner]."""
    from .kernels.backward import _sum_partials_kernel

    context.launch_untiled(
        _sum_partials_kernel, num_blocks(total.numel(), WIDTH),
        partial, total, splits, split_size, group, inner, total.numel(), BLOCK=WIDTH,
    )  # fmt: skip


def bias_gradient(context: LaunchContext, dout: Matrices, stats: Stats, dbias: Tensor) -> None:
    """Fill in dbias, shaped like the bias: summed over the dims along which it is broadcast."""
    from .kernels.backward import _prefix_attention_bwd_bias_kernel

    block_m, block_n = context.tile("bias")[:2]
    entries, heads, rows, keys = dbias.shape
    context.launch(
        _prefix_attention_bwd_bias_kernel, "bias",
        num_blocks(rows, block_m) * num_blocks(keys, block_n) * heads * entries,
        context.q, context.k, context.v, dout, dbias, stats, context.options, *context.kernel_sizes,
        context.scale, entries, heads, rows, keys,
    )  # fmt: skip


def sink_gradient(sinks: Tensor, stats: Stats, dsinks: Tensor) -> None:
    """Fill in dsinks [Hq]. A sink is a key without a value: its dp is 0, so its ds is -p * delta."""
    weights = torch.exp2(sinks[:, None] * LOG2E - stats.lse).masked_fill(sinks[:, None] == torch.inf, 0.0)
    torch.sum(weights * stats.neg_delta, (0, 2), out=dsinks)


def gate_gradient(gate: Tensor, stats: Stats, dgate: Tensor) -> None:
    """Fill in dgate [Hq]: the sum of the rows' ``prefix_neg_delta``, times minus the derivative of tanh."""
    assert stats.prefix_neg_delta is not None
    factor = torch.tanh(gate)
    torch.mul(stats.prefix_neg_delta.sum((0, 2)), factor * factor - 1, out=dgate)
