# SPDX-License-Identifier: Apache-2.0
"""The backward: statistics of each row, then dq by rows, dk and dv by keys, the prefix's gradients by splits of rows.

::

    p  = exp2(s - lse)                      w  = p * keep / (1 - dropout_p)
    dp = dout v^T * keep / (1 - dropout_p)  ds = p * (dp - delta)      delta = rowsum(out * dout) - dlse
    dv = w^T dout     dbias = ds     dk = scale * (ds * slope)^T q     dq = scale * (ds * slope) k

slope is the softcap's derivative. A gated prefix has a softmax of its own, with its own lse and delta; its p is
multiplied by tanh(gate). If a bias, sinks or a gate need a gradient, the softmax is computed once more for delta: out
is rounded, the error is the same for all keys of a row, and so it would not average out in these sums. There are no
atomic additions: one program owns each sum, and its order is fixed. (Dao et al., FlashAttention, 2022, appendix B.4.)

The statistics hold -delta, because Triton folds an addition into the dot product: its sums start at -delta. A
subtraction costs up to 31 registers more, and dk and dv spill at D = 128 on sm_90. A negation in these kernels is
scheduled between wgmma's fence and wgmma, which the hardware does not allow.
"""

import triton
import triton.language as tl

from .blocks import (
    LOG2E,
    VARYING,
    RowBlock,
    all_sizes,
    dropout_keep,
    find_sequence,
    key_range,
    keys_seen,
    load_out_tile,
    load_prefix_tile,
    load_query_tile,
    load_tile,
    locate,
    matrix,
    prefix_length,
    prefix_of,
    prefix_scores,
    row_offset,
    row_range,
    rows_that_see,
    seq_scores,
    store_query_tile,
    store_tile,
    tanh,
)
from .forward import attend, inverse, visit_prefixes, visit_sequence


@triton.jit
def _row_statistics(q, k, v, prefix_k, prefix_v, out, dout, lse_ptr, dlse_ptr, stats, block):
    """Store the statistics of one block of rows."""
    opts, sizes = block.opts, block.sizes
    rows = block.first_row + tl.arange(0, block.BLOCK_M)
    inside = rows < sizes.q_len
    offset = row_offset(block.batch, block.head, sizes)
    dout_tile = load_out_tile(dout, block)
    if out is None:
        q_tile = load_query_tile(q, block)
        prefix_state, state = attend(q_tile, dout_tile, k, v, prefix_k, prefix_v, block)
        m, denom, acc = state
        lse = m + tl.log2(denom)
        neg_delta = -acc * inverse(denom, opts)
        if opts.gate is not None:
            prefix_m, prefix_denom, prefix_acc = prefix_state
            prefix_lse = prefix_m + tl.log2(prefix_denom)
            prefix_lse = tl.where(prefix_lse == -float("inf"), float("inf"), prefix_lse)
            tl.store(stats.prefix_lse + offset + rows, prefix_lse, mask=inside)
            tl.store(stats.prefix_neg_delta + offset + rows, -prefix_acc * inverse(prefix_denom, opts), mask=inside)
    else:
        out_tile = load_out_tile(out, block)
        lse = tl.load(lse_ptr + offset + rows, mask=inside, other=0.0) * LOG2E
        neg_delta = -tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse_ptr is not None:
        neg_delta += tl.load(dlse_ptr + offset + rows, mask=inside, other=0.0)
    tl.store(stats.lse + offset + rows, tl.where(lse == -float("inf"), float("inf"), lse), mask=inside)
    tl.store(stats.neg_delta + offset + rows, neg_delta, mask=inside)


@triton.jit(do_not_specialize=VARYING)
def _prefix_attention_bwd_prepare_kernel(
    q, k, v, prefix_k, prefix_v, out, dout, lse_ptr, dlse_ptr, stats, opts, model, batch_size, q_len, kv_len,
    num_sequences, search_steps, mask_stride, scale,
    IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The statistics of each row, [B, Hq, S] each: -delta, and lse in log2 (+inf if no key is visible, so p = 0).

    They follow from ``out`` and ``lse`` or, if ``out`` is None, from a softmax that is computed once more.
    """
    sizes = all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride)
    index, head, batch = locate(tl.cdiv(sizes.q_len, BLOCK_M), sizes.num_heads)
    _row_statistics(
        q, k, v, prefix_k, prefix_v, out, dout, lse_ptr, dlse_ptr, stats,
        RowBlock(
            index * BLOCK_M, batch, head, head // sizes.group, opts, sizes, scale,
            IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
        ),
    )  # fmt: skip


@triton.jit
def _load_stats(stats, block, OF_PREFIX: tl.constexpr):
    """(lse, -delta, gate): [BLOCK_M] statistics of the softmax that the keys belong to, and the factor of its output.

    OF_PREFIX is 1 for tokens of the prefix, 0 for keys of the sequence. The factor is tanh(gate) for a gated prefix,
    else 1. lse is inf beyond the last row, so that p = 0.
    """
    rows = block.first_row + tl.arange(0, block.BLOCK_M)
    offset = row_offset(block.batch, block.head, block.sizes)
    if OF_PREFIX == 1 and block.opts.gate is not None:
        lse_ptr, neg_delta_ptr = stats.prefix_lse + offset, stats.prefix_neg_delta + offset
        gate = tanh(tl.load(block.opts.gate + block.head))
    else:
        lse_ptr, neg_delta_ptr = stats.lse + offset, stats.neg_delta + offset
        gate = 1.0
    lse = tl.load(lse_ptr + rows, mask=rows < block.sizes.q_len, other=float("inf"))
    neg_delta = tl.load(neg_delta_ptr + rows, mask=rows < block.sizes.q_len, other=0.0)
    return lse, neg_delta, gate


@triton.jit
def _dropped(x, keep, opts):
    """x * keep / (1 - dropout_p)."""
    if keep is not None:
        x = tl.where(keep, x * opts.dropout_scale, 0.0)
    return x


@triton.jit
def _dq_step(dq, operands, scores, unit, slope, k, v, keep, opts):
    """Add one block of keys to dq [M, D], which lacks the factor scale. ``operands``: dout, lse, -delta, gate."""
    dout, lse, neg_delta, gate = operands
    p = tl.exp2(scores * unit - lse[:, None]) * gate
    dp = _dropped(tl.dot(dout, tl.trans(v), input_precision="ieee"), keep, opts)
    ds = p * (dp + neg_delta[:, None]) * slope
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit
def _dq_rows(q, k, v, prefix_k, prefix_v, dout, part_dq, dq, stats, block):
    """Store one block of rows of dq."""
    q_tile, dout_tile = load_query_tile(q, block), load_out_tile(dout, block)
    lse, neg_delta, gate = _load_stats(stats, block, 1)
    acc = tl.zeros([block.BLOCK_M, block.BLOCK_D], tl.float32)
    acc = visit_prefixes(_dq_step, acc, (dout_tile, lse, neg_delta, gate), q_tile, prefix_k, prefix_v, block)
    if k is not None:
        if block.opts.gate is not None:
            lse, neg_delta, gate = _load_stats(stats, block, 0)
        acc = visit_sequence(
            _dq_step, acc, (dout_tile, lse, neg_delta, 1.0), q_tile, k, v,
            key_range(block.first_row, block.opts, block.sizes, block.IS_CAUSAL, block.BLOCK_M, block.BLOCK_N),
            block.first_row + tl.arange(0, block.BLOCK_M)[:, None], block,
        )  # fmt: skip
    acc = acc * block.scale
    if part_dq is not None:
        acc += load_query_tile(part_dq, block)  # FAULT: dq-part
    store_query_tile(dq, acc, block)


@triton.jit(do_not_specialize=VARYING)
def _prefix_attention_bwd_dq_kernel(
    q, k, v, prefix_k, prefix_v, dout, part_dq, dq, stats, opts, model, batch_size, q_len, kv_len, num_sequences,
    search_steps, mask_stride, scale,
    IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dq [B, Hq, S, D]; a program per BLOCK_M rows of one head, over the same blocks of keys as the forward.

    ``k`` and ``v`` None: the prefix's part alone, added to ``part_dq``, which may be dq itself.
    """
    sizes = all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride)
    index, head, batch = locate(tl.cdiv(sizes.q_len, BLOCK_M), sizes.num_heads)
    _dq_rows(
        q, k, v, prefix_k, prefix_v, dout, part_dq, dq, stats,
        RowBlock(
            index * BLOCK_M, batch, head, head // sizes.group, opts, sizes, scale,
            IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
        ),
    )  # fmt: skip


@triton.jit
def _dkv_step(
    dk, dv, k, v, q, dout, stats, first_key, visible, block, OF_PREFIX: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Add one block of rows to dk [N, D], which lacks the factor scale, and dv [N, D_v]; also its ds [N, M].

    Scores are transposed here: keys by rows. ``visible`` is (lower, upper), the rows that see sequence keys, or
    (positions, sees, length) for tokens of a prefix.
    """
    q_tile, dout_tile = load_query_tile(q, block), load_out_tile(dout, block)
    lse, neg_delta, gate = _load_stats(stats, block, OF_PREFIX)
    keys = first_key + tl.arange(0, block.BLOCK_N)[:, None]
    products = tl.dot(k, tl.trans(q_tile), input_precision="ieee")
    if OF_PREFIX == 0:
        lower, upper = visible
        rows = block.first_row + tl.arange(0, block.BLOCK_M)[None, :]
        scores, unit, slope = seq_scores(products, rows, keys, lower, upper, block, True, MASKED)
    else:
        positions, sees, length = visible
        scores, unit, slope = prefix_scores(products, positions, keys, sees, length, block, MASKED)
    p = tl.exp2(scores * unit - lse[None, :]) * gate
    dp = tl.dot(v, tl.trans(dout_tile), input_precision="ieee")
    keep = None
    if block.DROPOUT_THRESHOLD > 0:
        keep = tl.trans(dropout_keep(first_key, block, OF_PREFIX))
    w, dp = _dropped(p, keep, block.opts), _dropped(dp, keep, block.opts)
    dv = tl.dot(w.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
    ds = p * (dp + neg_delta[None, :])  # FAULT: dkv-delta
    dk = tl.dot((ds * slope).to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv, ds


@triton.jit(do_not_specialize=VARYING)
def _prefix_attention_bwd_dkv_kernel(
    q, k, v, dout, dk, dv, stats, opts, model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride,
    scale,
    IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk [B, Hkv, T, D] and dv [B, Hkv, T, D_v]; a program per BLOCK_N keys of one key head, over its query heads."""
    sizes = all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride)
    key_block, kv_head, batch = locate(tl.cdiv(sizes.kv_len, BLOCK_N), sizes.num_heads // sizes.group)
    first_key = key_block * BLOCK_N
    k_tile = load_tile(matrix(k, batch, kv_head), k.stride_n, first_key, sizes.kv_len, HEAD_DIM, BLOCK_N, BLOCK_D)
    v_tile = load_tile(matrix(v, batch, kv_head), v.stride_n, first_key, sizes.kv_len, VALUE_DIM, BLOCK_N, BLOCK_DV)
    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)

    visible = rows_that_see(first_key + tl.arange(0, BLOCK_N)[:, None], opts, sizes, IS_CAUSAL)
    low, row_blocks = row_range(first_key, opts, sizes, IS_CAUSAL, BLOCK_M, BLOCK_N)
    # One loop over heads and rows that always applies the mask: separate loops for masked and full blocks spill
    # registers.
    for index in range(sizes.group * row_blocks):
        dk_acc, dv_acc, _ = _dkv_step(
            dk_acc, dv_acc, k_tile, v_tile, q, dout, stats, first_key, visible,
            RowBlock(
                low + index % row_blocks * BLOCK_M, batch, kv_head * sizes.group + index // row_blocks, kv_head, opts,
                sizes, scale, IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
            ),
            0, True,
        )  # fmt: skip
    if dk is not None:
        dk_acc = dk_acc * scale
        dk_ptr = matrix(dk, batch, kv_head)
        store_tile(dk_ptr, dk.stride_n, first_key, sizes.kv_len, dk_acc, HEAD_DIM, BLOCK_N, BLOCK_D)
    if dv is not None:
        dv_ptr = matrix(dv, batch, kv_head)
        store_tile(dv_ptr, dv.stride_n, first_key, sizes.kv_len, dv_acc, VALUE_DIM, BLOCK_N, BLOCK_DV)


@triton.jit
def _rows_that_see_prefix(prefix, block):
    """(positions [BLOCK_M], sees [BLOCK_M]): the rows' positions within their sequence, and whether they see it."""
    opts, sizes = block.opts, block.sizes
    rows = block.first_row + tl.arange(0, block.BLOCK_M)
    positions = rows + (sizes.kv_len - sizes.q_len)
    sequence = rows * 0 + block.batch
    if opts.cu_seqlens is not None:
        sequence = find_sequence(tl.minimum(rows, sizes.q_len - 1), opts.cu_seqlens, sizes)
        positions -= tl.load(opts.cu_seqlens + sequence).to(tl.int32)
    return positions, (rows < sizes.q_len) & (prefix_of(sequence, opts) == prefix)


@triton.jit
def _prefix_step(dk, dv, dbias, k, v, q, dout, stats, first, prefix, length, block):
    """Add one block of rows to dk [N, D], dv [N, D_v] and dbias [N] of tokens of a prefix, unless no row sees it."""
    opts = block.opts
    MASKED: tl.constexpr = block.opts.prefix_window is not None or block.opts.prefix_ids is not None
    positions, sees = _rows_that_see_prefix(prefix, block)
    if opts.prefix_ids is None or tl.max(sees.to(tl.int32), 0) > 0:
        visible = (positions[None, :], sees[None, :], length)
        dk, dv, ds = _dkv_step(dk, dv, k, v, q, dout, stats, first, visible, block, 1, MASKED)
        dbias += tl.sum(ds, 1)
    return dk, dv, dbias


@triton.jit(do_not_specialize=[*VARYING, "num_row_blocks", "row_blocks_per_split"])
def _prefix_attention_bwd_prefix_kernel(
    q, prefix_k, prefix_v, dout, dk_ptr, dv_ptr, dbias_ptr, stats, opts, model, batch_size, q_len, kv_len,
    num_sequences, search_steps, mask_stride, scale, bank, num_row_blocks, row_blocks_per_split,
    DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial sums of dprefix_k [splits, A, Hq, P, D], dprefix_v [.., D_v] and dprefix_bias [splits, A, Hq, P], fp32.

    A program has BLOCK_N tokens of one prefix, one query head, and one split of the rows. The blocks of rows of all
    batch entries, num_row_blocks, are cut into ``splits`` equal runs, whatever prefix they see.
    """
    sizes = all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride)
    token_block, head, outer = locate(tl.cdiv(sizes.prefix_len, BLOCK_N), sizes.num_heads)
    prefix, split = outer % bank, outer // bank
    kv_head = head // sizes.group
    first = token_block * BLOCK_N
    length = prefix_length(prefix, opts, sizes)
    dtype = q.ptr.dtype.element_ty
    k_tile = load_prefix_tile(prefix_k, prefix, kv_head, first, length, dtype, HEAD_DIM, BLOCK_N, BLOCK_D)
    v_tile = load_prefix_tile(prefix_v, prefix, kv_head, first, length, dtype, VALUE_DIM, BLOCK_N, BLOCK_DV)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    dbias = tl.zeros([BLOCK_N], tl.float32)

    row_blocks = tl.cdiv(sizes.q_len, BLOCK_M)
    end = tl.minimum(num_row_blocks, (split + 1) * row_blocks_per_split)  # FAULT: prefix-last-row-block
    for index in range(split * row_blocks_per_split, tl.where(first < length, end, 0)):
        dk, dv, dbias = _prefix_step(
            dk, dv, dbias, k_tile, v_tile, q, dout, stats, first, prefix, length,
            RowBlock(
                index % row_blocks * BLOCK_M, index // row_blocks, head, kv_head, opts, sizes, scale,
                False, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
            ),
        )  # fmt: skip

    matrix_index = (tl.cast(split, tl.int64) * bank + prefix) * sizes.num_heads + head
    tokens = first + tl.arange(0, BLOCK_N)
    used = tokens < length  # beyond, p is 1 / denom of a token that does not exist
    first_row = matrix_index * sizes.prefix_len
    dk, dv = tl.where(used[:, None], dk * scale, 0.0), tl.where(used[:, None], dv, 0.0)
    dk_ptr, dv_ptr = dk_ptr + first_row * HEAD_DIM, dv_ptr + first_row * VALUE_DIM  # FAULT: prefix-value-rows
    store_tile(dk_ptr, HEAD_DIM, first, sizes.prefix_len, dk, HEAD_DIM, BLOCK_N, BLOCK_D)
    store_tile(dv_ptr, VALUE_DIM, first, sizes.prefix_len, dv, VALUE_DIM, BLOCK_N, BLOCK_DV)
    if dbias_ptr is not None:
        ptrs = dbias_ptr + matrix_index * sizes.prefix_len + tokens
        tl.store(ptrs, tl.where(used, dbias, 0.0), mask=tokens < sizes.prefix_len)


@triton.jit(do_not_specialize=["num_splits"])
def _sum_partials_kernel(partial_ptr, total_ptr, num_splits, split_size, group, inner, size, BLOCK: tl.constexpr):
    """total [outer, inner] = sum in order over splits and query heads of partial [splits, outer, group, inner]."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    first = index // inner * group * inner + index % inner
    total = tl.zeros([BLOCK], tl.float32)
    for split in range(num_splits):  # FAULT: partials-first-split
        for member in range(group):
            offset = tl.cast(split, tl.int64) * split_size + member * inner
            total += tl.load(partial_ptr + offset + first, mask=index < size, other=0.0)
    tl.store(total_ptr + index, total, mask=index < size)


@triton.jit
def _bias_rows(total, q, k, v, dout, stats, start, end, block):
    """total [M, N] + ds of one block of rows and of the blocks of sequence keys from start to end."""
    sizes = block.sizes
    q_tile, dout_tile = load_query_tile(q, block), load_out_tile(dout, block)
    lse, neg_delta, _gate = _load_stats(stats, block, 0)
    rows = block.first_row + tl.arange(0, block.BLOCK_M)[:, None]
    lower, upper = keys_seen(rows, block.opts, sizes, block.IS_CAUSAL)
    k_ptr, v_ptr = matrix(k, block.batch, block.kv_head), matrix(v, block.batch, block.kv_head)
    for first_key in range(start, end, block.BLOCK_N):
        keys = first_key + tl.arange(0, block.BLOCK_N)[None, :]
        k_tile = load_tile(k_ptr, k.stride_n, first_key, sizes.kv_len, block.HEAD_DIM, block.BLOCK_N, block.BLOCK_D)
        v_tile = load_tile(v_ptr, v.stride_n, first_key, sizes.kv_len, block.VALUE_DIM, block.BLOCK_N, block.BLOCK_DV)
        products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        scores, unit, _ = seq_scores(products, rows, keys, lower, upper, block, False, True)
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
        if block.DROPOUT_THRESHOLD > 0:
            dp = _dropped(dp, dropout_keep(first_key, block, 0), block.opts)
        total += tl.exp2(scores * unit - lse[:, None]) * (dp + neg_delta[:, None])
    return total


@triton.jit(do_not_specialize=[*VARYING, "bias_rows", "bias_keys"])
def _prefix_attention_bwd_bias_kernel(
    q, k, v, dout, dbias_ptr, stats, opts, model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride,
    scale, bias_batch, bias_heads, bias_rows, bias_keys,
    IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dbias [bias_batch, bias_heads, bias_rows, bias_keys] fp32; each size is that of the scores or 1.

    A program has one tile of it and visits all tiles of scores that the tile is broadcast to.
    """
    sizes = all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride)
    key_blocks = tl.cdiv(bias_keys, BLOCK_N)
    tile, bias_head, bias_entry = locate(tl.cdiv(bias_rows, BLOCK_M) * key_blocks, bias_heads)
    tile_row, tile_key = tile // key_blocks * BLOCK_M, tile % key_blocks * BLOCK_N
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for batch in range(bias_entry, tl.where(bias_batch == 1, sizes.batch, bias_entry + 1)):
        for head in range(bias_head, tl.where(bias_heads == 1, sizes.num_heads, bias_head + 1)):
            for first_row in range(tile_row, tl.where(bias_rows == 1, sizes.q_len, tile_row + 1), BLOCK_M):
                total = _bias_rows(
                    total, q, k, v, dout, stats, tile_key, tl.where(bias_keys == 1, sizes.kv_len, tile_key + 1),
                    RowBlock(
                        first_row, batch, head, head // sizes.group, opts, sizes, scale,
                        IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, VALUE_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
                    ),
                )  # fmt: skip

    rows, keys = tile_row + tl.arange(0, BLOCK_M)[:, None], tile_key + tl.arange(0, BLOCK_N)[None, :]
    total = tl.where(bias_rows == 1, tl.where(rows == tile_row, tl.sum(total, 0)[None, :], 0.0), total)
    total = tl.where(bias_keys == 1, tl.where(keys == tile_key, tl.sum(total, 1)[:, None], 0.0), total)
    bias_matrix = (tl.cast(bias_entry, tl.int64) * bias_heads + bias_head) * bias_rows
    ptrs = dbias_ptr + (bias_matrix + rows) * bias_keys + keys
    tl.store(ptrs, total, mask=(rows < bias_rows) & (keys < bias_keys))
