# SPDX-License-Identifier: Apache-2.0
"""Concatenates prefix and keys for an attention kernel without a prefix argument; splits its gradients.

Packed sequences are laid one behind the other, each behind its prefix. ``cu_keys`` [n + 1] says where each of them
starts, and so its differences to ``cu_seqlens`` give the number of prefix tokens of each sequence.
"""

import triton
import triton.language as tl

from .blocks import VARYING, all_sizes, find_sequence, load_tile, locate, matrix, prefix_of, row_pointers, store_tile


@triton.jit
def _concat_half(source, prefix_source, target, first, prefix, batch, kv_head, sizes, HEAD_DIM: tl.constexpr,
                 BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """Copy BLOCK_N keys of [prefix | source] from ``first`` on to target. Prefix -1 is a prefix of zeros."""
    length = sizes.prefix_len + sizes.kv_len
    used = tl.where(prefix < 0, 0, sizes.prefix_len)  # FAULT: concat-prefix-length
    prefix_ptr = matrix(prefix_source, tl.maximum(prefix, 0), kv_head)
    tile = load_tile(prefix_ptr, prefix_source.stride_n, first, used, HEAD_DIM, BLOCK_N, BLOCK_D)
    if first + BLOCK_N > sizes.prefix_len:
        rows = first - sizes.prefix_len + tl.arange(0, BLOCK_N)  # FAULT: concat-first-row
        ptrs = row_pointers(matrix(source, batch, kv_head), source.stride_n, rows, BLOCK_D)
        inside = (rows >= 0) & (rows < sizes.kv_len)  # FAULT: concat-last-row
        mask = inside[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
        tile = tl.where(rows[:, None] >= 0, tl.load(ptrs, mask=mask, other=0.0).to(tile.dtype), tile)
    store_tile(matrix(target, batch, kv_head), target.stride_n, first, length, tile, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit(do_not_specialize=VARYING)
def _concat_fwd_kernel(
    k, v, prefix_k, prefix_v, joined_k, joined_v, opts, model, batch_size, q_len, kv_len, num_sequences, search_steps,
    mask_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """joined_k [B, Hkv, P + T, D] = [prefix | k], joined_v [.., D_v] likewise; the prefix is rounded."""
    sizes = all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride)
    blocks = tl.cdiv(sizes.prefix_len + sizes.kv_len, BLOCK_N)
    block, kv_head, batch = locate(blocks, sizes.num_heads // sizes.group)
    prefix = prefix_of(batch, opts)
    first = block * BLOCK_N
    _concat_half(k, prefix_k, joined_k, first, prefix, batch, kv_head, sizes, HEAD_DIM, BLOCK_D, BLOCK_N)
    # FAULT: concat-value-columns
    _concat_half(v, prefix_v, joined_v, first, prefix, batch, kv_head, sizes, VALUE_DIM, BLOCK_DV, BLOCK_N)


@triton.jit
def _prefix_rows(djoined, entry, kv_head, cu_keys, opts, sizes):
    """(pointer, number) of the prefix's rows in the joined keys of a sample, or with ``cu_keys`` of a sequence."""
    if cu_keys is None:
        ptr = matrix(djoined, entry, kv_head)
        number = sizes.prefix_len
    else:
        start, end = tl.load(cu_keys + entry).to(tl.int64), tl.load(cu_keys + entry + 1)
        ptr = matrix(djoined, 0, kv_head) + start * djoined.stride_n
        keys = tl.load(opts.cu_seqlens + entry + 1) - tl.load(opts.cu_seqlens + entry)
        number = (end - start - keys).to(tl.int32)  # FAULT: packed-prefix-rows
    return ptr, number


@triton.jit(do_not_specialize=VARYING)
def _concat_bwd_kernel(
    djoined, total_ptr, cu_keys, opts, model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """total [A, Hkv, P, D] fp32: the rows of each prefix in djoined, summed in order over those who see it.

    djoined is [B, Hkv, P + T, D] or, with ``cu_keys``, [1, Hkv, rows, D].
    """
    sizes = all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride)
    num_kv_heads = sizes.num_heads // sizes.group
    block, kv_head, prefix = locate(tl.cdiv(sizes.prefix_len, BLOCK_N), num_kv_heads)
    first = block * BLOCK_N
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    entries = sizes.batch if cu_keys is None else sizes.num_sequences
    for entry in range(entries):  # FAULT: concat-bwd-first-sample
        if prefix_of(entry, opts) == prefix:  # FAULT: concat-bwd-prefix
            ptr, number = _prefix_rows(djoined, entry, kv_head, cu_keys, opts, sizes)
            total += load_tile(ptr, djoined.stride_n, first, number, HEAD_DIM, BLOCK_N, BLOCK_D)
    matrix_index = tl.cast(prefix, tl.int64) * num_kv_heads + kv_head  # FAULT: concat-bwd-head
    ptr = total_ptr + matrix_index * sizes.prefix_len * HEAD_DIM
    store_tile(ptr, HEAD_DIM, first, sizes.prefix_len, total, HEAD_DIM, BLOCK_N, BLOCK_D)


@triton.jit
def _concat_packed_half(
    source, prefix_source, target, rows, keys, tokens, prefix, inside, kv_head,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Fill in ``rows`` [BLOCK_N] of target with ``keys`` of source, or with ``tokens`` of a prefix if these are -1.

    ``prefix`` [BLOCK_N] is the prefix of each row. ``inside`` says which rows exist.
    """
    columns = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    of_prefix = keys < 0
    prefix_ptr = matrix(prefix_source, 0, kv_head) + (prefix.to(tl.int64) * prefix_source.stride_b)[:, None]
    ptrs = row_pointers(prefix_ptr, prefix_source.stride_n, tokens, BLOCK_D)
    mask = (inside & of_prefix)[:, None] & columns
    values = tl.load(ptrs, mask=mask, other=0.0).to(target.ptr.dtype.element_ty)
    ptrs = row_pointers(matrix(source, 0, kv_head), source.stride_n, keys, BLOCK_D)
    mask = (inside & (keys >= 0))[:, None] & columns
    values = tl.where(of_prefix[:, None], values, tl.load(ptrs, mask=mask, other=0.0))
    ptrs = row_pointers(matrix(target, 0, kv_head), target.stride_n, rows, BLOCK_D)
    tl.store(ptrs, values, mask=inside[:, None] & columns)


@triton.jit(do_not_specialize=[*VARYING, "num_rows"])
def _concat_packed_fwd_kernel(
    k, v, prefix_k, prefix_v, joined_k, joined_v, opts, model, batch_size, q_len, kv_len, num_sequences, search_steps,
    mask_stride, cu_keys, num_rows,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """joined_k [1, Hkv, rows, D], joined_v [.., D_v]: each packed sequence's keys behind its prefix, in their dtype.

    Rows from cu_keys[n] up to ``num_rows`` belong to no sequence and are not stored.
    """
    sizes = all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride)
    block, kv_head, _ = locate(tl.cdiv(num_rows, BLOCK_N), sizes.num_heads // sizes.group)
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < tl.load(cu_keys + sizes.num_sequences)
    sequence = find_sequence(rows, cu_keys, sizes)
    # the keys of a sequence end where its rows end
    keys = rows - (tl.load(cu_keys + sequence + 1) - tl.load(opts.cu_seqlens + sequence + 1)).to(tl.int32)
    keys = tl.where(keys >= tl.load(opts.cu_seqlens + sequence), keys, -1)  # FAULT: packed-first-key
    tokens = rows - tl.load(cu_keys + sequence).to(tl.int32)
    prefix = tl.maximum(prefix_of(sequence, opts), 0)
    _concat_packed_half(
        k, prefix_k, joined_k, rows, keys, tokens, prefix, inside, kv_head, HEAD_DIM, BLOCK_D
    )  # fmt: skip
    _concat_packed_half(
        v, prefix_v, joined_v, rows, keys, tokens, prefix, inside, kv_head, VALUE_DIM, BLOCK_DV
    )  # fmt: skip


@triton.jit
def _split_half(djoined, target, rows, keys, inside, batch, kv_head, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Copy ``rows`` [BLOCK_N] of djoined to ``keys`` [BLOCK_N] of target."""
    mask = inside[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    ptrs = row_pointers(matrix(djoined, batch, kv_head), djoined.stride_n, rows, BLOCK_D)
    values = tl.load(ptrs, mask=mask, other=0.0).to(target.ptr.dtype.element_ty)
    tl.store(row_pointers(matrix(target, batch, kv_head), target.stride_n, keys, BLOCK_D), values, mask=mask)


@triton.jit(do_not_specialize=VARYING)
def _split_kernel(
    djoined_k, djoined_v, dk, dv, cu_keys, opts, model, batch_size, q_len, kv_len, num_sequences, search_steps,
    mask_stride,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dk [B, Hkv, T, D], dv [.., D_v], of which one may be None: rows of djoined_k, djoined_v behind the prefixes."""
    sizes = all_sizes(model, batch_size, q_len, kv_len, num_sequences, search_steps, mask_stride)
    block, kv_head, batch = locate(tl.cdiv(sizes.kv_len, BLOCK_N), sizes.num_heads // sizes.group)
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = keys < sizes.kv_len
    if cu_keys is None:
        rows = keys + sizes.prefix_len
    else:
        end = find_sequence(keys, opts.cu_seqlens, sizes) + 1
        shift = tl.load(cu_keys + end) - tl.load(opts.cu_seqlens + end)
        rows = keys + shift.to(tl.int32)  # FAULT: packed-split-row
    if dk is not None:
        _split_half(djoined_k, dk, rows, keys, inside, batch, kv_head, HEAD_DIM, BLOCK_D)
    if dv is not None:
        _split_half(djoined_v, dv, rows, keys, inside, batch, kv_head, VALUE_DIM, BLOCK_DV)
