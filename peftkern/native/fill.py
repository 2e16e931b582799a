# SPDX-License-Identifier: Apache-2.0
"""Fills the structs that both native libraries share from tensors and arguments.

A caller keeps every tensor alive until its call returns: the structs hold addresses only.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import abi
from .abi import DTYPES, ISAS

if TYPE_CHECKING:
    from ..arguments import AttentionArgs, AttentionGradients

__all__ = [
    "BackwardConstants", "attention", "attention_constants", "attention_tensors", "backward_constants", "contiguous",
    "dtype_code", "embedding", "pointer", "strides",
]  # fmt: skip

#: The parts of ``peftkern_attention_backward`` without addresses: of the forward, of the gradients.
BackwardConstants = tuple[bytes, bytes]


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
    tensors, copies = attention_tensors(args, out, lse, sequence=sequence)
    return tensors + attention_constants(args, out.stride(), isa), copies


def attention_tensors(
    args: AttentionArgs, out: Tensor, lse: Tensor, *, sequence: bool = True, rows: Tensor | None = None
) -> tuple[bytes, object]:
    """The addresses, the first part of ``peftkern_attention``. Arguments and results as of :func:`attention`.

    ``rows`` is ``prefix_rows``.
    """
    q, k, v, prefix_k, prefix_v, sinks, bias, prefix_bias, gate, key_mask, cu_seqlens, prefix_ids, prefix_lens = args[
        :13
    ]
    copies = sinks, gate, cu_seqlens, prefix_ids, prefix_lens = (
        None if sinks is None else contiguous(sinks),
        None if gate is None else contiguous(gate),
        None if cu_seqlens is None else contiguous(cu_seqlens),
        None if prefix_ids is None else contiguous(prefix_ids),
        None if prefix_lens is None else contiguous(prefix_lens),
    )
    packed = abi.ATTENTION_TENSORS.pack(
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
        prefix_rows=0 if rows is None else rows.data_ptr(),
        out=out.data_ptr(),
        lse=lse.data_ptr(),
    )
    return packed, copies


def attention_constants(
    args: AttentionArgs, out_stride: tuple[int, ...], isa: str = "auto", rows: Tensor | None = None
) -> bytes:
    """The rest of ``peftkern_attention``: what calls with the same sizes, strides, dtypes and numbers share."""
    q, k, v, prefix_k, prefix_v, _, bias, prefix_bias, _, key_mask, cu_seqlens, prefix_ids, prefix_lens = args[:13]
    layout = _attention_layout(
        q.shape, k.shape, v.shape[3], prefix_k.shape, q.stride(), k.stride(), v.stride(), prefix_k.stride(),
        prefix_v.stride(),
        None if bias is None else _broadcast_strides(bias, 4),
        None if prefix_bias is None else _broadcast_strides(prefix_bias, 2),
        None if key_mask is None else key_mask.stride(), out_stride,
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1, None if rows is None else rows.shape,
    )  # fmt: skip
    options = _attention_options(
        q.dtype, prefix_k.dtype, bias if bias is None else bias.dtype,
        cu_seqlens if cu_seqlens is None else cu_seqlens.dtype,
        prefix_ids if prefix_ids is None else prefix_ids.dtype,
        prefix_lens if prefix_lens is None else prefix_lens.dtype,
        args.causal, args.window, args.prefix_in_window, torch.get_num_threads(), isa, args.scale, args.softcap,
        args.dropout_p, 0 if args.dropout_seed is None else int(args.dropout_seed),
    )  # fmt: skip
    return layout + options


_Sizes = tuple[int, ...]


@functools.lru_cache(maxsize=1024)
def _attention_layout(
    q: _Sizes, k: _Sizes, value_dim: int, prefix: _Sizes, q_stride: _Sizes, k_stride: _Sizes, v_stride: _Sizes,
    prefix_k_stride: _Sizes, prefix_v_stride: _Sizes, bias_stride: _Sizes | None, prefix_bias_stride: _Sizes | None,
    key_mask_stride: _Sizes | None, out_stride: _Sizes, num_sequences: int, rows: _Sizes | None,
) -> bytes:  # fmt: skip
    """Sizes and strides. They repeat from call to call, so that a call pays for a lookup instead of packing them."""
    is_bank = len(prefix) == 4
    bank_size, prefix_len = prefix[0] if is_bank else 1, prefix[-2]
    return abi.ATTENTION_LAYOUT.pack(
        batch=q[0],
        num_heads=q[1],
        num_kv_heads=k[1],
        q_len=q[2],
        kv_len=k[2],
        head_dim=q[3],
        value_dim=value_dim,
        bank_size=bank_size if rows is None else rows[0],
        prefix_len=prefix_len if rows is None else rows[1],
        num_sequences=num_sequences,
        source_size=bank_size,
        source_len=prefix_len,
        q_stride=q_stride[:3],
        k_stride=k_stride[:3],
        v_stride=v_stride[:3],
        prefix_k_stride=prefix_k_stride[:3] if is_bank else (0, *prefix_k_stride[:2]),
        prefix_v_stride=prefix_v_stride[:3] if is_bank else (0, *prefix_v_stride[:2]),
        bias_stride=bias_stride or (0, 0, 0, 0),
        prefix_bias_stride=prefix_bias_stride or (0, 0),
        key_mask_stride=key_mask_stride or (0, 0),
        out_stride=out_stride[:3],
    )


@functools.lru_cache(maxsize=256)
def _attention_options(
    dtype: torch.dtype, prefix_dtype: torch.dtype, bias_dtype: torch.dtype | None,
    cu_seqlens_dtype: torch.dtype | None, prefix_ids_dtype: torch.dtype | None, prefix_lens_dtype: torch.dtype | None,
    causal: bool, window: int | None, prefix_in_window: bool, num_threads: int, isa: str, scale: float,
    softcap: float, dropout_p: float, dropout_seed: int,
) -> bytes:  # fmt: skip
    """Dtypes and numbers, which repeat from call to call as well, unless dropout draws a seed."""

    def code(dtype: torch.dtype | None) -> int:
        return 0 if dtype is None else DTYPES[dtype]

    return abi.ATTENTION_OPTIONS.pack(
        dtype=DTYPES[dtype],
        prefix_dtype=DTYPES[prefix_dtype],
        bias_dtype=code(bias_dtype),
        cu_seqlens_dtype=code(cu_seqlens_dtype),
        prefix_ids_dtype=code(prefix_ids_dtype),
        prefix_lens_dtype=code(prefix_lens_dtype),
        causal=causal,
        window=window or 0,
        prefix_in_window=prefix_in_window,
        dropout_seed=dropout_seed,
        num_threads=num_threads,
        isa=ISAS[isa],
        scale=scale,
        softcap=softcap,
        dropout_p=dropout_p,
    )


def backward_constants(
    dout: Tensor,
    dlse: Tensor | None,
    out: Tensor,
    args: AttentionArgs,
    gradients: AttentionGradients,
    isa: str = "auto",
    rows: Tensor | None = None,
) -> BackwardConstants:
    """What calls share whose tensors have the same sizes, strides and dtypes, and whose numbers are the same."""
    layout = abi.GRADIENT_LAYOUT.pack(
        dout_stride=strides(dout),
        dlse_stride=strides(dlse),
        dq_stride=_gradient_strides(gradients.dq),
        dk_stride=_gradient_strides(gradients.dk),
        dv_stride=_gradient_strides(gradients.dv),
        bias_size=(0, 0, 0, 0) if args.bias is None else args.bias.shape,
        prefix_bias_size=(0, 0) if args.prefix_bias is None else args.prefix_bias.shape,
    )
    return attention_constants(args, out.stride(), isa, rows), layout


def _gradient_strides(gradient: Tensor) -> tuple[int, ...]:
    """The first three strides in elements, zeros for a gradient without elements."""
    return strides(gradient if gradient.numel() else None)


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
