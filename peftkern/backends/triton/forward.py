# SPDX-License-Identifier: Apache-2.0
"""The fused forward: one online softmax over [prefix blocks | sequence blocks] (FlashAttention, Dao et al. 2022)."""

import triton
import triton.language as tl

from .blocks import (
    LN2,
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
    segment,
    seq_scores,
    store_tile,
    tanh,
)


@triton.jit
def _softmax_step(m, denom, acc, scores, v, dout, keep, HAS_DROPOUT: tl.constexpr):
    """One block on: running maximum m [M], denominator [M], and weighted values acc [M, D], or with dout [M, D]
    their products with it, acc [M]."""
    m_new = tl.maximum(m, tl.max(scores, 1))
    pivot = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.exp2(scores - pivot[:, None])
    decay = tl.exp2(m - pivot)
    denom = denom * decay + tl.sum(p, 1)
    if HAS_DROPOUT:
        p = tl.where(keep, p, 0.0)
    if dout is None:
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    else:
        acc = acc * decay + tl.sum(p * tl.dot(dout, tl.trans(v), input_precision="ieee"), 1)
    return m_new, denom, acc


@triton.jit
def _attend_prefix_blocks(
    m, denom, acc, q, dout, k_ptr, stride_k, v_ptr, stride_v, low, high, length, first_row, positions, sees,
    batch_head, head, opts, sizes, scale,
    DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Tokens low to high of one prefix."""
    for first_slot in range(low, high, BLOCK_N):
        k = load_tile(k_ptr, stride_k, first_slot, length, HEAD_DIM, BLOCK_N, BLOCK_D, INSIDE=not MASKED)
        slots = first_slot + tl.arange(0, BLOCK_N)[None, :]
        products = tl.dot(q, tl.trans(k.to(q.dtype)), input_precision="ieee")
        scores, _ = prefix_scores(products, scale, positions, slots, sees, length, head, opts, sizes, MASKED)
        v = load_tile(v_ptr, stride_v, first_slot, length, HEAD_DIM, BLOCK_N, BLOCK_D, INSIDE=not MASKED)
        keep = None
        if DROPOUT_THRESHOLD > 0:
            keep = dropout_keep(opts, first_row, first_slot, batch_head, 1, DROPOUT_THRESHOLD, BLOCK_M, BLOCK_N)
        m, denom, acc = _softmax_step(m, denom, acc, scores, v.to(q.dtype), dout, keep, DROPOUT_THRESHOLD > 0)
    return m, denom, acc


@triton.jit
def _attend_one_prefix(
    m, denom, acc, q, dout, prefix_k, prefix_v, prefix, first_row, positions, sees, batch_head, head, opts, sizes,
    scale,
    DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SOME_SEE: tl.constexpr,
):  # fmt: skip
    """All blocks of prefix number ``prefix`` (-1: none). SOME_SEE: not every row sees it, but those in ``sees``."""
    length = prefix_length(prefix, opts, sizes)
    kv_head = head // sizes.group
    k_ptr, v_ptr = matrix(prefix_k, prefix, kv_head), matrix(prefix_v, prefix, kv_head)
    low = length * 0
    if opts.prefix_window is not None:
        nearest = tl.min(tl.min(positions, 1), 0)
        low = tl.maximum(0, length + nearest - opts.prefix_window + 1) // BLOCK_N * BLOCK_N
    full_high = low
    if not (SOME_SEE or opts.prefix_window is not None):
        full_high = length // BLOCK_N * BLOCK_N
        m, denom, acc = _attend_prefix_blocks(
            m, denom, acc, q, dout, k_ptr, prefix_k.stride_n, v_ptr, prefix_v.stride_n, low, full_high, length,
            first_row, positions, sees, batch_head, head, opts, sizes, scale,
            DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    return _attend_prefix_blocks(
        m, denom, acc, q, dout, k_ptr, prefix_k.stride_n, v_ptr, prefix_v.stride_n, full_high, length, length,
        first_row, positions, sees, batch_head, head, opts, sizes, scale,
        DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip


@triton.jit
def _attend_prefix(
    m, denom, acc, q, dout, prefix_k, prefix_v, first_row, batch, head, opts, sizes, scale,
    DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The prefixes that a block of rows sees: one, or with packed input and a bank one per sequence in the block."""
    rows = first_row + tl.arange(0, BLOCK_M)
    positions = (rows + (sizes.kv_len - sizes.q_len))[:, None]
    sees = rows[:, None] < sizes.q_len
    batch_head = batch * sizes.num_heads + head
    packed = tl.minimum(rows, sizes.q_len - 1)
    if opts.cu_seqlens is not None and opts.prefix_window is not None:
        start, _ = segment(packed, opts, sizes)
        positions = positions - start[:, None]
    if opts.cu_seqlens is not None and opts.prefix_ids is not None:
        sequence = find_sequence(packed, opts, sizes)
        for s in range(tl.min(sequence, 0), tl.max(sequence, 0) + 1):
            prefix = tl.load(opts.prefix_ids + s).to(tl.int32)
            m, denom, acc = _attend_one_prefix(
                m, denom, acc, q, dout, prefix_k, prefix_v, prefix, first_row, positions, sequence[:, None] == s,
                batch_head, head, opts, sizes, scale, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True,
            )  # fmt: skip
    else:
        m, denom, acc = _attend_one_prefix(
            m, denom, acc, q, dout, prefix_k, prefix_v, prefix_of(batch, opts), first_row, positions, sees,
            batch_head, head, opts, sizes, scale, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    return m, denom, acc


@triton.jit
def _attend_sequence(
    m, denom, acc, q, dout, k, v, low, high, first_row, first, end, batch, head, opts, sizes, scale,
    IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Sequence keys low to high."""
    kv_head = head // sizes.group
    k_ptr, v_ptr = matrix(k, batch, kv_head), matrix(v, batch, kv_head)
    rows = first_row + tl.arange(0, BLOCK_M)[:, None]
    for first_key in range(low, high, BLOCK_N):
        keys = first_key + tl.arange(0, BLOCK_N)[None, :]
        k_tile = load_tile(k_ptr, k.stride_n, first_key, sizes.kv_len, HEAD_DIM, BLOCK_N, BLOCK_D, INSIDE=not MASKED)
        products = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
        scores, _ = seq_scores(
            products, scale, rows, keys, keys, first, end, batch, head, opts, sizes, IS_CAUSAL, MASKED
        )
        v_tile = load_tile(v_ptr, v.stride_n, first_key, sizes.kv_len, HEAD_DIM, BLOCK_N, BLOCK_D, INSIDE=not MASKED)
        keep = None
        if DROPOUT_THRESHOLD > 0:
            batch_head = batch * sizes.num_heads + head
            keep = dropout_keep(opts, first_row, first_key, batch_head, 0, DROPOUT_THRESHOLD, BLOCK_M, BLOCK_N)
        m, denom, acc = _softmax_step(m, denom, acc, scores, v_tile, dout, keep, DROPOUT_THRESHOLD > 0)
    return m, denom, acc


@triton.jit
def _empty_softmax(dout, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """(m, denom, acc) over no keys."""
    zeros = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32) if dout is None else zeros
    return zeros - float("inf"), zeros, acc


@triton.jit
def attend(
    q, dout, k, v, prefix_k, prefix_v, first_row, batch, head, opts, sizes, scale,
    IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The softmax (m, denom, acc) of a tile q over prefix, sequence and sink; before it that of a gated prefix.

    acc is the sum of weighted values [M, D], or where dout [M, D] is not None, of its products with them [M].
    """
    m, denom, acc = _empty_softmax(dout, BLOCK_M, BLOCK_D)
    m, denom, acc = _attend_prefix(
        m, denom, acc, q, dout, prefix_k, prefix_v, first_row, batch, head, opts, sizes, scale,
        DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    prefix_m, prefix_denom, prefix_acc = m, denom, acc
    if opts.gate is not None:
        m, denom, acc = _empty_softmax(dout, BLOCK_M, BLOCK_D)

    first, end = segment(tl.minimum(first_row + tl.arange(0, BLOCK_M)[:, None], sizes.q_len - 1), opts, sizes)
    FULL: tl.constexpr = (opts.cu_seqlens is None) and (opts.key_mask is None)
    low, full_low, full_high, high = key_range(first_row, opts, sizes, IS_CAUSAL, BLOCK_M, BLOCK_N)
    if FULL and opts.window is not None:
        m, denom, acc = _attend_sequence(
            m, denom, acc, q, dout, k, v, low, tl.minimum(full_low, high), first_row, first, end, batch, head,
            opts, sizes, scale, IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
    if FULL:
        m, denom, acc = _attend_sequence(
            m, denom, acc, q, dout, k, v, full_low, full_high, first_row, first, end, batch, head, opts, sizes,
            scale, IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, False,
        )  # fmt: skip
    m, denom, acc = _attend_sequence(
        m, denom, acc, q, dout, k, v, full_high, high, first_row, first, end, batch, head, opts, sizes, scale,
        IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, True,
    )  # fmt: skip

    if opts.sinks is not None:
        sink = tl.load(opts.sinks + head) * LOG2E
        m_new = tl.maximum(m, sink)
        pivot = tl.where(m_new == -float("inf"), 0.0, m_new)
        decay = tl.exp2(m - pivot)
        denom = denom * decay + tl.exp2(sink - pivot)
        acc = acc * (decay[:, None] if dout is None else decay)
        m = m_new
    return prefix_m, prefix_denom, prefix_acc, m, denom, acc


@triton.jit
def inverse(denom, opts):
    """What turns acc into an average: 1 / denom, with dropout's scale; 1 where no key is visible, and acc is 0."""
    factor = 1.0 / tl.where(denom == 0.0, 1.0, denom)
    if opts.dropout_scale is not None:
        factor *= opts.dropout_scale
    return factor


@triton.jit
def _prefix_attention_fwd_kernel(
    q, k, v, prefix_k, prefix_v, out, lse_ptr, opts, sizes, scale,
    IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [B, Hq, S, D] and lse [B, Hq, S]; a program per BLOCK_M rows of one head.

    ::

        out = sum_j exp2(s_j) v_j / (exp2(sink) + sum_j exp2(s_j))      s = log2(e) * score, j over prefix and keys
    """
    block, head, batch = locate(tl.cdiv(sizes.q_len, BLOCK_M), sizes.num_heads)
    first_row = block * BLOCK_M
    q_tile = load_tile(matrix(q, batch, head), q.stride_n, first_row, sizes.q_len, HEAD_DIM, BLOCK_M, BLOCK_D)
    _, prefix_denom, prefix_acc, m, denom, acc = attend(
        q_tile, None, k, v, prefix_k, prefix_v, first_row, batch, head, opts, sizes, scale,
        IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    result = acc * inverse(denom, opts)[:, None]
    if opts.gate is not None:
        result += prefix_acc * (inverse(prefix_denom, opts) * tanh(tl.load(opts.gate + head)))[:, None]
    store_tile(matrix(out, batch, head), out.stride_n, first_row, sizes.q_len, result, HEAD_DIM, BLOCK_M, BLOCK_D)
    rows = first_row + tl.arange(0, BLOCK_M)
    lse_row = lse_ptr + (tl.cast(batch, tl.int64) * sizes.num_heads + head) * sizes.q_len
    tl.store(lse_row + rows, (m + tl.log2(denom)) * LN2, mask=rows < sizes.q_len)
