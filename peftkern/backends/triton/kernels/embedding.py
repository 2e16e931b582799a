# SPDX-License-Identifier: Apache-2.0
"""The soft prompt and the token embeddings in one pass, and the prompt's gradient."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["stride_ib", "length"])
def _soft_prompt_embedding_fwd_kernel(
    input_ids, stride_ib, stride_is, weight, stride_wv, stride_we, prompt, stride_pa, stride_pp, stride_pe,
    prompt_ids, out, length, prefix_len, vocabulary, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [B, P+S, E], contiguous: rows of the prompt, then of the weight. A token out of range gives NaN."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    batch, position = row // length, row % length
    if position < prefix_len:
        prompt_ptr = prompt + tl.cast(position, tl.int64) * stride_pp
        if prompt_ids is not None:
            prompt_ptr += tl.load(prompt_ids + batch).to(tl.int64) * stride_pa
        values = tl.load(prompt_ptr + columns * stride_pe, mask=columns < width, other=0.0).to(out.dtype.element_ty)
    else:
        offset = tl.cast(batch, tl.int64) * stride_ib + tl.cast(position - prefix_len, tl.int64) * stride_is
        token = tl.load(input_ids + offset).to(tl.int64)
        known = (token >= 0) & (token < vocabulary)
        token_ptr = weight + token * stride_wv
        values = tl.load(token_ptr + columns * stride_we, mask=(columns < width) & known, other=float("nan"))
    tl.store(out + tl.cast(row, tl.int64) * width + columns, values, mask=columns < width)


@triton.jit(do_not_specialize=["batch"])
def _soft_prompt_embedding_bwd_kernel(
    dout, stride_ob, stride_os, prompt_ids, dprompt, batch, prefix_len, width, BLOCK: tl.constexpr
):
    """dprompt [A, P, E] fp32, contiguous: dout [B, P+S, E] at the prompt's positions, summed over B in order."""
    row = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    position = tl.cast(row % prefix_len, tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for b in range(batch):
        mask = columns < width
        if prompt_ids is not None:
            mask = mask & (tl.load(prompt_ids + b) == row // prefix_len)
        source = dout + tl.cast(b, tl.int64) * stride_ob + position * stride_os + columns
        total += tl.load(source, mask=mask, other=0.0).to(tl.float32)
    tl.store(dprompt + tl.cast(row, tl.int64) * width + columns, total, mask=columns < width)
