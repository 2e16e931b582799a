# SPDX-License-Identifier: Apache-2.0
"""Backward of the prefix alone, for a short prefix: all its gradients in one pass over the rows.

With the merged out and lse of a row, the formulas of :mod:`.backward` hold for the prefix's keys alone: the rest of
the softmax enters only through lse and delta = rowsum(out * dout).
"""

import triton
import triton.language as tl

from .blocks import (
    LOG2E,
    VARYING,
    RowBlock,
    all_sizes,
    load_out_tile,
    load_prefix_tile,
    load_query_tile,
    prefix_scores,
    row_offset,
    store_query_tile,
    store_tile,
)
from .prefix_forward import locate_tile


@triton.jit
def _one_tile(q, k_tile, v_tile, out, dout, lse_ptr, part_dq, dq, dk, dv, block):
    """dk [BLOCK_N, D], dv [BLOCK_N, D_v] with one tile of rows added, dk without scale; the tile's dq is stored."""
    sizes = block.sizes
    rows = block.first_row + tl.arange(0, block.BLOCK_M)
    inside = rows < sizes.q_len
    q_tile, dout_tile, out_tile = load_query_tile(q, block), load_out_tile(dout, block), load_out_tile(out, block)
    neg_delta = -tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    lse_row = lse_ptr + row_offset(block.batch, block.head, sizes)
    lse = tl.load(lse_row + rows, mask=inside, other=float("inf")) * LOG2E
    lse = tl.where(lse == -float("inf"), float("inf"), lse)

    products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    tokens = tl.arange(0, block.BLOCK_N)[None, :]
    scores, unit, slope = prefix_scores(products, rows[:, None], tokens, None, sizes.prefix_len, block, True)
    p = tl.exp2(scores * unit - lse[:, None])
    dv = tl.dot(tl.trans(p.to(q_tile.dtype)), dout_tile, dv, input_precision="ieee")
    dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
    ds = (p * (dp + neg_delta[:, None]) * slope).to(q_tile.dtype)  # FAULT: merge-bwd-delta
    dk = tl.dot(tl.trans(ds), q_tile, dk, input_precision="ieee")
    if dq is not None:
        total = tl.dot(ds, k_tile, input_precision="ieee") * block.scale
        if part_dq is not None:
            total += load_query_tile(part_dq, block)  # FAULT: merge-bwd-part-dq
        store_query_tile(dq, total, block)
    return dk, dv


@triton.jit(do_not_specialize=[*VARYING, "row_start", "splits", "tiles_per_split"])
def _prefix_merge_bwd_kernel(
    q, prefix_k, prefix_v, out, dout, lse_ptr, part_dq, dq, dk_ptr, dv_ptr, opts, model, batch_size, q_len, kv_len,
    num_sequences, search_steps, mask_stride, scale, row_start, splits, tiles_per_split,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq [B, Hq, S, D] = part_dq + the prefix's part; fp32 partial sums of dprefix_k [splits, Hkv, P, D], dprefix_v.

    A program has one key head, whose prefix fits BLOCK_N, and one of ``splits`` equal runs of tiles of rows.
    ``part_dq`` is the sequence's part, None if there is none, and may be dq itself. ``dq`` None: it is not needed.
    Rows before ``row_start`` do not see the prefix; their dq is left as it is.
    """
    sizes = all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride)
    split, kv_head = tl.program_id(0) % splits, tl.program_id(0) // splits
    dtype = q.ptr.dtype.element_ty
    k_tile = load_prefix_tile(prefix_k, 0, kv_head, 0, sizes.prefix_len, dtype, HEAD_DIM, BLOCK_N, BLOCK_D)
    v_tile = load_prefix_tile(prefix_v, 0, kv_head, 0, sizes.prefix_len, dtype, VALUE_DIM, BLOCK_N, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    row_blocks = tl.cdiv(sizes.q_len - row_start, BLOCK_M)
    first = split * tiles_per_split  # FAULT: merge-bwd-first-tile
    tiles = row_blocks * sizes.group * sizes.batch
    last = tl.minimum(tiles, (split + 1) * tiles_per_split)  # FAULT: merge-bwd-last-tile
    for index in range(first, last):
        row_block, head, batch = locate_tile(index, row_blocks, kv_head, sizes)
        dk, dv = _one_tile(
            q, k_tile, v_tile, out, dout, lse_ptr, part_dq, dq, dk, dv,
            RowBlock(
                row_start + row_block * BLOCK_M, batch, head, kv_head, opts, sizes, scale,
                False, 0, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
            ),
        )  # fmt: skip

    first_row = (tl.cast(split, tl.int64) * (sizes.num_heads // sizes.group) + kv_head) * sizes.prefix_len
    dk = dk * scale  # FAULT: merge-bwd-scale
    dk_ptr, dv_ptr = dk_ptr + first_row * HEAD_DIM, dv_ptr + first_row * VALUE_DIM  # FAULT: merge-bwd-value-rows
    store_tile(dk_ptr, HEAD_DIM, 0, sizes.prefix_len, dk, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dv_ptr, VALUE_DIM, 0, sizes.prefix_len, dv, VALUE_DIM, BLOCK_N, BLOCK_DV)
