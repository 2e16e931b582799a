# SPDX-License-Identifier: Apache-2.0
"""Concatenates prefix and keys for an attention kernel without a prefix argument; sums the prefix's gradient."""

import triton
import triton.language as tl

from .blocks import load_tile, locate, matrix, prefix_of, store_tile


@triton.jit
def _concat_half(source, prefix_source, target, first, prefix, batch, kv_head, sizes, HEAD_DIM: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Copy BLOCK_N keys of [prefix | source] from ``first`` on to target. Prefix -1 is a prefix of zeros."""
    length = sizes.prefix_len + sizes.kv_len
    used = tl.where(prefix < 0, 0, sizes.prefix_len)  # FAULT: concat-prefix-length
    prefix_ptr = matrix(prefix_source, tl.maximum(prefix, 0), kv_head)
    tile = load_tile(prefix_ptr, prefix_source.stride_n, first, used, HEAD_DIM, BLOCK_N, BLOCK_D)
    if first + BLOCK_N > sizes.prefix_len:
        rows = first - sizes.prefix_len + tl.arange(0, BLOCK_N)[:, None]  # FAULT: concat-first-row
        columns = tl.arange(0, BLOCK_D)[None, :]
        ptrs = matrix(source, batch, kv_head) + rows.to(tl.int64) * source.stride_n + columns
        inside = (rows >= 0) & (rows < sizes.kv_len) & (columns < HEAD_DIM)  # FAULT: concat-last-row
        tile = tl.where(rows >= 0, tl.load(ptrs, mask=inside, other=0.0).to(tile.dtype), tile)
    store_tile(matrix(target, batch, kv_head), target.stride_n, first, length, tile, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit
def _concat_fwd_kernel(
    k, v, prefix_k, prefix_v, joined_k, joined_v, opts, sizes,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """joined_k, joined_v [B, Hkv, P + T, D] = [prefix | k], [prefix | v]; the prefix is rounded to their dtype."""
    blocks = tl.cdiv(sizes.prefix_len + sizes.kv_len, BLOCK_N)
    block, kv_head, batch = locate(blocks, sizes.num_heads // sizes.group)
    prefix = prefix_of(batch, opts)
    first = block * BLOCK_N
    _concat_half(k, prefix_k, joined_k, first, prefix, batch, kv_head, sizes, HEAD_DIM, BLOCK_D, BLOCK_N)
    _concat_half(v, prefix_v, joined_v, first, prefix, batch, kv_head, sizes, HEAD_DIM, BLOCK_D, BLOCK_N)


@triton.jit
def _concat_bwd_kernel(
    djoined, total_ptr, opts, sizes, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """total [A, Hkv, P, D] fp32: each prefix's part of djoined [B, Hkv, P + T, D], summed over the batch in order."""
    num_kv_heads = sizes.num_heads // sizes.group
    block, kv_head, prefix = locate(tl.cdiv(sizes.prefix_len, BLOCK_N), num_kv_heads)
    first = block * BLOCK_N
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for batch in range(sizes.batch):  # FAULT: concat-bwd-first-sample
        if prefix_of(batch, opts) == prefix:  # FAULT: concat-bwd-prefix
            ptr = matrix(djoined, batch, kv_head)
            total += load_tile(ptr, djoined.stride_n, first, sizes.prefix_len, HEAD_DIM, BLOCK_N, BLOCK_D)
    matrix_index = tl.cast(prefix, tl.int64) * num_kv_heads + kv_head  # FAULT: concat-bwd-head
    ptr = total_ptr + matrix_index * sizes.prefix_len * HEAD_DIM
    store_tile(ptr, HEAD_DIM, first, sizes.prefix_len, total, HEAD_DIM, BLOCK_N, BLOCK_D)
