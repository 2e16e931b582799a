# SPDX-License-Identifier: Apache-2.0
"""The backward: one preparing pass, then dq by rows, dk and dv by keys, the prefix's gradients by splits of the rows.

::

    p  = exp2(s - lse)                      w  = p * keep / (1 - dropout_p)
    dp = dout v^T * keep / (1 - dropout_p)  ds = p * (dp + shift)      shift = dlse - rowsum(out * dout)
    dv = w^T dout     dbias = ds     dk = scale * (ds * slope)^T q     dq = scale * (ds * slope) k

slope is the softcap's derivative. A gated prefix has a softmax of its own: its own lse and shift, p times tanh(gate).
Where a bias, sinks or a gate want a gradient, the softmax is computed once more for shift: in these sums the rounding
of out, the same for all keys of a row, would not average out. Nothing is added atomically: each sum has one owner
and a fixed order. (Dao et al., FlashAttention, 2022, appendix B.4.)
"""

import triton
import triton.language as tl

from .blocks import (
    LOG2E,
    dropout_keep,
    find_sequence,
    key_range,
    keys_seen,
    load_tile,
    locate,
    matrix,
    prefix_length,
    prefix_of,
    prefix_scores,
    row_range,
    rows_that_see,
    seq_scores,
    store_tile,
    tanh,
)
from .forward import attend, inverse, visit_prefixes, visit_sequence


@triton.jit
def _row_offset(batch, head, sizes):
    """Offset of a head's row of statistics [B, Hq, S]."""
    return (tl.cast(batch, tl.int64) * sizes.num_heads + head) * sizes.q_len


@triton.jit
def _prefix_attention_bwd_prepare_kernel(
    q, k, v, prefix_k, prefix_v, out, dout, lse_ptr, dlse_ptr, stats, opts, sizes, scale,
    IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The statistics of each row, [B, Hq, S] each: lse in log2 (+inf where nothing is visible, so that p = 0), shift.

    From ``out`` and ``lse``, or where ``out`` is None by computing the softmax once more.
    """
    block, head, batch = locate(tl.cdiv(sizes.q_len, BLOCK_M), sizes.num_heads)
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < sizes.q_len
    offset = _row_offset(batch, head, sizes)
    dout_ptr = matrix(dout, batch, head)
    dout_tile = load_tile(dout_ptr, dout.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    if out is None:
        q_tile = load_tile(matrix(q, batch, head), q.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
        (prefix_m, prefix_denom, prefix_acc), (m, denom, acc) = attend(
            q_tile, dout_tile, k, v, prefix_k, prefix_v, first_row, batch, head, opts, sizes, scale,
            IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        lse = m + tl.log2(denom)
        shift = -acc * inverse(denom, opts)
        if opts.gate is not None:
            prefix_lse = prefix_m + tl.log2(prefix_denom)
            prefix_lse = tl.where(prefix_lse == -float("inf"), float("inf"), prefix_lse)
            tl.store(stats.prefix_lse + offset + rows, prefix_lse, mask=inside)
            tl.store(stats.prefix_shift + offset + rows, -prefix_acc * inverse(prefix_denom, opts), mask=inside)
    else:
        out_ptr = matrix(out, batch, head)
        out_tile = load_tile(out_ptr, out.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
        lse = tl.load(lse_ptr + offset + rows, mask=inside, other=0.0) * LOG2E
        shift = -tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse_ptr is not None:
        shift += tl.load(dlse_ptr + offset + rows, mask=inside, other=0.0)
    tl.store(stats.lse + offset + rows, tl.where(lse == -float("inf"), float("inf"), lse), mask=inside)
    tl.store(stats.shift + offset + rows, shift, mask=inside)


@triton.jit
def _load_stats(stats, first_row, batch, head, opts, sizes, PART: tl.constexpr, BLOCK_M: tl.constexpr):
    """(lse, shift) [BLOCK_M] of the softmax that a part of the keys belongs to, and the gain of the part."""
    rows = first_row + tl.arange(0, BLOCK_M)
    offset = _row_offset(batch, head, sizes)
    if PART == 1 and opts.gate is not None:
        lse_ptr, shift_ptr = stats.prefix_lse + offset, stats.prefix_shift + offset
        gain = tanh(tl.load(opts.gate + head))
    else:
        lse_ptr, shift_ptr = stats.lse + offset, stats.shift + offset
        gain = 1.0
    lse = tl.load(lse_ptr + rows, mask=rows < sizes.q_len, other=float("inf"))
    shift = tl.load(shift_ptr + rows, mask=rows < sizes.q_len, other=0.0)
    return lse, shift, gain


@triton.jit
def _load_rows(
    q, dout, stats, first_row, batch, head, opts, sizes, PART: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """(q, dout) [BLOCK_M, D] of a block of rows, (lse, shift) [BLOCK_M] of the softmax of PART and the part's gain.

    PART is 1 for the keys of the prefix, 0 for those of the sequence; lse is inf beyond the last row, so that p = 0.
    """
    q_tile = load_tile(matrix(q, batch, head), q.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    dout_ptr = matrix(dout, batch, head)
    dout_tile = load_tile(dout_ptr, dout.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    lse, shift, gain = _load_stats(stats, first_row, batch, head, opts, sizes, PART, BLOCK_M)
    return q_tile, dout_tile, lse, shift, gain


@triton.jit
def _dropped(x, keep, opts):
    """x * keep / (1 - dropout_p)."""
    if keep is not None:
        x = tl.where(keep, x * opts.dropout_scale, 0.0)
    return x


@triton.jit
def _dq_step(dq, context, scores, unit, slope, k, v, keep, opts):
    """dq [M, D] without scale, one block of keys on."""
    dout, lse, shift, gain = context
    p = tl.exp2(scores * unit - lse[:, None]) * gain
    dp = _dropped(tl.dot(dout, tl.trans(v), input_precision="ieee"), keep, opts)
    ds = p * (dp + shift[:, None]) * slope
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _prefix_attention_bwd_dq_kernel(
    q, k, v, prefix_k, prefix_v, dout, part_dq, dq, stats, opts, sizes, scale,
    IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq [B, Hq, S, D]; a program per BLOCK_M rows of one head, over the same blocks of keys as the forward.

    k and v None: the prefix's part alone, added to ``part_dq``, which may be dq itself.
    """
    block, head, batch = locate(tl.cdiv(sizes.q_len, BLOCK_M), sizes.num_heads)
    first_row = block * BLOCK_M
    q_tile, dout_tile, lse, shift, gain = _load_rows(
        q, dout, stats, first_row, batch, head, opts, sizes, 1, HEAD_DIM, BLOCK_D, BLOCK_M
    )
    acc = visit_prefixes(
        _dq_step, tl.zeros([BLOCK_M, BLOCK_D], tl.float32), (dout_tile, lse, shift, gain), q_tile, prefix_k, prefix_v,
        first_row, batch, head, opts, sizes, scale, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if k is not None:
        if opts.gate is not None:
            lse, shift, gain = _load_stats(stats, first_row, batch, head, opts, sizes, 0, BLOCK_M)
        acc = visit_sequence(
            _dq_step, acc, (dout_tile, lse, shift, 1.0), q_tile, k, v,
            key_range(first_row, opts, sizes, IS_CAUSAL, BLOCK_M, BLOCK_N), first_row,
            first_row + tl.arange(0, BLOCK_M)[:, None], batch, head // sizes.group, head, opts, sizes, scale,
            IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    acc = acc * scale
    if part_dq is not None:
        part_ptr = matrix(part_dq, batch, head)
        acc += load_tile(part_ptr, part_dq.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    store_tile(matrix(dq, batch, head), dq.stride_n, first_row, sizes.q_len, acc, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit
def _dkv_step(
    dk, dv, k, v, q, dout, first_row, first_key, visible, batch, head, stats, opts, sizes, scale,
    PART: tl.constexpr, IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk [N, D] without scale and dv [N, D], one block of rows on, and its ds [N, M]; everything transposed.

    ``visible``: (lower, upper) of the rows that see sequence keys, (positions, sees, length) for those of a prefix.
    """
    q_tile, dout_tile, lse, shift, gain = _load_rows(
        q, dout, stats, first_row, batch, head, opts, sizes, PART, HEAD_DIM, BLOCK_D, BLOCK_M
    )
    keys = first_key + tl.arange(0, BLOCK_N)[:, None]
    products = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
    if PART == 0:
        lower, upper = visible
        rows = first_row + tl.arange(0, BLOCK_M)[None, :]
        scores, unit, slope = seq_scores(
            products, scale, rows, keys, lower, upper, batch, head, opts, sizes, IS_CAUSAL, True, MASKED
        )
    else:
        positions, sees, length = visible
        scores, unit, slope = prefix_scores(products, scale, positions, keys, sees, length, head, opts, sizes, MASKED)
    p = tl.exp2(scores * unit - lse[None, :]) * gain
    dp = tl.dot(v, tl.trans(dout_tile), input_precision="ieee")
    keep = None
    if DROPOUT_THRESHOLD > 0:
        batch_head = batch * sizes.num_heads + head
        keep = tl.trans(
            dropout_keep(opts, first_row, first_key, batch_head, PART, DROPOUT_THRESHOLD, BLOCK_M, BLOCK_N)
        )
    w, dp = _dropped(p, keep, opts), _dropped(dp, keep, opts)
    dv = tl.dot(w.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
    ds = p * (dp + shift[None, :])
    dk = tl.dot((ds * slope).to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv, ds


@triton.jit
def _prefix_attention_bwd_dkv_kernel(
    q, k, v, dout, dk, dv, stats, opts, sizes, scale,
    IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk, dv [B, Hkv, T, D]; a program per BLOCK_N keys of one key head, over the query heads that share it."""
    block, kv_head, batch = locate(tl.cdiv(sizes.kv_len, BLOCK_N), sizes.num_heads // sizes.group)
    first_key = block * BLOCK_N
    k_tile = load_tile(matrix(k, batch, kv_head), k.stride_n, first_key, sizes.kv_len, HEAD_DIM, BLOCK_N, BLOCK_D)
    v_tile = load_tile(matrix(v, batch, kv_head), v.stride_n, first_key, sizes.kv_len, HEAD_DIM, BLOCK_N, BLOCK_D)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)

    visible = rows_that_see(first_key + tl.arange(0, BLOCK_N)[:, None], opts, sizes, IS_CAUSAL)
    low, row_blocks = row_range(first_key, opts, sizes, IS_CAUSAL, BLOCK_M, BLOCK_N)
    # one loop over heads and rows, its mask always applied: loops for masked and full blocks apart spill registers
    for unit in range(sizes.group * row_blocks):
        dk_acc, dv_acc, _ = _dkv_step(
            dk_acc, dv_acc, k_tile, v_tile, q, dout, low + unit % row_blocks * BLOCK_M, first_key, visible, batch,
            kv_head * sizes.group + unit // row_blocks, stats, opts, sizes, scale,
            0, IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
    if dk is not None:
        dk_acc = dk_acc * scale
        dk_ptr = matrix(dk, batch, kv_head)
        store_tile(dk_ptr, dk.stride_n, first_key, sizes.kv_len, dk_acc, HEAD_DIM, BLOCK_N, BLOCK_D)
    if dv is not None:
        dv_ptr = matrix(dv, batch, kv_head)
        store_tile(dv_ptr, dv.stride_n, first_key, sizes.kv_len, dv_acc, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit
def _prefix_attention_bwd_prefix_kernel(
    q, prefix_k, prefix_v, dout, dk_ptr, dv_ptr, dbias_ptr, stats, opts, sizes, scale, bank, num_units,
    units_per_split,
    DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial sums of dprefix_k, dprefix_v [splits, A, Hq, P, D] and dprefix_bias [splits, A, Hq, P], all fp32.

    A program has BLOCK_N tokens of one prefix, one query head, and one split of the rows: the units (batch entry,
    block of rows) are cut into ``splits`` equal runs, whatever prefix they see.
    """
    block, head, outer = locate(tl.cdiv(sizes.prefix_len, BLOCK_N), sizes.num_heads)
    prefix, split = outer % bank, outer // bank
    kv_head = head // sizes.group
    first_slot = block * BLOCK_N
    length = prefix_length(prefix, opts, sizes)
    dtype = q.ptr.dtype.element_ty
    k_tile = load_tile(
        matrix(prefix_k, prefix, kv_head), prefix_k.stride_n, first_slot, length, HEAD_DIM, BLOCK_N, BLOCK_D
    ).to(dtype)
    v_tile = load_tile(
        matrix(prefix_v, prefix, kv_head), prefix_v.stride_n, first_slot, length, HEAD_DIM, BLOCK_N, BLOCK_D
    ).to(dtype)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)

    MASKED: tl.constexpr = opts.prefix_window is not None or opts.prefix_ids is not None
    row_blocks = tl.cdiv(sizes.q_len, BLOCK_M)
    last_unit = tl.minimum(num_units, (split + 1) * units_per_split)
    for unit in range(split * units_per_split, tl.where(first_slot < length, last_unit, 0)):
        batch = unit // row_blocks
        first_row = unit % row_blocks * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)
        positions = rows + (sizes.kv_len - sizes.q_len)
        prefixes = rows * 0 + batch
        if opts.cu_seqlens is not None:
            sequence = find_sequence(tl.minimum(rows, sizes.q_len - 1), opts, sizes)
            positions -= tl.load(opts.cu_seqlens + sequence).to(tl.int32)
            prefixes = sequence
        sees = (rows < sizes.q_len) & (prefix_of(prefixes, opts) == prefix)
        if opts.prefix_ids is None or tl.max(sees.to(tl.int32), 0) > 0:
            dk, dv, ds = _dkv_step(
                dk, dv, k_tile, v_tile, q, dout, first_row, first_slot, (positions[None, :], sees[None, :], length),
                batch, head, stats, opts, sizes, scale,
                1, False, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, MASKED,
            )  # fmt: skip
            dbias += tl.sum(ds, 1)

    matrix_index = (tl.cast(split, tl.int64) * bank + prefix) * sizes.num_heads + head
    slots = first_slot + tl.arange(0, BLOCK_N)
    used = slots < length  # beyond it p is 1 / denominator, of a token that does not exist
    offset = matrix_index * sizes.prefix_len * HEAD_DIM
    dk, dv = tl.where(used[:, None], dk * scale, 0.0), tl.where(used[:, None], dv, 0.0)
    store_tile(dk_ptr + offset, HEAD_DIM, first_slot, sizes.prefix_len, dk, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dv_ptr + offset, HEAD_DIM, first_slot, sizes.prefix_len, dv, HEAD_DIM, BLOCK_N, BLOCK_D)
    if dbias_ptr is not None:
        ptrs = dbias_ptr + matrix_index * sizes.prefix_len + slots
        tl.store(ptrs, tl.where(used, dbias, 0.0), mask=slots < sizes.prefix_len)


@triton.jit
def _sum_partials_kernel(partial_ptr, total_ptr, num_splits, split_size, group, inner, size, BLOCK: tl.constexpr):
    """total [outer, inner] = sum in order over splits and query heads of partial [splits, outer, group, inner]."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = index // inner * group * inner + index % inner
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):
        for member in range(group):
            offset = tl.cast(split, tl.int64) * split_size + member * inner
            total += tl.load(partial_ptr + offset + first, mask=index < size, other=0.0)
    tl.store(total_ptr + index, total, mask=index < size)


@triton.jit
def _prefix_attention_bwd_bias_kernel(
    q, k, v, dout, dbias_ptr, stats, opts, sizes, scale, bias_batch, bias_heads, bias_rows, bias_keys,
    IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dbias [bias_batch, bias_heads, bias_rows, bias_keys] fp32, each size that of the scores or 1.

    A program has one tile of it and walks over all tiles of scores that it is broadcast to.
    """
    key_blocks = tl.cdiv(bias_keys, BLOCK_N)
    tile, bias_head, bias_entry = locate(tl.cdiv(bias_rows, BLOCK_M) * key_blocks, bias_heads)
    tile_row, tile_key = tile // key_blocks * BLOCK_M, tile % key_blocks * BLOCK_N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for batch in range(bias_entry, tl.where(bias_batch == 1, sizes.batch, bias_entry + 1)):
        for head in range(bias_head, tl.where(bias_heads == 1, sizes.num_heads, bias_head + 1)):
            kv_head = head // sizes.group
            for first_row in range(tile_row, tl.where(bias_rows == 1, sizes.q_len, tile_row + 1), BLOCK_M):
                rows = first_row + tl.arange(0, BLOCK_M)[:, None]
                q_tile, dout_tile, lse, shift, _gain = _load_rows(
                    q, dout, stats, first_row, batch, head, opts, sizes, 0, HEAD_DIM, BLOCK_D, BLOCK_M
                )
                lower, upper = keys_seen(rows, opts, sizes, IS_CAUSAL)
                for first_key in range(tile_key, tl.where(bias_keys == 1, sizes.kv_len, tile_key + 1), BLOCK_N):
                    keys = first_key + tl.arange(0, BLOCK_N)[None, :]
                    k_tile = load_tile(
                        matrix(k, batch, kv_head), k.stride_n, first_key, sizes.kv_len, HEAD_DIM, BLOCK_N, BLOCK_D
                    )
                    v_tile = load_tile(
                        matrix(v, batch, kv_head), v.stride_n, first_key, sizes.kv_len, HEAD_DIM, BLOCK_N, BLOCK_D
                    )
                    products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                    scores, unit, _slope = seq_scores(
                        products, scale, rows, keys, lower, upper, batch, head, opts, sizes, IS_CAUSAL,
                        False, True,
                    )  # fmt: skip
                    dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
                    if DROPOUT_THRESHOLD > 0:
                        batch_head = batch * sizes.num_heads + head
                        keep = dropout_keep(
                            opts, first_row, first_key, batch_head, 0, DROPOUT_THRESHOLD, BLOCK_M, BLOCK_N
                        )
                        dp = _dropped(dp, keep, opts)
                    total += tl.exp2(scores * unit - lse[:, None]) * (dp + shift[:, None])

    rows, keys = tile_row + tl.arange(0, BLOCK_M)[:, None], tile_key + tl.arange(0, BLOCK_N)[None, :]
    total = tl.where(bias_rows == 1, tl.where(rows == tile_row, tl.sum(total, 0)[None, :], 0.0), total)
    total = tl.where(bias_keys == 1, tl.where(keys == tile_key, tl.sum(total, 1)[:, None], 0.0), total)
    bias_matrix = (tl.cast(bias_entry, tl.int64) * bias_heads + bias_head) * bias_rows
    ptrs = dbias_ptr + (bias_matrix + rows) * bias_keys + keys
    tl.store(ptrs, total, mask=(rows < bias_rows) & (keys < bias_keys))
