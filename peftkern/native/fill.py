# SPDX-License-Identifier: Apache-2.0
"""Fills the structs that both native libraries share from tensors and arguments.

A caller keeps every tensor alive until its call returns: the structs hold addresses only.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import abi
from .abi import DTYPES, ISAS

if TYPE_CHECKING:
    from ..arguments import AttentionArgs

__all__ = ["attention", "contiguous", "dtype_code", "embedding", "pointer", "strides"]


def pointer(x: Tensor | None) -> int:
    """The address of the first element, 0 for None."""
    return 0 if x is None else x.data_ptr()


def dtype_code(x: Tensor | None) -> int:
    """The dtype's number in the C ABI. None gives 0, which nothing reads."""
    return 0 if x is None else DTYPES[x.dtype]


def contiguous(x: Tensor | None) -> Tensor | None:
    """``x`` or a contiguous copy of it."""
    return x if x is None or x.is_contiguous() else x.contiguous()


def _broadcast_strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    """Strides in elements, 0 along dimensions of size 1, which are broadcast."""
    if x is None:
        return (0,) * dims
    return tuple(0 if size == 1 else stride for size, stride in zip(x.shape, x.stride(), strict=True))


def strides(x: Tensor | None) -> tuple[int, ...]:
    """The first three strides in elements, zeros for None."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def attention(
    args: AttentionArgs, out: Tensor, lse: Tensor, isa: str = "auto", *, sequence: bool = True
) -> tuple[bytes, object]:
    """``peftkern_attention`` as bytes.

    Args:
        sequence: False passes null for k and v, which leaves out the sequence (CUDA's ``softmax_sums`` only).

    Returns:
        The struct, and an object that must stay alive until the call returns: it owns contiguous copies of arguments.
    """
    (
        q, k, v, prefix_k, prefix_v, sinks, bias, prefix_bias, gate, key_mask, cu_seqlens, prefix_ids, prefix_lens,
        dropout_seed, scale, causal, window, prefix_in_window, softcap, dropout_p,
    ) = args  # fmt: skip
    copies = sinks, gate, cu_seqlens, prefix_ids, prefix_lens = (
        None if sinks is None else contiguous(sinks),
        None if gate is None else contiguous(gate),
        None if cu_seqlens is None else contiguous(cu_seqlens),
        None if prefix_ids is None else contiguous(prefix_ids),
        None if prefix_lens is None else contiguous(prefix_lens),
    )
    prefix_k_stride, prefix_v_stride = prefix_k.stride(), prefix_v.stride()
    is_bank = len(prefix_k_stride) == 4
    batch, num_heads, q_len, head_dim = q.shape
    _, num_kv_heads, kv_len, _ = k.shape
    tensors = abi.ATTENTION_TENSORS.pack(
        q=q.data_ptr(),
        k=k.data_ptr() if sequence else 0,
        v=v.data_ptr() if sequence else 0,
        prefix_k=prefix_k.data_ptr(),
        prefix_v=prefix_v.data_ptr(),
        sinks=0 if sinks is None else sinks.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        prefix_bias=0 if prefix_bias is None else prefix_bias.data_ptr(),
        gate=0 if gate is None else gate.data_ptr(),
        key_mask=0 if key_mask is None else key_mask.data_ptr(),
        cu_seqlens=0 if cu_seqlens is None else cu_seqlens.data_ptr(),
        prefix_ids=0 if prefix_ids is None else prefix_ids.data_ptr(),
        prefix_lens=0 if prefix_lens is None else prefix_lens.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
    )
    sizes = abi.ATTENTION_SIZES.pack(
        batch=batch,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=head_dim,
        bank_size=prefix_k.shape[0] if is_bank else 1,
        prefix_len=prefix_k.shape[-2],
        num_sequences=0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
    )
    strides = abi.ATTENTION_STRIDES.pack(
        q_stride=q.stride()[:3],
        k_stride=k.stride()[:3],
        v_stride=v.stride()[:3],
        prefix_k_stride=prefix_k_stride[:3] if is_bank else (0, *prefix_k_stride[:2]),
        prefix_v_stride=prefix_v_stride[:3] if is_bank else (0, *prefix_v_stride[:2]),
        bias_stride=(0, 0, 0, 0) if bias is None else _broadcast_strides(bias, 4),
        prefix_bias_stride=(0, 0) if prefix_bias is None else _broadcast_strides(prefix_bias, 2),
        key_mask_stride=(0, 0) if key_mask is None else key_mask.stride(),
        out_stride=out.stride()[:3],
    )
    options = abi.ATTENTION_OPTIONS.pack(
        dtype=DTYPES[q.dtype],
        prefix_dtype=DTYPES[prefix_k.dtype],
        bias_dtype=0 if bias is None else DTYPES[bias.dtype],
        cu_seqlens_dtype=0 if cu_seqlens is None else DTYPES[cu_seqlens.dtype],
        prefix_ids_dtype=0 if prefix_ids is None else DTYPES[prefix_ids.dtype],
        prefix_lens_dtype=0 if prefix_lens is None else DTYPES[prefix_lens.dtype],
        causal=causal,
        window=window or 0,
        prefix_in_window=prefix_in_window,
        dropout_seed=0 if dropout_seed is None else int(dropout_seed),
        num_threads=torch.get_num_threads(),
        isa=ISAS[isa],
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
    )
    return abi.ATTENTION.pack(tensors=tensors, sizes=sizes, strides=strides, options=options), copies


def embedding(
    input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None, out: Tensor | None
) -> bytes:
    """``peftkern_embedding`` as bytes. ``prompt_ids`` is contiguous; ``out`` is None in the backward."""
    prompt_stride = prompt.stride()
    return abi.EMBEDDING.pack(
        input_ids=input_ids.data_ptr(),
        weight=weight.data_ptr(),
        prompt=prompt.data_ptr(),
        prompt_ids=pointer(prompt_ids),
        out=pointer(out),
        batch=input_ids.shape[0],
        seq_len=input_ids.shape[1],
        vocab_size=weight.shape[0],
        dim=weight.shape[1],
        bank_size=1 if prompt_ids is None else prompt.shape[0],
        prompt_len=prompt.shape[-2],
        input_ids_stride=input_ids.stride(),
        weight_stride=weight.stride(),
        prompt_stride=prompt_stride if len(prompt_stride) == 3 else (0, *prompt_stride),
        dtype=DTYPES[weight.dtype],
        prompt_dtype=DTYPES[prompt.dtype],
        input_ids_dtype=DTYPES[input_ids.dtype],
        prompt_ids_dtype=dtype_code(prompt_ids),
        num_threads=torch.get_num_threads(),
    )
