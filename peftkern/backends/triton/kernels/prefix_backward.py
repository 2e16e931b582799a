# SPDX-License-Identifier: Apache-2.0
"""Backward of the prefix part alone, for a short prefix: all its gradients in one pass over the rows.

With the merged out and lse of a row, the formulas of :mod:`.backward` hold for the prefix's keys by themselves: the
rest of the softmax enters through lse and through shift = -rowsum(out * dout) only.
"""

import triton
import triton.language as tl

from .blocks import LOG2E, load_tile, matrix, prefix_scores, store_tile
from .prefix_forward import locate_tile


@triton.jit
def _prefix_merge_bwd_kernel(
    q, prefix_k, prefix_v, out, dout, lse_ptr, part_dq, dq, dk_ptr, dv_ptr, opts, sizes, scale, splits,
    tiles_per_split,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq [B, Hq, S, D] = part_dq + the prefix's part; fp32 partial sums of dprefix_k, dprefix_v [splits, Hkv, P, D].

    A program has one key head, whose prefix fits BLOCK_N, and one of ``splits`` equal runs of tiles of rows.
    ``part_dq`` is the sequence's part, None for none, and may be dq itself. dq None: nobody needs it.
    """
    split, kv_head = tl.program_id(0) % splits, tl.program_id(0) // splits
    dtype = q.ptr.dtype.element_ty
    k_tile = load_tile(
        matrix(prefix_k, 0, kv_head), prefix_k.stride_n, 0, sizes.prefix_len, HEAD_DIM, BLOCK_N, BLOCK_D
    ).to(dtype)
    v_tile = load_tile(
        matrix(prefix_v, 0, kv_head), prefix_v.stride_n, 0, sizes.prefix_len, HEAD_DIM, BLOCK_N, BLOCK_D
    ).to(dtype)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    slots = tl.arange(0, BLOCK_N)[None, :]
    row_blocks = tl.cdiv(sizes.q_len, BLOCK_M)
    tiles = row_blocks * sizes.group * sizes.batch
    for index in range(split * tiles_per_split, tl.minimum(tiles, (split + 1) * tiles_per_split)):
        block, head, batch = locate_tile(index, row_blocks, kv_head, sizes)
        first_row = block * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        inside = rows < sizes.q_len
        q_tile = load_tile(matrix(q, batch, head), q.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
        dout_ptr, out_ptr = matrix(dout, batch, head), matrix(out, batch, head)
        dout_tile = load_tile(dout_ptr, dout.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
        out_tile = load_tile(out_ptr, out.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
        shift = -tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
        lse_row = lse_ptr + (tl.cast(batch, tl.int64) * sizes.num_heads + head) * sizes.q_len
        lse = tl.load(lse_row + rows, mask=inside, other=float("inf")) * LOG2E
        lse = tl.where(lse == -float("inf"), float("inf"), lse)

        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        scores, unit, slope = prefix_scores(
            products, scale, rows[:, None], slots, inside[:, None], sizes.prefix_len, head, opts, sizes, True
        )
        p = tl.exp2(scores * unit - lse[:, None])
        dv = tl.dot(tl.trans(p.to(dtype)), dout_tile, dv, input_precision="ieee")
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
        ds = (p * (dp + shift[:, None]) * slope).to(dtype)
        dk = tl.dot(tl.trans(ds), q_tile, dk, input_precision="ieee")
        if dq is not None:
            total = tl.dot(ds, k_tile, input_precision="ieee") * scale
            if part_dq is not None:
                part_ptr = matrix(part_dq, batch, head)
                total += load_tile(part_ptr, part_dq.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
            dq_ptr = matrix(dq, batch, head)
            store_tile(dq_ptr, dq.stride_n, first_row, sizes.q_len, total, HEAD_DIM, BLOCK_M, BLOCK_D)

    offset = (tl.cast(split, tl.int64) * (sizes.num_heads // sizes.group) + kv_head) * sizes.prefix_len * HEAD_DIM
    store_tile(dk_ptr + offset, HEAD_DIM, 0, sizes.prefix_len, dk * scale, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dv_ptr + offset, HEAD_DIM, 0, sizes.prefix_len, dv, HEAD_DIM, BLOCK_N, BLOCK_D)
