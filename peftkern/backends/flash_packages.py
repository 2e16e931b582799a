# SPDX-License-Identifier: Apache-2.0
"""Attention kernels of installed packages, as rows beside those of :mod:`.torch_attention`.

==========  =================  ========================  ===========================================================
row         distribution       conventions read from     what sets it apart
==========  =================  ========================  ===========================================================
FA3         flash-attn-3       ``hopper/flash_api.cpp``  compute capability 9.0 alone
FA4         flash-attn-4       4.0.0b10 to 4.0.0b36      compiles at the first call of a kind
FA2         flash-attn         2.8.3.post2               the backward reads a random state even without dropout
flashinfer  flashinfer-python  0.7.2.post1               no backward, one batch entry, lse as a base-2 logarithm
==========  =================  ========================  ===========================================================

All read [B, S, H, D] with grouped heads and a dense last dim, align causality bottom-right, and cap scores by
``softcap * tanh(score / softcap)``. FlashAttention returns the natural lse, [B, H, S] or [H, total] with cu_seqlens,
and its backward computes p and rowsum(out * dout) from the out and lse that it is given.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .flash_registration import fa3_limits
from .packages import Package
from .torch_attention import HALF, AttentionKernel, KernelInputs, flash_sequences

_ops: Any = torch.ops

_FA2 = Package("flash-attn", "flash_attn.flash_attn_interface", oldest="2.8")
_FA3 = Package("flash-attn-3", "flash_attn_interface")  # registers torch.ops.flash_attn_3
_FA4 = Package("flash-attn-4", "flash_attn.cute.interface", oldest="4.0.0b10")  # before, no softcap in the backward
_FLASHINFER = Package("flashinfer-python", "flashinfer", oldest="0.7")  # before, hidden keys had a finite score


def _window(inputs: KernelInputs) -> tuple[int, int]:
    """(left, right), -1 where no key is hidden."""
    left, right = inputs.window_sizes
    return -1 if left is None else left, -1 if right is None else right


def _as_inputs(inputs: KernelInputs, *xs: Tensor) -> tuple[Tensor, ...]:
    """Results [B, S, H, D], or [S, H, D] with cu_seqlens, as [B, H, S, D]."""
    return tuple((x if inputs.cu_seqlens is None else x[None]).transpose(1, 2) for x in xs)


def _result(inputs: KernelInputs, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    (out,) = _as_inputs(inputs, out)
    return out, lse if inputs.cu_seqlens is None else lse[None]


def _given(inputs: KernelInputs, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dout and out laid out as q is, lse [B, H, S] or [H, S]."""
    _, lay, _ = flash_sequences(inputs)
    return lay(dout), lay(out), lse if inputs.cu_seqlens is None else lse[0]


# FlashAttention 2


def _fa2_options(inputs: KernelInputs) -> dict[str, Any]:
    left, right = _window(inputs)
    return {
        "dropout_p": 0.0, "softmax_scale": inputs.scale, "causal": inputs.causal, "window_size_left": left,
        "window_size_right": right, "softcap": inputs.softcap, "alibi_slopes": None,
    }  # fmt: skip


def _fa2_forward(inputs: KernelInputs) -> tuple[Tensor, Tensor]:
    package = _FA2.load()
    qkv, _, lengths = flash_sequences(inputs)
    options = _fa2_options(inputs)
    if inputs.cu_seqlens is None:
        out, lse, *_ = package._flash_attn_forward(*qkv, **options, return_softmax=False)
    else:
        out, lse, *_ = package._flash_attn_varlen_forward(*qkv, *lengths, **options, return_softmax=False)
    return _result(inputs, out, lse)


def _fa2_backward(dout: Tensor, out: Tensor, lse: Tensor, inputs: KernelInputs) -> tuple[Tensor, Tensor, Tensor]:
    package = _FA2.load()
    qkv, _, lengths = flash_sequences(inputs)
    dout, out, lse = _given(inputs, dout, out, lse)
    dq, dk, dv = (torch.empty_like(x) for x in qkv)
    options: dict[str, Any] = {
        **_fa2_options(inputs), "deterministic": torch.are_deterministic_algorithms_enabled(),
        "rng_state": torch.zeros(2, dtype=torch.int64, device=lse.device),
    }  # fmt: skip
    if inputs.cu_seqlens is None:
        package._flash_attn_backward(dout, *qkv, out, lse, dq, dk, dv, **options)
    else:
        package._flash_attn_varlen_backward(dout, *qkv, out, lse, dq, dk, dv, *lengths, **options)
    dq, dk, dv = _as_inputs(inputs, dq, dk, dv)
    return dq, dk, dv


# FlashAttention 3: its ops, since the Python functions around them differ between versions


def _fa3_forward(inputs: KernelInputs) -> tuple[Tensor, Tensor]:
    _FA3.load()
    qkv, _, (*cu_seqlens, q_len, kv_len) = flash_sequences(inputs)
    splits = 1 if torch.are_deterministic_algorithms_enabled() else 0  # 0: chosen by the op
    out, lse, *_ = _ops.flash_attn_3.fwd(
        *qkv,
        *[None] * 4,  # k_new, v_new, q_v, out
        *cu_seqlens,
        *[None] * 3,  # cu_seqlens_k_new, seqused_q, seqused_k
        q_len,
        kv_len,
        *[None]
        * 9,  # page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary, descales of q, k, v
        inputs.scale,
        inputs.causal,
        *_window(inputs),
        0,  # attention_chunk
        inputs.softcap,
        True,  # is_rotary_interleaved
        None,  # scheduler_metadata
        splits,
        None,  # pack_gqa
        0,  # sm_margin
    )
    return _result(inputs, out, lse)


def _fa3_backward(dout: Tensor, out: Tensor, lse: Tensor, inputs: KernelInputs) -> tuple[Tensor, Tensor, Tensor]:
    _FA3.load()
    qkv, _, (*cu_seqlens, q_len, kv_len) = flash_sequences(inputs)
    dout, out, lse = _given(inputs, dout, out, lse)
    gradients = [torch.empty_like(x) for x in qkv]
    _ops.flash_attn_3.bwd(
        dout,
        *qkv,
        out,
        lse,
        *gradients,
        *cu_seqlens,
        *[None] * 2,  # seqused_q, seqused_k
        q_len,
        kv_len,
        inputs.scale,
        inputs.causal,
        *_window(inputs),
        inputs.softcap,
        torch.are_deterministic_algorithms_enabled(),
        0,  # sm_margin
    )
    dq, dk, dv = _as_inputs(inputs, *gradients)
    return dq, dk, dv


# FlashAttention 4


def _fa4_options(inputs: KernelInputs) -> dict[str, Any]:
    _, _, (cu_seqlens_q, cu_seqlens_k, q_len, kv_len) = flash_sequences(inputs)
    left, right = inputs.window_sizes
    return {
        "softmax_scale": inputs.scale, "causal": inputs.causal, "softcap": inputs.softcap, "window_size_left": left,
        "window_size_right": right, "cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": q_len, "max_seqlen_k": kv_len,
    }  # fmt: skip


def _fa4_forward(inputs: KernelInputs) -> tuple[Tensor, Tensor]:
    qkv, _, _ = flash_sequences(inputs)
    out, lse, *_ = _FA4.load()._flash_attn_fwd(*qkv, **_fa4_options(inputs), return_lse=True)
    return _result(inputs, out, lse)


def _fa4_backward(dout: Tensor, out: Tensor, lse: Tensor, inputs: KernelInputs) -> tuple[Tensor, Tensor, Tensor]:
    qkv, _, _ = flash_sequences(inputs)
    dout, out, lse = _given(inputs, dout, out, lse)
    gradients = _FA4.load()._flash_attn_bwd(
        *qkv, out, dout, lse, **_fa4_options(inputs), deterministic=torch.are_deterministic_algorithms_enabled()
    )
    dq, dk, dv = _as_inputs(inputs, *gradients)
    return dq, dk, dv


# FlashInfer


def _flashinfer_forward(inputs: KernelInputs) -> tuple[Tensor, Tensor]:
    q, k, v = (x[0].transpose(0, 1) for x in (inputs.q, inputs.k, inputs.v))
    out, lse = _FLASHINFER.load().single_prefill_with_kv_cache(
        q, k, v, causal=inputs.causal, kv_layout="NHD", sm_scale=inputs.scale, window_left=_window(inputs)[0],
        logits_soft_cap=inputs.softcap, return_lse=True,
    )  # fmt: skip
    return out.transpose(0, 1)[None], (lse * math.log(2)).transpose(0, 1)[None]


_NATIVE = frozenset({"non-causal", "window", "softcap"})
_PACKED = _NATIVE | {"cu_seqlens"}

#: Rows of all packages, installed or not, in order of preference.
KERNELS = [
    AttentionKernel(
        "FA3", "cuda", HALF, 256, _fa3_forward, _fa3_backward, head_dim_multiple=8, native=_PACKED,
        limits=fa3_limits, package=_FA3, capabilities=frozenset({9}), missing=_FA3.missing,
    ),
    AttentionKernel(
        "FA4", "cuda", HALF, 128, _fa4_forward, _fa4_backward, head_dim_multiple=8, native=_PACKED,
        package=_FA4, capabilities=frozenset({9, 10, 11}), missing=_FA4.missing,
    ),
    AttentionKernel(
        "FA2", "cuda", HALF, 256, _fa2_forward, _fa2_backward, head_dim_multiple=8, native=_PACKED,
        ordered_sums=True, package=_FA2, capabilities=frozenset({8, 9, 10, 11, 12}), missing=_FA2.missing,
    ),
    AttentionKernel(
        "flashinfer", "cuda", HALF, 128, _flashinfer_forward, None, head_dim_multiple=64, max_batch=1, native=_NATIVE,
        package=_FLASHINFER, capabilities=frozenset({8, 9, 10, 11, 12}), missing=_FLASHINFER.missing,
    ),
]  # fmt: skip
