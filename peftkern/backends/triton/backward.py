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
    load_tile,
    locate,
    matrix,
    prefix_length,
    prefix_of,
    prefix_scores,
    row_range,
    segment,
    seq_scores,
    store_tile,
    tanh,
)
from .forward import attend, inverse


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
        prefix_m, prefix_denom, prefix_acc, m, denom, acc = attend(
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
def _dropped(x, keep, opts):
    """x * keep / (1 - dropout_p)."""
    if opts.dropout_scale is not None:
        x = tl.where(keep, x * opts.dropout_scale, 0.0)
    return x


@triton.jit
def _dq_prefix_blocks(
    dq, q, dout, prefix_k, prefix_v, prefix, first_row, positions, sees, batch, head, stats, opts, sizes, scale,
    DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq plus the part of one prefix."""
    length = prefix_length(prefix, opts, sizes)
    kv_head = head // sizes.group
    k_ptr, v_ptr = matrix(prefix_k, prefix, kv_head), matrix(prefix_v, prefix, kv_head)
    lse, shift, gain = _load_stats(stats, first_row, batch, head, opts, sizes, 1, BLOCK_M)
    low = length * 0
    if opts.prefix_window is not None:
        nearest = tl.min(tl.min(positions, 1), 0)
        low = tl.maximum(0, length + nearest - opts.prefix_window + 1) // BLOCK_N * BLOCK_N
    for first_slot in range(low, length, BLOCK_N):
        k = load_tile(k_ptr, prefix_k.stride_n, first_slot, length, HEAD_DIM, BLOCK_N, BLOCK_D).to(q.dtype)
        v = load_tile(v_ptr, prefix_v.stride_n, first_slot, length, HEAD_DIM, BLOCK_N, BLOCK_D).to(q.dtype)
        slots = first_slot + tl.arange(0, BLOCK_N)[None, :]
        products = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores, slope = prefix_scores(products, scale, positions, slots, sees, length, head, opts, sizes, True)
        p = tl.exp2(scores - lse[:, None]) * gain
        dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
        if DROPOUT_THRESHOLD > 0:
            batch_head = batch * sizes.num_heads + head
            keep = dropout_keep(opts, first_row, first_slot, batch_head, 1, DROPOUT_THRESHOLD, BLOCK_M, BLOCK_N)
            dp = _dropped(dp, keep, opts)
        ds = p * (dp + shift[:, None]) * slope
        dq = tl.dot(ds.to(q.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _dq_sequence(
    dq, q, dout, k, v, low, high, first_row, first, end, batch, head, lse, shift, opts, sizes, scale,
    IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq plus the part of sequence keys low to high."""
    kv_head = head // sizes.group
    k_ptr, v_ptr = matrix(k, batch, kv_head), matrix(v, batch, kv_head)
    rows = first_row + tl.arange(0, BLOCK_M)[:, None]
    for first_key in range(low, high, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)[None, :]
        k_tile = load_tile(k_ptr, k.stride_n, first_key, sizes.kv_len, HEAD_DIM, BLOCK_N, BLOCK_D, INSIDE=not MASKED)
        v_tile = load_tile(v_ptr, v.stride_n, first_key, sizes.kv_len, HEAD_DIM, BLOCK_N, BLOCK_D, INSIDE=not MASKED)
        products = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        scores, slope = seq_scores(
            products, scale, rows, keys, keys, first, end, batch, head, opts, sizes, IS_CAUSAL, MASKED
        )
        p = tl.exp2(scores - lse[:, None])
        dp = tl.dot(dout, tl.trans(v_tile), input_precision="ieee")
        if DROPOUT_THRESHOLD > 0:
            batch_head = batch * sizes.num_heads + head
            keep = dropout_keep(opts, first_row, first_key, batch_head, 0, DROPOUT_THRESHOLD, BLOCK_M, BLOCK_N)
            dp = _dropped(dp, keep, opts)
        ds = p * (dp + shift[:, None]) * slope
        dq = tl.dot(ds.to(q.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit
def _prefix_attention_bwd_dq_kernel(
    q, k, v, prefix_k, prefix_v, dout, dq, stats, opts, sizes, scale,
    IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq [B, Hq, S, D]; a program per BLOCK_M rows of one head, over the same blocks of keys as the forward."""
    block, head, batch = locate(tl.cdiv(sizes.q_len, BLOCK_M), sizes.num_heads)
    first_row = block * BLOCK_M
    q_tile = load_tile(matrix(q, batch, head), q.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    dout_ptr = matrix(dout, batch, head)
    dout_tile = load_tile(dout_ptr, dout.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    rows = first_row + tl.arange(0, BLOCK_M)
    packed = tl.minimum(rows, sizes.q_len - 1)
    first, end = segment(packed, opts, sizes)
    positions = (rows + (sizes.kv_len - sizes.q_len) - (first if opts.cu_seqlens is not None else 0))[:, None]
    if opts.cu_seqlens is not None and opts.prefix_ids is not None:
        sequence = find_sequence(packed, opts, sizes)
        for s in range(tl.min(sequence, 0), tl.max(sequence, 0) + 1):
            acc = _dq_prefix_blocks(
                acc, q_tile, dout_tile, prefix_k, prefix_v, tl.load(opts.prefix_ids + s).to(tl.int32), first_row,
                positions, sequence[:, None] == s, batch, head, stats, opts, sizes, scale,
                DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        acc = _dq_prefix_blocks(
            acc, q_tile, dout_tile, prefix_k, prefix_v, prefix_of(batch, opts), first_row, positions,
            rows[:, None] < sizes.q_len, batch, head, stats, opts, sizes, scale,
            DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip

    lse, shift, _ = _load_stats(stats, first_row, batch, head, opts, sizes, 0, BLOCK_M)
    FULL: tl.constexpr = (opts.cu_seqlens is None) and (opts.key_mask is None)
    low, full_low, full_high, high = key_range(first_row, opts, sizes, IS_CAUSAL, BLOCK_M, BLOCK_N)
    if FULL and opts.window is not None:
        acc = _dq_sequence(
            acc, q_tile, dout_tile, k, v, low, tl.minimum(full_low, high), first_row, first[:, None], end[:, None],
            batch, head, lse, shift, opts, sizes, scale,
            IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
    if FULL:
        acc = _dq_sequence(
            acc, q_tile, dout_tile, k, v, full_low, full_high, first_row, first[:, None], end[:, None], batch, head,
            lse, shift, opts, sizes, scale,
            IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    acc = _dq_sequence(
        acc, q_tile, dout_tile, k, v, full_high, high, first_row, first[:, None], end[:, None], batch, head, lse,
        shift, opts, sizes, scale, IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip
    store_tile(matrix(dq, batch, head), dq.stride_n, first_row, sizes.q_len, acc * scale, HEAD_DIM, BLOCK_M, BLOCK_D)


@triton.jit
def _dkv_step(dk, dv, q, dout, v, scores_t, slope, lse, shift, gain, keep, opts, HAS_DROPOUT: tl.constexpr):
    """dk [N, D] without scale, dv [N, D] and ds [N, M] of one block of rows; everything transposed."""
    p = tl.exp2(scores_t - lse[None, :]) * gain
    w = p
    dp = tl.dot(v, tl.trans(dout), input_precision="ieee")
    if HAS_DROPOUT:
        w, dp = _dropped(p, keep, opts), _dropped(dp, keep, opts)
    dv = tl.dot(w.to(dout.dtype), dout, dv, input_precision="ieee")
    ds = p * (dp + shift[None, :])
    dk = tl.dot((ds * slope).to(q.dtype), q, dk, input_precision="ieee")
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

    keys = first_key + tl.arange(0, BLOCK_N)[:, None]
    first, end = segment(tl.minimum(keys, sizes.kv_len - 1), opts, sizes)
    low, row_blocks = row_range(first_key, opts, sizes, IS_CAUSAL, BLOCK_M, BLOCK_N)
    # one loop over heads and rows, its mask always applied: loops for masked and full blocks apart spill registers
    for unit in range(sizes.group * row_blocks):
        head = kv_head * sizes.group + unit // row_blocks
        first_row = low + unit % row_blocks * BLOCK_M
        rows = first_row + tl.arange(0, BLOCK_M)[None, :]
        q_tile = load_tile(matrix(q, batch, head), q.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
        dout_tile = load_tile(
            matrix(dout, batch, head), dout.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D
        )
        lse, shift, gain = _load_stats(stats, first_row, batch, head, opts, sizes, 0, BLOCK_M)
        products = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
        scores, slope = seq_scores(
            products, scale, rows, keys, rows, first, end, batch, head, opts, sizes, IS_CAUSAL, True
        )
        keep = None
        if DROPOUT_THRESHOLD > 0:
            batch_head = batch * sizes.num_heads + head
            keep = tl.trans(
                dropout_keep(opts, first_row, first_key, batch_head, 0, DROPOUT_THRESHOLD, BLOCK_M, BLOCK_N)
            )
        dk_acc, dv_acc, _ = _dkv_step(
            dk_acc, dv_acc, q_tile, dout_tile, v_tile, scores, slope, lse, shift, gain, keep, opts,
            DROPOUT_THRESHOLD > 0,
        )  # fmt: skip
    if dk is not None:
        dk_acc = dk_acc * scale
        dk_ptr = matrix(dk, batch, kv_head)
        store_tile(dk_ptr, dk.stride_n, first_key, sizes.kv_len, dk_acc, HEAD_DIM, BLOCK_N, BLOCK_D)
    if dv is not None:
        dv_ptr = matrix(dv, batch, kv_head)
        store_tile(dv_ptr, dv.stride_n, first_key, sizes.kv_len, dv_acc, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit
def _prefix_rows(
    dk, dv, dbias, k_tile, v_tile, q, dout, first_row, positions, sees, first_slot, length, batch, head, stats,
    opts, sizes, scale,
    DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk, dv [N, D] and dbias [N] of a block of prefix tokens plus the part of one block of rows."""
    q_tile = load_tile(matrix(q, batch, head), q.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    dout_ptr = matrix(dout, batch, head)
    dout_tile = load_tile(dout_ptr, dout.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    lse, shift, gain = _load_stats(stats, first_row, batch, head, opts, sizes, 1, BLOCK_M)
    slots = first_slot + tl.arange(0, BLOCK_N)[:, None]
    products = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
    scores, slope = prefix_scores(products, scale, positions, slots, sees, length, head, opts, sizes, MASKED)
    keep = None
    if DROPOUT_THRESHOLD > 0:
        batch_head = batch * sizes.num_heads + head
        keep = tl.trans(dropout_keep(opts, first_row, first_slot, batch_head, 1, DROPOUT_THRESHOLD, BLOCK_M, BLOCK_N))
    dk, dv, ds = _dkv_step(
        dk, dv, q_tile, dout_tile, v_tile, scores, slope, lse, shift, gain, keep, opts, DROPOUT_THRESHOLD > 0
    )
    return dk, dv, dbias + tl.sum(ds, 1)


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
        sees = rows < sizes.q_len
        if opts.cu_seqlens is not None:
            packed = tl.minimum(rows, sizes.q_len - 1)
            sequence = find_sequence(packed, opts, sizes)
            positions -= tl.load(opts.cu_seqlens + sequence).to(tl.int32)
            sees = sees & (prefix_of(sequence, opts) == prefix)
        else:
            sees = sees & (prefix_of(rows * 0 + batch, opts) == prefix)
        if opts.prefix_ids is None or tl.max(sees.to(tl.int32), 0) > 0:
            dk, dv, dbias = _prefix_rows(
                dk, dv, dbias, k_tile, v_tile, q, dout, first_row, positions[None, :], sees[None, :], first_slot,
                length, batch, head, stats, opts, sizes, scale,
                DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, MASKED,
            )  # fmt: skip

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
                rows = first_row + tl.arange(0, BLOCK_M)
                q_tile = load_tile(
                    matrix(q, batch, head), q.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D
                )
                dout_tile = load_tile(
                    matrix(dout, batch, head), dout.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D
                )
                lse, shift, _ = _load_stats(stats, first_row, batch, head, opts, sizes, 0, BLOCK_M)
                first, end = segment(tl.minimum(rows, sizes.q_len - 1), opts, sizes)
                for first_key in range(tile_key, tl.where(bias_keys == 1, sizes.kv_len, tile_key + 1), BLOCK_N):
                    keys = first_key + tl.arange(0, BLOCK_N)[None, :]
                    k_tile = load_tile(
                        matrix(k, batch, kv_head), k.stride_n, first_key, sizes.kv_len, HEAD_DIM, BLOCK_N, BLOCK_D
                    )
                    v_tile = load_tile(
                        matrix(v, batch, kv_head), v.stride_n, first_key, sizes.kv_len, HEAD_DIM, BLOCK_N, BLOCK_D
                    )
                    products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                    scores, _slope = seq_scores(  # not _, which the loop outside gives another type
                        products, scale, rows[:, None], keys, keys, first[:, None], end[:, None], batch, head,
                        opts, sizes, IS_CAUSAL, True,
                    )  # fmt: skip
                    dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
                    if DROPOUT_THRESHOLD > 0:
                        batch_head = batch * sizes.num_heads + head
                        keep = dropout_keep(
                            opts, first_row, first_key, batch_head, 0, DROPOUT_THRESHOLD, BLOCK_M, BLOCK_N
                        )
                        dp = _dropped(dp, keep, opts)
                    total += tl.exp2(scores - lse[:, None]) * (dp + shift[:, None])

    rows, keys = tile_row + tl.arange(0, BLOCK_M)[:, None], tile_key + tl.arange(0, BLOCK_N)[None, :]
    total = tl.where(bias_rows == 1, tl.where(rows == tile_row, tl.sum(total, 0)[None, :], 0.0), total)
    total = tl.where(bias_keys == 1, tl.where(keys == tile_key, tl.sum(total, 1)[:, None], 0.0), total)
    bias_matrix = (tl.cast(bias_entry, tl.int64) * bias_heads + bias_head) * bias_rows
    ptrs = dbias_ptr + (bias_matrix + rows) * bias_keys + keys
    tl.store(ptrs, total, mask=(rows < bias_rows) & (keys < bias_keys))
