# SPDX-License-Identifier: Apache-2.0
"""What the attention kernels share: tiles, scores, visibility, packed sequences, dropout.

Scores times their unit are logarithms to base 2, so that ``exp2`` serves the softmax. ``rows`` (queries) and ``keys``
are index tensors of two dims that broadcast against each other, [M, 1] and [1, N] or, transposed, [1, M] and [N, 1].
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def locate(num_blocks, num_heads):
    """(block, head, batch) of this program; the last block, which sees most keys when causal, comes first."""
    pid = tl.program_id(0)
    outer = pid // num_blocks
    return num_blocks - 1 - pid % num_blocks, outer % num_heads, outer // num_heads


@triton.jit
def matrix(x, batch, head):
    """Pointer to the [N, D] matrix of one batch entry (or prefix) and head."""
    return x.ptr + tl.cast(batch, tl.int64) * x.stride_b + tl.cast(head, tl.int64) * x.stride_h


@triton.jit
def tile_pointers(ptr, stride_n, first, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D]: rows ``first`` and on of a matrix; 64-bit to the tile, 32-bit within."""
    within = tl.arange(0, BLOCK)[:, None] * stride_n + tl.arange(0, BLOCK_D)[None, :]
    return ptr + tl.cast(first, tl.int64) * stride_n + within


@triton.jit
def tile_mask(first, length, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, BLOCK_D]: true within ``length`` rows and HEAD_DIM columns."""
    mask = first + tl.arange(0, BLOCK)[:, None] < length
    if HEAD_DIM != BLOCK_D:
        mask = mask & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    return mask


@triton.jit
def load_tile(
    ptr, stride_n, first, length, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
    INSIDE: tl.constexpr = False,
):  # fmt: skip
    """[BLOCK, BLOCK_D]: rows ``first`` and on of a matrix, 0 outside of it. INSIDE: all rows are there."""
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
    """Store ``tile`` [BLOCK, BLOCK_D], rounded to the memory's dtype, where it is inside of the matrix."""
    ptrs = tile_pointers(ptr, stride_n, first, BLOCK, BLOCK_D)
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=tile_mask(first, length, HEAD_DIM, BLOCK, BLOCK_D))


@triton.jit
def tanh(x):
    """From exp2: Taylor's series where 1 - 2 / (exp(2x) + 1) would cancel."""
    x2 = x * x
    series = 1.0 + x2 * (-1 / 3 + x2 * (2 / 15 + x2 * (-17 / 315 + x2 * (62 / 2835 - x2 * (1382 / 155925)))))
    return tl.where(tl.abs(x) < 0.3, x * series, 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2E)) + 1.0))


@triton.jit
def softcapped(products, scale, opts, ADDS: tl.constexpr):
    """(scores, unit, slope): ``scores * unit`` are the scores before bias, slope is d score / d (scale * product).

    Where nothing is done to the products but to scale them, they are the scores and the scale is their unit: what
    follows then multiplies where it subtracts, in one instruction. ADDS: a bias will be added.
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
def find_sequence(index, opts, sizes):
    """The packed sequence that holds each token of ``index``: the last one that starts at or before it."""
    low = index * 0
    high = low + sizes.num_sequences
    for _ in range(sizes.search_steps):
        middle = (low + high) // 2
        starts_before = tl.load(opts.cu_seqlens + middle) <= index
        narrow = high - low > 1
        high = tl.where(starts_before | (narrow == 0), high, middle)
        low = tl.where(starts_before & narrow, middle, low)
    return low


@triton.jit
def segment(index, opts, sizes):
    """(first, end) of the packed sequence of each token, [0, T) where nothing is packed."""
    if opts.cu_seqlens is None:
        first = index * 0
        end = first + sizes.kv_len
    else:
        start = opts.cu_seqlens + find_sequence(index, opts, sizes)
        first, end = tl.load(start).to(tl.int32), tl.load(start + 1).to(tl.int32)
    return first, end


@triton.jit
def keys_seen(rows, opts, sizes, IS_CAUSAL: tl.constexpr):
    """(lower, upper): each row sees sequence keys lower <= key < upper.

    For rows within [0, S); those beyond see what is not there, and are not stored.
    """
    offset = sizes.kv_len - sizes.q_len
    lower, upper = segment(tl.minimum(rows, sizes.q_len - 1), opts, sizes)
    if IS_CAUSAL:
        upper = rows + (offset + 1)
    if opts.window is not None:
        lower = tl.maximum(lower, rows + (offset + 1 - opts.window))
    return lower, upper


@triton.jit
def rows_that_see(keys, opts, sizes, IS_CAUSAL: tl.constexpr):
    """(lower, upper): each sequence key is seen by rows lower <= row < upper.

    The rows' statistics, and not this, take out those beyond S.
    """
    offset = sizes.kv_len - sizes.q_len
    lower, upper = segment(tl.minimum(keys, sizes.kv_len - 1), opts, sizes)
    if IS_CAUSAL:
        lower = keys - offset
    if opts.window is not None:
        farthest = keys + (opts.window - offset)
        upper = farthest if opts.cu_seqlens is None else tl.minimum(upper, farthest)
    return lower, upper


@triton.jit
def seq_scores(
    products, scale, rows, keys, lower, upper, batch, head, opts, sizes, IS_CAUSAL: tl.constexpr,
    BY_KEY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """(scores, unit, slope) for sequence keys.

    lower and upper are :func:`keys_seen` of the rows or, BY_KEY, :func:`rows_that_see` of the keys. MASKED is false
    where every row of the block sees every key.
    """
    scores, unit, slope = softcapped(products, scale, opts, opts.bias is not None)
    if opts.bias is not None:
        bias = opts.bias
        ptrs = matrix(bias, batch, head) + rows.to(tl.int64) * bias.stride_m + keys.to(tl.int64) * bias.stride_n
        inside = (rows < sizes.q_len) & (keys < sizes.kv_len)
        scores += tl.load(ptrs, mask=inside, other=0.0).to(tl.float32) * LOG2E
    if MASKED:
        CUT: tl.constexpr = opts.window is not None or opts.cu_seqlens is not None
        if not BY_KEY:
            scores = tl.where(keys < upper, scores, -float("inf"))
            if CUT:
                scores = tl.where(keys >= lower, scores, -float("inf"))
        else:
            if IS_CAUSAL or opts.cu_seqlens is not None:
                scores = tl.where(rows >= lower, scores, -float("inf"))
            if CUT:
                scores = tl.where(rows < upper, scores, -float("inf"))
        if opts.key_mask is not None:
            ptrs = opts.key_mask.ptr + tl.cast(batch, tl.int64) * opts.key_mask.stride_b
            mask = tl.load(ptrs + keys * opts.key_mask.stride_n, mask=keys < sizes.kv_len, other=0)
            scores = tl.where(mask != 0, scores, -float("inf"))
    return scores, unit, slope


@triton.jit
def prefix_scores(
    products, scale, positions, slots, sees, length, head, opts, sizes, MASKED: tl.constexpr
):  # fmt: skip
    """(scores, unit, slope) for the first ``length`` tokens of a prefix.

    ``positions`` are those of the queries within their sequence; ``sees`` says which queries see this prefix, None
    for all.
    """
    scores, unit, slope = softcapped(products, scale, opts, opts.prefix_bias is not None)
    if opts.prefix_bias is not None:
        bias = opts.prefix_bias
        ptrs = bias.ptr + head * bias.stride_h + slots * bias.stride_n
        scores += tl.load(ptrs, mask=slots < sizes.prefix_len, other=0.0).to(tl.float32) * LOG2E
    if MASKED:
        visible = slots < length
        if sees is not None:
            visible = visible & sees
        if opts.prefix_window is not None:
            visible = visible & (length + positions - slots < opts.prefix_window)
        scores = tl.where(visible, scores, -float("inf"))
    return scores, unit, slope


@triton.jit
def prefix_of(sequence, opts):
    """The prefix that a sequence sees, -1 for none."""
    prefix = sequence * 0
    if opts.prefix_ids is not None:
        prefix = tl.load(opts.prefix_ids + sequence).to(tl.int32)
    return prefix


@triton.jit
def prefix_length(prefix, opts, sizes):
    """Used tokens of a prefix, 0 for prefix -1."""
    if opts.prefix_lens is None:
        length = tl.where(prefix < 0, 0, sizes.prefix_len)
    else:
        length = tl.load(opts.prefix_lens + prefix, mask=prefix >= 0, other=0).to(tl.int32)
    return length


@triton.jit
def dropout_keep(
    opts, row, key, batch_head, PART: tl.constexpr, THRESHOLD: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N] bool: the weights kept of rows ``row`` and keys ``key`` (a multiple of 4) and on.

    See :func:`peftkern.reference.dropout_keep`; one call of Philox serves four keys.
    """
    rows = row + tl.arange(0, BLOCK_M)[:, None] + tl.zeros([1, BLOCK_N // 4], tl.int32)
    quads = key // 4 + tl.arange(0, BLOCK_N // 4)[None, :] + tl.zeros([BLOCK_M, 1], tl.int32)
    zero = tl.zeros_like(rows)
    w0, w1, w2, w3 = tl.philox(tl.load(opts.seed), quads, rows, zero + batch_head, zero + PART)
    words = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    return words >= tl.full([], THRESHOLD, tl.uint32)


@triton.jit
def key_range(first_row, opts, sizes, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(low, full_low, full_high, high): the sequence keys that rows first_row to first_row + BLOCK_M - 1 see.

    All rows see all keys in [full_low, full_high). All bounds but the last are multiples of BLOCK_N, in rising order
    but for the last, which may lie below full_high.
    """
    last_row = tl.minimum(first_row + BLOCK_M, sizes.q_len) - 1
    offset = sizes.kv_len - sizes.q_len
    low = first_row * 0
    high = low + sizes.kv_len
    full_low = low
    if IS_CAUSAL:
        high = tl.minimum(high, last_row + offset + 1)
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
        full_high = tl.minimum(high, first_row + offset + 1)
    full_high = tl.maximum(full_low, full_high // BLOCK_N * BLOCK_N)
    if (opts.cu_seqlens is not None) or (opts.key_mask is not None):
        full_low, full_high = low, low
    return low, full_low, full_high, high


@triton.jit
def row_range(first_key, opts, sizes, IS_CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first row, a multiple of BLOCK_M, and number of blocks) of the rows that see a block of keys."""
    last_key = tl.minimum(first_key + BLOCK_N, sizes.kv_len) - 1
    offset = sizes.kv_len - sizes.q_len
    low = first_key * 0
    high = low + sizes.q_len
    if IS_CAUSAL:
        low = tl.maximum(low, first_key - offset)
    if opts.window is not None:
        high = tl.minimum(high, last_key + opts.window - offset)
    if opts.cu_seqlens is not None:
        first, _ = segment(first_key, opts, sizes)
        _, end = segment(last_key, opts, sizes)
        low, high = tl.maximum(low, first), tl.minimum(high, end)
    low = low // BLOCK_M * BLOCK_M
    return low, tl.cdiv(tl.maximum(high - low, 0), BLOCK_M)
