# SPDX-License-Identifier: Apache-2.0
"""Attention kernels of other libraries, reached through torch's own ops: one row per op, with its conventions.

What differs between them, and the row's field for it:

==================  =====================================================================================
devices, dtypes     where the op has a kernel
min_queries         cuDNN's kernels for one query are switched off in some versions
head_dim_multiple   q, k, v are padded with zeros to it (the scale stays that of the true head dim)
grouped             reads [B, Hkv, T, D]; otherwise keys are repeated and their gradients summed
top_left            what ``is_causal`` means where T > S: query i sees keys up to i, and not up to i + T - S
native              features that the op has arguments for
masks               takes an additive mask, which then expresses everything else
lse_unit            lse times this is the natural logarithm
lse_layout          the lse that the backward reads: rounded up in length, with a trailing dim, …
==================  =====================================================================================

Sources: torch's ``native_functions.yaml`` (schemas), ``_meta_registrations.py`` (shapes), ``attention.cu``,
``attention_backward.cu``, ``flash_api.cpp``, ``MHA.cpp``, ``sdp_utils.cpp`` and ``FlashAttentionKernel.cpp``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..arguments import Call

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
_HIP = torch.version.hip is not None  # its flash attention aligns and packs otherwise, depending on the build


class Problem(NamedTuple):
    """Attention over one set of keys: q [B, Hq, S, D], k and v [B, Hkv, T, D], causal aligned bottom-right.

    ``mask`` is additive, [B or 1, Hq or 1, S, T], and says everything about visibility: then causal is false, and
    window and cu_seqlens are None. ``empty`` [B or 1, Hq or 1, S] bool: rows that the mask lets see nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool
    window: int | None
    cu_seqlens: Tensor | None
    mask: Tensor | None
    empty: Tensor | None

    @property
    def window_sizes(self) -> tuple[int | None, int | None]:
        """Keys that a query sees before and after itself, as FlashAttention counts them."""
        left = None if self.window is None else self.window - 1
        return left, 0 if self.causal else None


Forward = Callable[[Problem], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Problem], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Vendor:
    """A row of the table. ``forward`` returns the op's out and lse, ``backward`` (dout, out, lse) its dq, dk, dv."""

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    max_head_dim: int
    forward: Forward
    backward: Backward
    head_dim_multiple: int = 1
    min_queries: int = 0
    grouped: bool = True
    top_left: bool = False
    native: frozenset[str] = frozenset()
    masks: bool = False
    lse_unit: float = 1.0
    lse_layout: Callable[[Tensor], Tensor] = Tensor.contiguous
    usable: bool = True

    def why_not(self, call: Call, features: tuple[str, ...], kv_len: int) -> list[str]:
        """Reasons why the op cannot run attention over ``kv_len`` keys with these of ``call``'s ``features``."""
        reasons = []
        if call.dtype not in self.dtypes:
            reasons.append(f"no {str(call.dtype).removeprefix('torch.')}")
        if call.q_shape[-1] > self.max_head_dim:
            reasons.append(f"head dim {call.q_shape[-1]} is above {self.max_head_dim}")
        if call.q_shape[2] < self.min_queries:
            reasons.append(f"fewer than {self.min_queries} queries")
        if self.top_left and not self.masks and "non-causal" not in features and call.q_shape[2] not in (1, kv_len):
            reasons.append("not causal with more keys than queries")
        if not self.masks:
            reasons += [f"no {name}" for name in features if name not in self.native]
        if not self.usable:
            reasons.append("not in this build of torch")
        return reasons

    def needs_mask(self, problem: Problem) -> bool:
        """Whether the op's own arguments cannot express the problem's causality, window or sequences."""
        shifted = problem.causal and problem.q.shape[2] not in (1, problem.k.shape[2])
        return (
            (problem.window is not None and "window" not in self.native)
            or (problem.cu_seqlens is not None and "cu_seqlens" not in self.native)
            or (self.top_left and shifted)
        )


def choose(
    call: Call, features: tuple[str, ...], kv_len: int, vendors: Sequence[Vendor] | None = None
) -> tuple[Vendor | None, list[str]]:
    """The first row that can run attention over ``kv_len`` keys with these ``features``; else a line of reasons.

    ``vendors``: rows in place of this torch's.
    """
    reasons = []
    for vendor in VENDORS if vendors is None else vendors:
        if vendor.device == call.device.type:
            lacks = vendor.why_not(call, features, kv_len)
            if not lacks:
                return vendor, []
            reasons.append(f"{vendor.name}: {', '.join(lacks)}")
    if not reasons:
        return None, [f"torch has no attention kernel for device type {call.device.type!r}: use backend='reference'"]
    return None, [f"no kernel of torch's can ({'; '.join(reasons)}): use backend='triton'"]


def attention(vendor: Vendor, problem: Problem) -> tuple[Tensor, Tensor]:
    """(out [B, Hq, S, D], lse [B, Hq, S]) as the op lays them out, lse in its own unit.

    A row that sees no keys has lse -inf, and anything in out.
    """
    out, lse = vendor.forward(_adapted(vendor, problem))
    out, lse = out[..., : problem.q.shape[3]], _rows(lse, problem.q.shape[2])
    if problem.empty is not None:  # the ops disagree: 0, +inf or NaN
        lse.masked_fill_(problem.empty, -torch.inf)
    return out, lse


def attention_backward(
    vendor: Vendor, dout: Tensor, out: Tensor, lse: Tensor, problem: Problem
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of the problem's part of a softmax whose out and lse [B, Hq, S] (natural) are given.

    They may be those of a softmax over more keys: the ops compute p = exp(score - lse) and rowsum(out * dout) from
    what they are given, so the gradient is that of the larger softmax restricted to these keys.
    """
    adapted = _adapted(vendor, problem)
    # p = exp(score - inf) = 0 in every op; -inf would give NaN
    lse = torch.where(lse == -torch.inf, torch.inf, lse) / vendor.lse_unit
    dout, out = (_padded(x, vendor.head_dim_multiple) for x in (dout, out))
    gradients = vendor.backward(dout, out, vendor.lse_layout(lse), adapted)
    dq, dk, dv = (x[..., : problem.q.shape[3]] for x in gradients)
    if dk.shape[1] != problem.k.shape[1]:
        dk, dv = (x.unflatten(1, (problem.k.shape[1], -1)).sum(2, dtype=torch.float32) for x in (dk, dv))
    return dq, dk, dv


def additive_mask(visible: Tensor, bias: Tensor | None, q: Tensor, kv_len: int) -> tuple[Tensor, Tensor]:
    """(mask, empty) of :class:`Problem` from what is ``visible`` and a ``bias``, both broadcastable to [B, Hq, S, T].

    The mask has the dtype of q, and rows of a multiple of 16 elements in memory, as the CUDA ops ask.
    """
    shape = torch.broadcast_shapes(visible.shape, () if bias is None else bias.shape, (q.shape[2], kv_len))
    mask = q.new_zeros(*shape[:-1], -(-kv_len // 16) * 16)[..., :kv_len]
    if bias is not None:
        mask += bias
    mask.masked_fill_(~visible, -torch.inf)
    return mask, (mask == -torch.inf).all(-1)


def _adapted(vendor: Vendor, problem: Problem) -> Problem:
    """Heads repeated and padded as the op asks."""
    q, k, v = problem.q, problem.k, problem.v
    if not vendor.grouped and k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    q, k, v = (_padded(x, vendor.head_dim_multiple) for x in (q, k, v))
    causal = problem.causal and q.shape[2] != 1  # a single query at the end sees every key
    return problem._replace(q=q, k=k, v=v, causal=causal)


def _padded(x: Tensor, multiple: int) -> Tensor:
    return functional.pad(x, (0, -x.shape[-1] % multiple)) if x.shape[-1] % multiple else x


def _rows(lse: Tensor, q_len: int) -> Tensor:
    """[B, Hq, S] of an lse with a trailing dim or with rows beyond S."""
    lse = lse.squeeze(-1) if lse.dim() == 4 else lse
    return lse[..., :q_len]


# FlashAttention 2, or whichever version torch.nn.attention.activate_flash_attention_impl has registered in its place


def _flash_sequences(problem: Problem) -> tuple[tuple[Tensor, ...], Callable[[Tensor], Tensor], tuple[Any, ...]]:
    """((q, k, v) as [B, S, H, D], or [S, H, D] with cu_seqlens; what does the same to others; the op's lengths)."""

    def lay(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return x if problem.cu_seqlens is None else x[0]

    cu_seqlens = None if problem.cu_seqlens is None else problem.cu_seqlens.to(torch.int32)
    lengths = (cu_seqlens, cu_seqlens, problem.q.shape[2], problem.k.shape[2])
    return tuple(lay(x) for x in (problem.q, problem.k, problem.v)), lay, lengths


def _flash_forward(problem: Problem) -> tuple[Tensor, Tensor]:
    qkv, _, lengths = _flash_sequences(problem)
    left, right = problem.window_sizes
    out, lse, *_ = _aten._flash_attention_forward(
        *qkv, *lengths, 0.0, problem.causal, False, scale=problem.scale, window_size_left=left,
        window_size_right=right,
    )  # fmt: skip
    if problem.cu_seqlens is not None:
        out, lse = out[None], lse[None]
    return out.transpose(1, 2), lse


def _flash_backward(dout: Tensor, out: Tensor, lse: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    qkv, lay, lengths = _flash_sequences(problem)
    left, right = problem.window_sizes
    gradients = _aten._flash_attention_backward(
        lay(dout), *qkv, lay(out), lse if problem.cu_seqlens is None else lse[0], *lengths, 0.0, problem.causal,
        *_no_random_state(lse.device), scale=problem.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    if problem.cu_seqlens is not None:
        gradients = [x[None] for x in gradients]
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv


def _no_random_state(device: torch.device) -> tuple[Tensor, Tensor]:
    """Seed and offset of a call without dropout, of the types that the op returns them in."""
    if _HIP:
        return torch.zeros((), dtype=torch.int64, device=device), torch.zeros((), dtype=torch.int64, device=device)
    return torch.zeros(2, dtype=torch.uint64, device=device), torch.zeros((), dtype=torch.uint64, device=device)


def _cudnn_forward(problem: Problem) -> tuple[Tensor, Tensor]:
    q, k, v = problem.q, problem.k, problem.v
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, problem.mask, True, 0.0, problem.causal, False, scale=problem.scale
    )
    return out, lse


def _cudnn_backward(dout: Tensor, out: Tensor, lse: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = problem.q, problem.k, problem.v
    seed, offset = (torch.zeros((), dtype=torch.int64, device=lse.device) for _ in range(2))
    dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, seed, offset, problem.mask, None, None, q.shape[2], k.shape[2], 0.0, problem.causal,
        scale=problem.scale,
    )  # fmt: skip
    return dq, dk, dv


def _cudnn_lse(lse: Tensor) -> Tensor:
    """[B, Hq, S], or with a trailing dim where torch's forward returns one, as it has since 2.9."""
    lse = lse.contiguous()
    return lse[..., None] if _cudnn_lse_dims() == 4 else lse


@functools.cache
def _cudnn_lse_dims() -> int:
    x = torch.empty(1, 1, 8, 8, dtype=torch.float16, device="meta")
    return int(torch.ops.aten._scaled_dot_product_cudnn_attention(x, x, x, None, True)[1].dim())


def _efficient_forward(problem: Problem) -> tuple[Tensor, Tensor]:
    q, k, v = problem.q, problem.k, problem.v
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
        q, k, v, _full_mask(problem), True, 0.0, problem.causal, scale=problem.scale
    )
    return out, lse


def _efficient_backward(dout: Tensor, out: Tensor, lse: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = problem.q, problem.k, problem.v
    seed, offset = (torch.zeros((), dtype=torch.int64, device=lse.device) for _ in range(2))
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, _full_mask(problem), out, lse, seed, offset, 0.0, [True, True, True, False], problem.causal,
        scale=problem.scale,
    )  # fmt: skip
    return dq, dk, dv


def _full_mask(problem: Problem) -> Tensor | None:
    if problem.mask is None:
        return None
    return problem.mask.expand(*problem.q.shape[:3], problem.k.shape[2])


def _efficient_lse(lse: Tensor) -> Tensor:
    """Rows rounded up to 32 on NVIDIA (the kernel loads them in whole vectors), +inf where there is no row."""
    if _HIP:
        return lse.contiguous()
    return functional.pad(lse, (0, -lse.shape[2] % 32), value=torch.inf)


def _cpu_forward(problem: Problem) -> tuple[Tensor, Tensor]:
    q, k, v = problem.q, problem.k, problem.v
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, problem.causal, attn_mask=problem.mask, scale=problem.scale
    )
    return out, lse


def _cpu_backward(dout: Tensor, out: Tensor, lse: Tensor, problem: Problem) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = problem.q, problem.k, problem.v
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, problem.causal, attn_mask=problem.mask, scale=problem.scale
    )
    return dq, dk, dv


#: In the order in which they are tried.
VENDORS = [
    Vendor(
        "flash", "cuda", _HALF, 256, _flash_forward, _flash_backward, head_dim_multiple=8,
        top_left=_HIP, native=frozenset({"non-causal", "window"} | (set() if _HIP else {"cu_seqlens"})),
        usable=torch.backends.cuda.is_flash_attention_available(),
    ),
    Vendor(
        "cudnn", "cuda", _HALF, 128, _cudnn_forward, _cudnn_backward, head_dim_multiple=8, min_queries=2,
        top_left=True, native=frozenset({"non-causal"}), masks=True, lse_layout=_cudnn_lse,
        usable=torch.backends.cudnn.is_available() and not _HIP,
    ),
    Vendor(
        "efficient", "cuda", (torch.float32, *_HALF), 256, _efficient_forward, _efficient_backward,
        head_dim_multiple=8, grouped=False, top_left=True, native=frozenset({"non-causal"}), masks=True,
        lse_layout=_efficient_lse,
    ),
    Vendor(
        "cpu flash", "cpu", (torch.float32, *_HALF), 256, _cpu_forward, _cpu_backward, grouped=False, top_left=True,
        native=frozenset({"non-causal"}), masks=True,
    ),
]  # fmt: skip
