# SPDX-License-Identifier: Apache-2.0
"""Helpers of the attention kernels: tiles, scores, visibility, softmax states, packed sequences, dropout.

A score times its unit is a logarithm to base 2, because a GPU has an instruction for exp2 but not for exp. ``rows``
(queries) and ``keys`` are index tensors of two dims that broadcast against each other: [M, 1] and [1, N] or,
transposed, [1, M] and [N, 1].

Comments that start with FAULT name lines that tests edit, one at a time, to see whether the checks notice.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..arguments import Sizes

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
#: The arguments of a kernel that vary from call to call, of all kernels that take :class:`Sizes`.
VARYING = ["batch_size", "q_len", "kv_len", "num_sequences", "search_steps", "mask_stride"]


class RowBlock(NamedTuple):
    """BLOCK_M rows (queries) of one head, and the call that they belong to.

    ``head`` may be a tensor [BLOCK_M, 1] if the rows have no dropout. ``opts``, ``sizes`` and the names in capitals
    are those of :mod:`peftkern.backends.triton.arguments` and :mod:`peftkern.backends.triton.tiles`. It is always
    built within a call's arguments: an assignment would make tensors of its constants.
    """

    first_row: Any
    batch: Any
    head: Any
    kv_head: Any
    opts: Any
    sizes: Any
    scale: Any
    IS_CAUSAL: Any
    DROPOUT_THRESHOLD: Any
    HEAD_DIM: Any
    BLOCK_D: Any
    VALUE_DIM: Any
    BLOCK_DV: Any
    BLOCK_M: Any
    BLOCK_N: Any


@triton.jit
def all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride):
    """The sizes of a call from a kernel's arguments."""
    return Sizes(
        batch_size, model.num_heads, model.group, q_len, kv_len, model.prefix_len, num_sequences, search_steps,
        mask_stride,
    )  # fmt: skip


@triton.jit
def locate(num_blocks, num_heads):
    """(block, head, batch) of this program. The last block comes first: if causal, it sees most keys."""
    pid = tl.program_id(0)
    outer = pid // num_blocks
    return num_blocks - 1 - pid % num_blocks, outer % num_heads, outer // num_heads


@triton.jit
def matrix(x, batch, head):
    """The pointer to the [N, D] matrix of one batch entry (or prefix) and head."""
    return x.ptr + tl.cast(batch, tl.int64) * x.stride_b + tl.cast(head, tl.int64) * x.stride_h


@triton.jit
def row_pointers(ptr, stride_n, rows, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D]: pointers to ``rows`` [BLOCK] of a matrix. Offsets are 64-bit."""
    return ptr + rows.to(tl.int64)[:, None] * stride_n + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def tile_pointers(ptr, stride_n, first, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D]: pointers to the rows from ``first`` on. Offsets are 64-bit to the tile, 32-bit within it."""
    within = tl.arange(0, BLOCK)[:, None] * stride_n + tl.arange(0, BLOCK_D)[None, :]
    return ptr + tl.cast(first, tl.int64) * stride_n + within


@triton.jit
def tile_mask(first, length, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D]: true within the first ``length`` rows and HEAD_DIM columns."""
    mask = first + tl.arange(0, BLOCK)[:, None] < length  # FAULT: tile-length
    if HEAD_DIM != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    return mask


@triton.jit
def load_tile(
    ptr, stride_n, first, length, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    INSIDE: tl.constexpr = False,
):  # fmt: skip
    """[BLOCK, BLOCK_D]: the rows from ``first`` on of a matrix, 0 outside of it. INSIDE: no row is outside."""
    ptrs = tile_pointers(ptr, stride_n, first, BLOCK, BLOCK_D)
    if not INSIDE:
        tile = tl.load(ptrs, mask=tile_mask(first, length, HEAD_DIM, BLOCK, BLOCK_D), other=0.0)
    elif HEAD_DIM != BLOCK_D:
        tile = tl.load(ptrs, mask=tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(ptrs)
    return tile


@triton.jit
def store_tile(
    ptr, stride_n, first, length, tile, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """Store the part of ``tile`` [BLOCK, BLOCK_D] that is inside of the matrix, rounded to the memory's dtype."""
    ptrs = tile_pointers(ptr, stride_n, first, BLOCK, BLOCK_D)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=tile_mask(first, length, HEAD_DIM, BLOCK, BLOCK_D))


@triton.jit
def load_prefix_tile(
    prefix, number, kv_head, first, length, dtype,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, INSIDE: tl.constexpr = False,
):  # fmt: skip
    """[BLOCK_N, BLOCK_D]: the tokens from ``first`` on of prefix ``number``, rounded to ``dtype``."""
    ptr = matrix(prefix, number, kv_head)
    return load_tile(ptr, prefix.stride_n, first, length, HEAD_DIM, BLOCK_N, BLOCK_D, INSIDE).to(dtype)


@triton.jit
def load_query_tile(x, block):
    """[BLOCK_M, BLOCK_D]: a block of rows of q, or of what is shaped like it."""
    ptr = matrix(x, block.batch, block.head)
    length = block.sizes.q_len
    return load_tile(ptr, x.stride_n, block.first_row, length, block.HEAD_DIM, block.BLOCK_M, block.BLOCK_D)


@triton.jit
def load_out_tile(x, block):
    """[BLOCK_M, BLOCK_DV]: a block of rows of out, or of what is shaped like it."""
    ptr = matrix(x, block.batch, block.head)
    length = block.sizes.q_len
    # FAULT: out-columns
    return load_tile(ptr, x.stride_n, block.first_row, length, block.VALUE_DIM, block.BLOCK_M, block.BLOCK_DV)


@triton.jit
def store_query_tile(x, tile, block):
    """Store a block of rows of dq."""
    ptr = matrix(x, block.batch, block.head)
    length = block.sizes.q_len
    store_tile(ptr, x.stride_n, block.first_row, length, tile, block.HEAD_DIM, block.BLOCK_M, block.BLOCK_D)


@triton.jit
def store_out_tile(x, tile, block):
    """Store a block of rows of out."""
    ptr = matrix(x, block.batch, block.head)
    stride, length = x.stride_n, block.sizes.q_len  # FAULT: query-tile-stride
    store_tile(ptr, stride, block.first_row, length, tile, block.VALUE_DIM, block.BLOCK_M, block.BLOCK_DV)


@triton.jit
def row_offset(batch, head, sizes):
    """The offset of one head's rows in a contiguous [B, Hq, S] tensor."""
    return (tl.cast(batch, tl.int64) * sizes.num_heads + head) * sizes.q_len


@triton.jit
def tanh(x):
    """tanh by exp2. Near 0, where 1 - 2 / (exp(2x) + 1) would cancel, by its Taylor series."""
    x2 = x * x
    series = 1.0 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835 - x2 * (1382 / 155925)))))
    return tl.where(tl.abs(x) < 0.3, x * series, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit
def softcapped(products, scale, opts, ADDS: tl.constexpr):
    """(scores, unit, slope): ``scores * unit`` are the scores before bias, slope is d score / d (scale * product).

    If products are only scaled, they are returned as they are, with the scale as their unit. The softmax then fuses
    scale and subtract into one FMA. ADDS: a bias will be added.
    """
    slope = 1.0
    unit = 1.0
    if opts.softcap is not None:
        capped = tanh(products * (scale / opts.softcap))
        scores = capped * (opts.softcap * LOG2E)
        slope = 1.0 - capped * capped
    elif ADDS or opts.ordered is None:
        scores = products * (scale * LOG2E)
    else:
        scores = products
        unit = scale * LOG2E
    return scores, unit, slope


@triton.jit
def find_sequence(index, starts, sizes):
    """The packed sequence that holds each token of ``index``: the last one that starts at or before the token.

    ``starts`` points to the first token of each sequence.
    """
    low = index * 0
    high = low + sizes.num_sequences
    for _ in range(sizes.search_steps):
        middle = (low + high) // 2
        starts_before = tl.load(starts + middle) <= index  # FAULT: sequence-search
        narrow = high - low > 1
        high = tl.where(starts_before | (narrow == 0), high, middle)
        low = tl.where(starts_before & narrow, middle, low)
    return low


@triton.jit
def segment(index, opts, sizes):
    """(first, end) of the packed sequence of each token; (0, T) if the input is not packed."""
    if opts.cu_seqlens is None:
        first = index * 0
        end = first + sizes.kv_len
    else:
        start = opts.cu_seqlens + find_sequence(index, opts.cu_seqlens, sizes)
        first, end = tl.load(start).to(tl.int32), tl.load(start + 1).to(tl.int32)
    return first, end


@triton.jit
def keys_seen(rows, opts, sizes, IS_CAUSAL: tl.constexpr):
    """(lower, upper): each row sees sequence keys lower <= key < upper.

    The bounds of rows beyond S mean nothing. Such rows are not stored.
    """
    offset = sizes.kv_len - sizes.q_len
    lower, upper = segment(tl.minimum(rows, sizes.q_len - 1), opts, sizes)
    if IS_CAUSAL:
        upper = rows + (offset + 1)  # FAULT: causal-upper
    if opts.window is not None:
        lower = tl.maximum(lower, rows + (offset + 1 - opts.window))  # FAULT: window-lower
    return lower, upper


@triton.jit
def rows_that_see(keys, opts, sizes, IS_CAUSAL: tl.constexpr):
    """(lower, upper): each sequence key is seen by rows lower <= row < upper.

    The bounds do not exclude rows beyond S. The statistics of such rows, an lse of inf, do.
    """
    offset = sizes.kv_len - sizes.q_len
    lower, upper = segment(tl.minimum(keys, sizes.kv_len - 1), opts, sizes)
    if IS_CAUSAL:
        lower = keys - offset
    if opts.window is not None:
        farthest = keys + (opts.window - offset)  # FAULT: window-farthest-row
        upper = farthest if opts.cu_seqlens is None else tl.minimum(upper, farthest)
    return lower, upper


@triton.jit
def seq_scores(products, rows, keys, lower, upper, block, BY_KEY: tl.constexpr, MASKED: tl.constexpr):
    """(scores, unit, slope) of sequence keys.

    ``lower`` and ``upper`` are :func:`keys_seen` of the rows or, BY_KEY, :func:`rows_that_see` of the keys. MASKED is
    false if every row of the block sees every key.
    """
    opts, sizes = block.opts, block.sizes
    scores, unit, slope = softcapped(products, block.scale, opts, opts.bias is not None)
    if opts.bias is not None:
        bias = opts.bias
        ptrs = matrix(bias, block.batch, block.head) + rows.to(tl.int64) * bias.stride_m
        ptrs += keys.to(tl.int64) * bias.stride_n
        inside = (rows < sizes.q_len) & (keys < sizes.kv_len)
        scores += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if MASKED:
        CUT: tl.constexpr = opts.window is not None or opts.cu_seqlens is not None
        if not BY_KEY:
            scores = tl.where(keys < upper, scores, -float("inf"))
            if CUT:
                scores = tl.where(keys >= lower, scores, -float("inf"))
        else:
            if block.IS_CAUSAL or opts.cu_seqlens is not None:
                scores = tl.where(rows >= lower, scores, -float("inf"))  # FAULT: first-row-that-sees
            if CUT:
                scores = tl.where(rows < upper, scores, -float("inf"))
        if opts.key_mask is not None:
            ptrs = opts.key_mask.ptr + tl.cast(block.batch, tl.int64) * sizes.mask_stride
            mask = tl.load(ptrs + keys * opts.key_mask.stride_n, mask=keys < sizes.kv_len, other=0)
            scores = tl.where(mask != 0, scores, -float("inf"))
    return scores, unit, slope


@triton.jit
def prefix_scores(products, positions, tokens, sees, length, block, MASKED: tl.constexpr):
    """(scores, unit, slope) of the first ``length`` tokens of a prefix.

    ``positions`` are the positions of the queries within their sequence, ``tokens`` the indices of the keys within
    the prefix. ``sees`` says which queries see this prefix; None: all of them.
    """
    opts = block.opts
    scores, unit, slope = softcapped(products, block.scale, opts, opts.prefix_bias is not None)
    if opts.prefix_bias is not None:
        bias = opts.prefix_bias
        ptrs = bias.ptr + block.head * bias.stride_h + tokens * bias.stride_n
        scores += tl.load(ptrs, mask=tokens < block.sizes.prefix_len, other=0.0).to(tl.float32) * LOG2E
    if MASKED:
        visible = tokens < length  # FAULT: prefix-length
        if sees is not None:
            visible = visible & sees
        if opts.prefix_window is not None:
            visible = visible & (length + positions - tokens < opts.prefix_window)  # FAULT: prefix-window
        scores = tl.where(visible, scores, -float("inf"))
    return scores, unit, slope


@triton.jit
def prefix_of(sequence, opts):
    """The number of the prefix that a sequence sees; -1 if it sees none."""
    prefix = sequence * 0
    if opts.prefix_ids is not None:
        prefix = tl.load(opts.prefix_ids + sequence).to(tl.int32)
    return prefix


@triton.jit
def prefix_length(prefix, opts, sizes):
    """The number of used tokens of a prefix; 0 for prefix -1."""
    if opts.prefix_lens is None:
        length = tl.where(prefix < 0, 0, sizes.prefix_len)
    else:
        length = tl.load(opts.prefix_lens + prefix, mask=prefix >= 0, other=0).to(tl.int32)
    return length


@triton.jit
def dropout_keep(first_key, block, OF_PREFIX: tl.constexpr):
    """[BLOCK_M, BLOCK_N] bool: which weights are kept, for keys from ``first_key``, a multiple of 4, on.

    OF_PREFIX is 1 for tokens of the prefix, 0 for keys of the sequence. See :func:`peftkern.reference.dropout_keep`.
    One call of Philox gives the words of four keys.
    """
    row, batch_head = block.first_row, block.batch * block.sizes.num_heads + block.head
    rows = row + tl.arange(0, block.BLOCK_M)[:, None] + tl.zeros([1, block.BLOCK_N // 4], tl.int32)
    quads = first_key // 4 + tl.arange(0, block.BLOCK_N // 4)[None, :] + tl.zeros([block.BLOCK_M, 1], tl.int32)
    zero = tl.zeros_like(rows)
    w0, w1, w2, w3 = tl.philox(tl.load(block.opts.seed), quads, rows, zero + batch_head, zero + OF_PREFIX)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))  # FAULT: dropout-words
    return words >= tl.full([], block.DROPOUT_THRESHOLD, tl.uint32)


@triton.jit
def finite(m):
    """m, or 0 if m is -inf. A score of -inf minus it is -inf, whereas -inf minus -inf would be NaN."""
    return tl.where(m == -float("inf"), 0.0, m)


@triton.jit
def merge_state(state, lse, values):
    """Merge another softmax state into (m, denom, acc): one with log2 sum ``lse`` and average ``values``.

    ``values`` None: the other state is a sink, which has no values; one of +inf gets the whole weight. m may be a
    tensor [M] or a scalar; acc has the shape of m, or one dim more.
    """
    m, denom, acc = state
    m_new = tl.maximum(m, lse)
    decay, weight = tl.exp2(m - finite(m_new)), tl.exp2(lse - finite(m_new))
    if values is None:
        weight = tl.where(lse == float("inf"), 1.0, weight)
    denom = denom * decay + weight  # FAULT: merge-decay, merge-weight
    WIDER: tl.constexpr = len(m.shape) == 1 and len(acc.shape) == 2
    factor = decay[:, None] if WIDER else decay
    if values is None:
        acc = acc * factor
    else:
        # a row that sees no key may hold anything, NaN included
        visible = weight[:, None] > 0.0  # FAULT: merge-hidden-row
        weighted = values.to(tl.float32) * weight[:, None]  # FAULT: merge-values
        acc = acc * factor + tl.where(visible, weighted, 0.0)
    return m_new, denom, acc


@triton.jit
def key_range(first_row, opts, sizes, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(low, full_low, full_high, high): the sequence keys that rows first_row to first_row + BLOCK_M - 1 see.

    All rows see all keys in [full_low, full_high). The first three bounds are multiples of BLOCK_N in rising order.
    ``high`` is the exact end and may lie below full_high.
    """
    last_row = tl.minimum(first_row + BLOCK_M, sizes.q_len) - 1
    offset = sizes.kv_len - sizes.q_len
    low = first_row * 0
    high = low + sizes.kv_len
    full_low = low
    if IS_CAUSAL:
        high = tl.minimum(high, last_row + offset + 1)  # FAULT: key-range-end
    if opts.window is not None:
        low = tl.maximum(low, first_row + offset - opts.window + 1)
        full_low = tl.maximum(low, last_row + offset - opts.window + 1)
    if opts.cu_seqlens is not None:
        first, _ = segment(first_row, opts, sizes)
        _, end = segment(last_row, opts, sizes)
        low, high = tl.maximum(low, first), tl.minimum(high, end)
    low = low // BLOCK_N * BLOCK_N
    full_low = tl.minimum(tl.maximum(low, tl.cdiv(full_low, BLOCK_N) * BLOCK_N), tl.cdiv(high, BLOCK_N) * BLOCK_N)
    full_high = high
    if IS_CAUSAL:
        full_high = tl.minimum(high, first_row + offset + 1)  # FAULT: key-range-full-end
    full_high = tl.maximum(full_low, full_high // BLOCK_N * BLOCK_N)
    if (opts.cu_seqlens is not None) or (opts.key_mask is not None):
        full_low, full_high = low, low
    return low, full_low, full_high, high


@triton.jit
def row_range(first_key, opts, sizes, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first row, number of blocks) of the rows that see a block of keys. The first row is a multiple of BLOCK_M."""
    last_key = tl.minimum(first_key + BLOCK_N, sizes.kv_len) - 1
    offset = sizes.kv_len - sizes.q_len
    low = first_key * 0
    high = low + sizes.q_len
    if IS_CAUSAL:
        low = tl.maximum(low, first_key - offset)  # FAULT: row-range-start
    if opts.window is not None:
        high = tl.minimum(high, last_key + opts.window - offset)
    if opts.cu_seqlens is not None:
        first, _ = segment(first_key, opts, sizes)
        _, end = segment(last_key, opts, sizes)
        low, high = tl.maximum(low, first), tl.minimum(high, end)
    low = low // BLOCK_M * BLOCK_M
    return low, tl.cdiv(tl.maximum(high - low, 0), BLOCK_M)
