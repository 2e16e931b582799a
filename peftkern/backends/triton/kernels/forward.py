# SPDX-License-Identifier: Apache-2.0
"""The fused forward: one online softmax over [prefix blocks | sequence blocks] (FlashAttention, Dao et al. 2022).

:func:`visit_prefixes` and :func:`visit_sequence` walk a block of rows over the keys that it sees. What is done at
each block of keys is ``STEP(state, context, scores, unit, slope, k, v, keep, opts)``, which returns the state.

Loads are by pointer on every GPU. Tensor descriptors (TMA) were compiled for comparison: at D = 128 they save 26
registers on sm_90 and 51 on sm_100, but no more blocks fit a multiprocessor, and sm_90 gets 15 % more instructions.
"""

import triton
import triton.language as tl

from .blocks import (
    LN2,
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
    segment,
    seq_scores,
    store_tile,
    tanh,
)


@triton.jit
def visit_prefix(
    STEP: tl.constexpr, state, context, q, prefix_k, prefix_v, prefix, start, end, first_row, positions, sees, batch,
    kv_head, head, opts, sizes, scale,
    DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Tokens start (a multiple of BLOCK_N) to end of prefix number ``prefix`` (-1: none), full blocks first.

    ``positions`` and ``sees`` as in :func:`prefix_scores`; ``head`` may be a tensor [BLOCK_M, 1].
    """
    length = prefix_length(prefix, opts, sizes)
    k_ptr, v_ptr = matrix(prefix_k, prefix, kv_head), matrix(prefix_v, prefix, kv_head)
    low, high = start, tl.minimum(length, end)
    if opts.prefix_window is not None:
        nearest = tl.min(tl.min(positions, 1), 0)
        low = tl.maximum(low, (length + nearest - opts.prefix_window + 1) // BLOCK_N * BLOCK_N)
    FULL: tl.constexpr = sees is None and opts.prefix_window is None
    bounds = (low, tl.maximum(low, high // BLOCK_N * BLOCK_N) if FULL else low, high)
    for part in tl.static_range(0 if FULL else 1, 2):
        for first_slot in range(bounds[part], bounds[part + 1], BLOCK_N):
            k = load_tile(k_ptr, prefix_k.stride_n, first_slot, length, HEAD_DIM, BLOCK_N, BLOCK_D, part == 0)
            k = k.to(q.dtype)
            slots = first_slot + tl.arange(0, BLOCK_N)[None, :]
            products = tl.dot(q, tl.trans(k), input_precision="ieee")
            scores, unit, slope = prefix_scores(
                products, scale, positions, slots, sees, length, head, opts, sizes, part == 1
            )
            v = load_tile(v_ptr, prefix_v.stride_n, first_slot, length, HEAD_DIM, BLOCK_N, BLOCK_D, part == 0)
            keep = None
            if DROPOUT_THRESHOLD > 0:
                keep = dropout_keep(
                    opts, first_row, first_slot, batch * sizes.num_heads + head, 1, DROPOUT_THRESHOLD, BLOCK_M,
                    BLOCK_N,
                )  # fmt: skip
            state = STEP(state, context, scores, unit, slope, k, v.to(q.dtype), keep, opts)
    return state


@triton.jit
def visit_prefixes(
    STEP: tl.constexpr, state, context, q, prefix_k, prefix_v, first_row, batch, head, opts, sizes, scale,
    DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The prefixes that a block of rows sees: one, or with packed input and a bank one per sequence in the block."""
    rows = first_row + tl.arange(0, BLOCK_M)
    positions = (rows + (sizes.kv_len - sizes.q_len))[:, None]
    packed = tl.minimum(rows, sizes.q_len - 1)
    kv_head = head // sizes.group
    if opts.cu_seqlens is not None and opts.prefix_window is not None:
        start, _ = segment(packed, opts, sizes)
        positions = positions - start[:, None]
    if opts.cu_seqlens is not None and opts.prefix_ids is not None:
        sequence = find_sequence(packed, opts, sizes)
        for s in range(tl.min(sequence, 0), tl.max(sequence, 0) + 1):
            prefix = tl.load(opts.prefix_ids + s).to(tl.int32)
            state = visit_prefix(
                STEP, state, context, q, prefix_k, prefix_v, prefix, 0, sizes.prefix_len, first_row, positions,
                sequence[:, None] == s, batch, kv_head, head, opts, sizes, scale,
                DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
            )  # fmt: skip
    else:
        state = visit_prefix(
            STEP, state, context, q, prefix_k, prefix_v, prefix_of(batch, opts), 0, sizes.prefix_len, first_row,
            positions, None, batch, kv_head, head, opts, sizes, scale,
            DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    return state


@triton.jit
def visit_sequence(
    STEP: tl.constexpr, state, context, q, k, v, bounds, first_row, rows, batch, kv_head, head, opts, sizes, scale,
    IS_CAUSAL: tl.constexpr, DROPOUT_THRESHOLD: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Sequence keys within ``bounds``, which are those of :func:`key_range`, for ``rows`` [BLOCK_M, 1].

    First those cut by the window, then those that all rows see, then those cut by the diagonal or the end.
    """
    k_ptr, v_ptr = matrix(k, batch, kv_head), matrix(v, batch, kv_head)
    lower, upper = keys_seen(rows, opts, sizes, IS_CAUSAL)
    FULL: tl.constexpr = (opts.cu_seqlens is None) and (opts.key_mask is None)
    FIRST: tl.constexpr = 2 if not FULL else (1 if opts.window is None else 0)
    for part in tl.static_range(FIRST, 3):
        for first_key in range(bounds[part], bounds[part + 1], BLOCK_N):
            keys = first_key + tl.arange(0, BLOCK_N)[None, :]
            k_tile = load_tile(k_ptr, k.stride_n, first_key, sizes.kv_len, HEAD_DIM, BLOCK_N, BLOCK_D, part == 1)
            products = tl.dot(q, tl.trans(k_tile), input_precision="ieee")
            scores, unit, slope = seq_scores(
                products, scale, rows, keys, lower, upper, batch, head, opts, sizes, IS_CAUSAL, False, part != 1
            )
            v_tile = load_tile(v_ptr, v.stride_n, first_key, sizes.kv_len, HEAD_DIM, BLOCK_N, BLOCK_D, part == 1)
            keep = None
            if DROPOUT_THRESHOLD > 0:
                keep = dropout_keep(
                    opts, first_row, first_key, batch * sizes.num_heads + head, 0, DROPOUT_THRESHOLD, BLOCK_M,
                    BLOCK_N,
                )  # fmt: skip
            state = STEP(state, context, scores, unit, slope, k_tile, v_tile, keep, opts)
    return state


@triton.jit
def softmax_step(state, dout, scores, unit, slope, k, v, keep, opts):
    """One block on: running maximum m [M], denominator [M], and weighted values acc [M, D], or with dout [M, D]
    their products with it, acc [M]."""
    m, denom, acc = state
    m_new = tl.maximum(m, tl.max(scores, 1) * unit)
    pivot = tl.where(m_new == -float("inf"), 0.0, m_new)
    p = tl.exp2(scores * unit - pivot[:, None])
    decay = tl.exp2(m - pivot)
    denom = denom * decay + tl.sum(p, 1)
    if keep is not None:
        p = tl.where(keep, p, 0.0)
    if dout is None:
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    else:
        acc = acc * decay + tl.sum(p * tl.dot(dout, tl.trans(v), input_precision="ieee"), 1)
    return m_new, denom, acc


@triton.jit
def empty_softmax(dout, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
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
    prefix_state = visit_prefixes(
        softmax_step, empty_softmax(dout, BLOCK_M, BLOCK_D), dout, q, prefix_k, prefix_v, first_row, batch, head,
        opts, sizes, scale, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    state = prefix_state if opts.gate is None else empty_softmax(dout, BLOCK_M, BLOCK_D)
    m, denom, acc = visit_sequence(
        softmax_step, state, dout, q, k, v, key_range(first_row, opts, sizes, IS_CAUSAL, BLOCK_M, BLOCK_N),
        first_row, first_row + tl.arange(0, BLOCK_M)[:, None], batch, head // sizes.group, head, opts, sizes,
        scale, IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    if opts.sinks is not None:
        sink = tl.load(opts.sinks + head) * LOG2E
        m_new = tl.maximum(m, sink)
        pivot = tl.where(m_new == -float("inf"), 0.0, m_new)
        decay = tl.exp2(m - pivot)
        denom = denom * decay + tl.exp2(sink - pivot)
        acc = acc * (decay[:, None] if dout is None else decay)
        m = m_new
    return prefix_state, (m, denom, acc)


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
    prefix_state, (m, denom, acc) = attend(
        q_tile, None, k, v, prefix_k, prefix_v, first_row, batch, head, opts, sizes, scale,
        IS_CAUSAL, DROPOUT_THRESHOLD, HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N,
    )  # fmt: skip
    result = acc * inverse(denom, opts)[:, None]
    if opts.gate is not None:
        _, prefix_denom, prefix_acc = prefix_state
        result += prefix_acc * (inverse(prefix_denom, opts) * tanh(tl.load(opts.gate + head)))[:, None]
    store_tile(matrix(out, batch, head), out.stride_n, first_row, sizes.q_len, result, HEAD_DIM, BLOCK_M, BLOCK_D)
    rows = first_row + tl.arange(0, BLOCK_M)
    lse_row = lse_ptr + (tl.cast(batch, tl.int64) * sizes.num_heads + head) * sizes.q_len
    tl.store(lse_row + rows, (m + tl.log2(denom)) * LN2, mask=rows < sizes.q_len)
