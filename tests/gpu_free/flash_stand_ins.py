# SPDX-License-Identifier: Apache-2.0
"""CPU stand-ins for the packages of ``flash_packages.KERNELS``, with each library's signatures and conventions.

Each function has the signature of the one whose name it bears, in the version that ``VERSIONS`` names, refuses what
that refuses, and computes in fp64. The annotations of results are objects, as the packages' are.
"""

import dataclasses
import inspect
import math
import sys
from types import SimpleNamespace

import torch
from torch import Tensor

from peftkern.backends import flash_packages, packages, torch_attention

from . import stand_ins

VERSIONS = {
    "flash-attn": "2.8.3.post2", "flash-attn-3": "3.0.0", "flash-attn-4": "4.0.0b36",
    "flashinfer-python": "0.7.2.post1",
}  # fmt: skip


def _limits(left: int, right: int) -> tuple[int | None, int | None]:
    """A window where -1 means none."""
    assert left >= -1
    assert right >= -1
    return None if left == -1 else left, None if right == -1 else right


def _check_head_dim(q: Tensor, largest: int) -> None:
    assert q.shape[-1] <= largest, f"FlashAttention only supports head dimension at most {largest}"


class FlashAttention2:
    """``flash_attn.flash_attn_interface``: gradients are written to tensors, no argument has a default."""

    @staticmethod
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes,
        return_softmax,
    ):  # fmt: skip
        assert q.dim() == k.dim() == v.dim() == 4
        return FlashAttention2._forward(
            q, k, v, (None, None, q.shape[1], k.shape[1]), dropout_p, softmax_scale, causal,
            window_size_left, window_size_right, softcap, return_softmax,
        )  # fmt: skip

    @staticmethod
    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
    ):  # fmt: skip
        assert q.dim() == k.dim() == v.dim() == 3
        return FlashAttention2._forward(
            q, k, v, (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), dropout_p, softmax_scale, causal,
            window_size_left, window_size_right, softcap, return_softmax,
        )  # fmt: skip

    @staticmethod
    def _forward(q, k, v, lengths, dropout_p, scale, causal, left, right, softcap, return_softmax):
        _check_head_dim(q, 256)
        assert dropout_p == 0.0
        assert not return_softmax, "return_softmax is only supported when p_dropout > 0.0"
        out, lse = stand_ins.flash_forward(q, k, v, lengths, scale, causal, *_limits(left, right), softcap)
        return out, lse, torch.empty(0), torch.empty(2, dtype=torch.int64)

    @staticmethod
    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        FlashAttention2._backward(
            dout, q, k, v, out, softmax_lse, (dq, dk, dv), (None, None, q.shape[1], k.shape[1]), softmax_scale,
            causal, window_size_left, window_size_right, softcap, rng_state,
        )  # fmt: skip
        return torch.empty(0)

    @staticmethod
    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        FlashAttention2._backward(
            dout, q, k, v, out, softmax_lse, (dq, dk, dv),
            (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k), softmax_scale, causal, window_size_left,
            window_size_right, softcap, rng_state,
        )  # fmt: skip
        return torch.empty(0)

    @staticmethod
    def _backward(dout, q, k, v, out, lse, gradients, lengths, scale, causal, left, right, softcap, rng_state):
        assert rng_state is not None, "the kernel reads two numbers, dropout or not"
        assert rng_state.dtype == torch.int64
        assert rng_state.shape == (2,)
        window = _limits(left, right)
        values = stand_ins.flash_backward(dout, q, k, v, out, lse, lengths, scale, causal, *window, softcap)
        for target, value in zip(gradients, values, strict=True):
            assert target.stride(-1) == 1
            target.copy_(value)


class FlashAttention3:
    """``torch.ops.flash_attn_3``, positional: older schemas have no defaults."""

    @staticmethod
    def fwd(
        q, k, v, k_new, v_new, q_v, out, cu_seqlens_q, cu_seqlens_k, cu_seqlens_k_new, seqused_q, seqused_k,
        max_seqlen_q, max_seqlen_k, page_table, kv_batch_idx, leftpad_k, rotary_cos, rotary_sin, seqlens_rotary,
        q_descale, k_descale, v_descale, softmax_scale, is_causal, window_size_left, window_size_right,
        attention_chunk, softcap, is_rotary_interleaved, scheduler_metadata, num_splits, pack_gqa, sm_margin, /,
    ):  # fmt: skip
        optional = (
            k_new, v_new, q_v, cu_seqlens_k_new, seqused_q, seqused_k, page_table, kv_batch_idx, leftpad_k,
            rotary_cos, rotary_sin, seqlens_rotary, q_descale, k_descale, v_descale, scheduler_metadata,
        )  # fmt: skip
        assert all(x is None for x in optional)
        assert attention_chunk == sm_margin == 0
        assert num_splits == (1 if torch.are_deterministic_algorithms_enabled() else 0)
        _check_head_dim(q, 256)
        if cu_seqlens_q is not None:
            assert max_seqlen_q is not None
            assert cu_seqlens_q.is_contiguous()
        window = _limits(window_size_left, window_size_right)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = stand_ins.flash_forward(q, k, v, lengths, softmax_scale, is_causal, *window, softcap)
        return out, lse, torch.empty(0), torch.empty(0)

    @staticmethod
    def bwd(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, max_seqlen_q,
        max_seqlen_k, softmax_scale, is_causal, window_size_left, window_size_right, softcap, deterministic,
        sm_margin, /,
    ):  # fmt: skip
        assert seqused_q is None
        assert seqused_k is None
        assert deterministic == torch.are_deterministic_algorithms_enabled()
        assert not deterministic or q.shape[-1] <= 192, "Deterministic backward not supported for hdim 256."
        window = _limits(window_size_left, window_size_right)
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        values = stand_ins.flash_backward(
            dout, q, k, v, out, softmax_lse, lengths, softmax_scale, is_causal, *window, softcap
        )
        for target, value in zip((dq, dk, dv), values, strict=True):
            target.copy_(value)
        return dq, dk, dv, *(torch.empty(0) for _ in range(5))


class FlashAttention4:
    """``flash_attn.cute.interface``: no window is None, results follow out and lse since 4.0.0b20."""

    @staticmethod
    def _flash_attn_fwd(
        q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
        max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
        window_size_left=None, window_size_right=None, learnable_sink=None, *, num_splits=1, return_lse=False,
        out=None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
        assert return_lse, "without it, lse is None unless an input requires a gradient"
        _check_fa4(q, window_size_left, window_size_right)
        window = window_size_left, window_size_right
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        out, lse = stand_ins.flash_forward(q, k, v, lengths, softmax_scale, causal, *window, softcap or 0.0)
        return out, lse, None, None, None

    @staticmethod
    def _flash_attn_bwd(
        q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None,
        window_size_right=None, *, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None,
        max_seqlen_q=None, max_seqlen_k=None, deterministic=False,
    ):  # fmt: skip
        _check_fa4(q, window_size_left, window_size_right)
        window = window_size_left, window_size_right
        # torch's registration passes no lengths, which only choose tiles
        lengths = cu_seqlens_q, cu_seqlens_k, max_seqlen_q or q.shape[0], max_seqlen_k or k.shape[0]
        return stand_ins.flash_backward(dout, q, k, v, out, lse, lengths, softmax_scale, causal, *window, softcap)


class FlashAttention4Of2Results(FlashAttention4):
    """``flash_attn.cute.interface`` before 4.0.0b20."""

    @staticmethod
    def _flash_attn_fwd(*args, **kwargs) -> tuple[Tensor, Tensor]:
        return FlashAttention4._flash_attn_fwd(*args, **kwargs)[:2]


def _check_fa4(q: Tensor, left: int | None, right: int | None) -> None:
    assert 8 <= q.shape[-1] <= 128, f"head_dim {q.shape[-1]} is not supported on SM100/SM110"
    assert left is None or left >= 0
    assert right is None or right >= 0


class FlashInfer:
    """``flashinfer``: one sequence [S, H, D]; lse [S, H] to the base 2, -inf where nothing is visible."""

    @staticmethod
    def single_prefill_with_kv_cache(
        q, k, v, scale_q=None, scale_k=None, scale_v=None, o_dtype=None, custom_mask=None, packed_custom_mask=None,
        causal=False, kv_layout="NHD", pos_encoding_mode="NONE", use_fp16_qk_reduction=False, sm_scale=None,
        window_left=-1, logits_soft_cap=None, rope_scale=None, rope_theta=None, backend="auto", return_lse=False,
        kv_cache_sf=None, k_scale=None, v_scale=None,
    ):  # fmt: skip
        assert kv_layout == "NHD"
        assert return_lse
        assert q.dim() == k.dim() == v.dim() == 3
        assert q.shape[-1] in (64, 128), "no kernel is instantiated for this head dim"
        window = _limits(window_left, -1)
        out, lse = stand_ins.flash_forward(
            q[None],
            k[None],
            v[None],
            (None, None, *q.shape[:1], *k.shape[:1]),
            sm_scale,
            causal,
            *window,
            logits_soft_cap or 0.0,
        )
        lse = torch.where(lse == torch.inf, -torch.inf, lse / math.log(2))
        return out[0], lse[0].transpose(0, 1).contiguous()


#: The modules by the names under which they are imported.
MODULES = {
    "flash_attn.flash_attn_interface": FlashAttention2,
    "flash_attn_interface": SimpleNamespace(),
    "flash_attn.cute.interface": FlashAttention4,
    "flashinfer": FlashInfer,
}
ROWS = {row.name: dataclasses.replace(row, device="cpu") for row in flash_packages.KERNELS}


def install(monkeypatch, *names: str) -> None:
    """Install stand-ins of the packages of these rows; torch has no kernels."""
    distributions = {ROWS[name].package.distribution for name in names}
    monkeypatch.setattr(packages, "_version", {d: VERSIONS[d] for d in distributions}.get)
    monkeypatch.setattr(packages, "_import_error", inspect.unwrap(packages._import_error))
    for module, functions in MODULES.items():
        monkeypatch.setitem(sys.modules, module, functions)
    monkeypatch.setattr(flash_packages, "_ops", SimpleNamespace(flash_attn_3=FlashAttention3))
    monkeypatch.setattr(flash_packages, "KERNELS", list(ROWS.values()))
    monkeypatch.setattr(torch_attention, "KERNELS", [])


def register(monkeypatch, version: str) -> None:
    """Let torch's "flash" be the code of torch/nn/attention that calls FA3 or FA4, on the stand-ins of these.

    Its checks for CUDA tensors are left out.
    """
    from torch.nn.attention import _fa3, _fa4

    monkeypatch.setattr(_fa3, "_FA3_CUDA_FWD", FlashAttention3.fwd)
    monkeypatch.setattr(_fa3, "_FA3_CUDA_BWD", FlashAttention3.bwd)
    monkeypatch.setattr(_fa3, "_fa3_common_support_error", lambda *_: None)
    monkeypatch.setattr(_fa4, "_FA4_MODULE_PATH", "flash_attn.cute.interface")
    monkeypatch.setattr(_fa4, "_fa4_import_module", sys.modules.__getitem__)
    monkeypatch.setattr(_fa4, "_fa4_common_support_error", lambda *_, **__: None)
    monkeypatch.setattr(_fa4, "_get_device_major", lambda device: 10)
    code = {"FA3": _fa3, "FA4": _fa4}[version]
    forward = "_fa3_flash_attention_forward_impl_default" if version == "FA3" else "_fa4_flash_attention_forward_impl"
    ops = SimpleNamespace(
        _flash_attention_forward=getattr(code, forward),
        _flash_attention_backward=getattr(code, f"_{version.lower()}_flash_attention_backward_impl"),
    )
    monkeypatch.setattr(torch_attention, "_aten", ops)
    monkeypatch.setattr(torch_attention, "KERNELS", [stand_ins.ROWS["flash"]])
    monkeypatch.setattr(torch.nn.attention, "current_flash_attention_impl", lambda: version)
