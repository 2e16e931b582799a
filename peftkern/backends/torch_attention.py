# SPDX-License-Identifier: Apache-2.0
"""The attention kernels of torch and its libraries: one :class:`AttentionKernel` per op, with its conventions.

Kernels of other packages are in :mod:`.flash_packages`. All differ in these respects, each described by a field:

==================  =====================================================================================
device, dtypes      where the op has a kernel
capabilities        the major compute capabilities that have it, if not all of the build's
backward            None if there is none that takes out and lse
max_batch           the largest batch
min_queries         some versions of torch disable cuDNN's kernels for a single query
head_dim_multiple   q, k and v are padded with zeros to a multiple of it; the scale does not change
own_value_dim       v may have a head dim of its own; otherwise, all are padded with zeros to the larger one
grouped             reads [B, Hkv, T, D]; otherwise keys are repeated and their gradients summed
top_left            ``is_causal`` with T > S lets query i see keys up to i instead of up to i + T - S
native              the features for which the op has arguments
masks               accepts an additive mask, which expresses every other feature but a softcap
repeatable          its gradients are the same from run to run under ``torch.use_deterministic_algorithms(True)``
setup               seconds that the op spends on a plan for sizes that it has not seen before
ordered_sums        dk and dv are the same from run to run in any case
limits              reasons of the op's library against a call, for example because of its version
lse_layout          converts lse to the layout that the backward reads: rounded up in length, with a trailing dim
==================  =====================================================================================

Sources: torch's ``native_functions.yaml`` (schemas), ``_meta_registrations.py`` (shapes), ``attention.cu``,
``attention_backward.cu``, ``flash_api.cpp``, ``MHA.cpp``, ``sdp_utils.cpp`` and ``FlashAttentionKernel.cpp``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..arguments import Call
from .base import Refusal
from .packages import Package

_aten = torch.ops.aten
HALF = (torch.float16, torch.bfloat16)
HIP = torch.version.hip is not None  # its flash attention aligns and packs differently, depending on the build


class KernelInputs(NamedTuple):
    """Attention over one set of keys: q [B, Hq, S, D], k [B, Hkv, T, D], v [.., D_v], causal aligned bottom-right.

    ``mask`` is additive, [B or 1, Hq or 1, S, T]. If it is given, it alone defines visibility: causal is false,
    window and cu_seqlens are None, and ``empty`` [B or 1, Hq or 1, S] marks the rows that see no key.

    ``max_seqlen`` bounds the lengths of packed sequences. ``cu_keys``, int32 [n + 1], are the offsets of their keys
    if they differ from those of the queries, and ``max_keys`` bounds the numbers of keys. ``softcap=0.0`` means none.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float
    causal: bool
    window: int | None
    cu_seqlens: Tensor | None
    mask: Tensor | None = None
    empty: Tensor | None = None
    max_seqlen: int | None = None
    cu_keys: Tensor | None = None
    max_keys: int | None = None
    softcap: float = 0.0

    @property
    def window_sizes(self) -> tuple[int | None, int | None]:
        """Keys that a query sees before and after itself, as FlashAttention counts them; None where none is hidden.

        Without a window, causality alone hides keys: torch 2.11's registration of FA4 refuses any window.
        """
        if self.window is None:
            return None, None
        return self.window - 1, 0 if self.causal else None


Forward = Callable[[KernelInputs], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, KernelInputs], tuple[Tensor, Tensor, Tensor]]


def _present() -> str | None:
    return None


def _no_limits(call: Call, features: tuple[str, ...], kv_len: int) -> list[str]:
    return []


@dataclass(frozen=True)
class AttentionKernel:
    """One op. ``forward(inputs)`` returns (out, lse), ``backward(dout, out, lse, inputs)`` returns (dq, dk, dv).

    ``missing()`` says why this machine lacks the op, as its build of torch or a package does, or returns None.
    """

    name: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    max_head_dim: int
    forward: Forward
    backward: Backward | None
    head_dim_multiple: int = 1
    own_value_dim: bool = False
    min_queries: int = 0
    grouped: bool = True
    top_left: bool = False
    native: frozenset[str] = frozenset()
    masks: bool = False
    repeatable: bool = True
    setup: float = 0.0
    ordered_sums: bool = False
    limits: Callable[[Call, tuple[str, ...], int], list[str]] = _no_limits
    lse_layout: Callable[[Tensor], Tensor] = Tensor.contiguous
    package: Package | None = None
    capabilities: frozenset[int] = frozenset()
    max_batch: int | None = None
    missing: Callable[[], str | None] = _present

    @property
    def title(self) -> str:
        """The kernel and where it comes from, for messages."""
        return f"{self.name} ({self.package})" if self.package else f"torch's {self.name}"

    def on_any_machine(self) -> AttentionKernel:
        """The kernel without what this GPU, this build of torch and the packages lack."""
        return replace(self, capabilities=frozenset(), missing=_present, limits=_no_limits)

    def why_not(self, call: Call, features: tuple[str, ...], kv_len: int) -> list[str]:
        """Reasons why the op cannot run attention over ``kv_len`` keys with these ``features`` of ``call``."""
        reasons = []
        if self.backward is None and call.needs_grad:
            reasons.append("has no backward that takes the lse")
        if call.dtype not in self.dtypes:
            reasons.append(f"no {str(call.dtype).removeprefix('torch.')}")
        head_dim = max(call.q_shape[-1], call.value_dim)
        if head_dim > self.max_head_dim:
            reasons.append(f"head dim {head_dim} is above {self.max_head_dim}")
        if self.max_batch is not None and call.q_shape[0] > self.max_batch:
            reasons.append(f"a batch of more than {self.max_batch}")
        if call.q_shape[2] < self.min_queries:
            reasons.append(f"fewer than {self.min_queries} queries")
        if self.top_left and not self.masks and "non-causal" not in features and call.q_shape[2] not in (1, kv_len):
            reasons.append("no causal attention with more keys than queries")
        expressible = self.native | (set(features) - {"softcap"} if self.masks else set())
        reasons += [f"no {name}" for name in features if name not in expressible]
        if call.needs_grad and not self.repeatable and torch.are_deterministic_algorithms_enabled():
            reasons.append("its gradients are not deterministic, as torch.use_deterministic_algorithms requires")
        reasons += self.limits(call, features, kv_len)
        missing = None if reasons else self.why_not_here(call.device)
        return [*reasons, missing] if missing else reasons

    def why_not_here(self, device: torch.device) -> str | None:
        """Why ``device`` or this installation lacks the op, or None if it has it."""
        if self.capabilities and device.type == "cuda" and torch.cuda.is_available():
            major, minor = torch.cuda.get_device_capability(device)
            if major not in self.capabilities:
                return f"not for compute capability {major}.{minor}"
        return self.missing()

    def head_dims(self, head_dim: int, value_dim: int) -> tuple[int, int]:
        """The head dims of q and k, and of v, to which the op's inputs are padded."""
        dims = (head_dim, value_dim) if self.own_value_dim else (max(head_dim, value_dim),) * 2
        padded = [-(-dim // self.head_dim_multiple) * self.head_dim_multiple for dim in dims]
        return padded[0], padded[1]

    def needs_mask(self, inputs: KernelInputs) -> bool:
        """Whether the op's own arguments cannot express the causality, window or packed sequences."""
        shifted = inputs.causal and inputs.q.shape[2] not in (1, inputs.k.shape[2])
        return (
            (inputs.window is not None and "window" not in self.native)
            or (inputs.cu_seqlens is not None and "cu_seqlens" not in self.native)
            or (self.top_left and shifted)
        )


def candidates(
    call: Call, features: tuple[str, ...], num_keys: int, kernels: Sequence[AttentionKernel] | None = None
) -> dict[str, AttentionKernel | Refusal]:
    """The kernels for the call's device by name, or why they cannot attend to ``num_keys`` keys with ``features``.

    ``kernels`` replaces the kernels of this build of torch. A package is imported if nothing else speaks against it.
    """
    found: dict[str, AttentionKernel | Refusal] = {}
    for kernel in KERNELS if kernels is None else kernels:
        if kernel.device == call.device.type:
            reasons = kernel.why_not(call, features, num_keys)
            found[kernel.name] = Refusal((f"{kernel.name}: {', '.join(reasons)}",)) if reasons else kernel
    return found


def refusal(call: Call, found: dict[str, AttentionKernel | Refusal]) -> Refusal | None:
    """Why none of the :func:`candidates` can run a call; None if one can."""
    if not found:
        device = call.device.type
        return Refusal((f"torch has no attention kernel for device type {device!r}: use backend='reference'",), True)
    if any(isinstance(kernel, AttentionKernel) for kernel in found.values()):
        return None
    reasons = "; ".join(
        reason for kernel in found.values() if isinstance(kernel, Refusal) for reason in kernel.reasons
    )
    return Refusal((f"no attention kernel supports this call ({reasons}): use backend='triton'",))


def attention(kernel: AttentionKernel, inputs: KernelInputs) -> tuple[Tensor, Tensor]:
    """Compute (out [B, Hq, S, D_v], lse [B, Hq, S]) in the op's memory layout.

    A row that sees no key has lse -inf; its out is undefined.
    """
    out, lse = kernel.forward(_adapted(kernel, inputs))
    out, lse = out[..., : inputs.v.shape[3]], _rows(lse, inputs.q.shape[2])
    if inputs.empty is not None:  # the ops disagree: 0, +inf or NaN
        lse.masked_fill_(inputs.empty, -torch.inf)
    return out, lse


def attention_backward(
    kernel: AttentionKernel, dout: Tensor, out: Tensor, lse: Tensor, inputs: KernelInputs
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (dq, dk, dv) from the softmax's out and lse [B, Hq, S], the natural logarithm.

    The softmax may run over more keys than ``inputs`` holds: the ops compute p = exp(score - lse) and
    rowsum(out * dout) from what they are given. The result is then the gradient of the larger softmax, restricted to
    these keys.
    """
    adapted = _adapted(kernel, inputs)
    if inputs.empty is not None:  # p = exp(score - inf) = 0 in every op; -inf would give NaN
        lse = torch.nan_to_num(lse, nan=torch.nan, posinf=torch.inf, neginf=torch.inf)
    dout, out = (_padded(x, adapted.v.shape[3]) for x in (dout, out))
    assert kernel.backward is not None
    gradients = kernel.backward(dout, out, kernel.lse_layout(lse), adapted)
    dq, dk, dv = (x[..., : like.shape[3]] for x, like in zip(gradients, inputs[:3], strict=True))
    if dk.shape[1] != inputs.k.shape[1]:
        dk, dv = (x.unflatten(1, (inputs.k.shape[1], -1)).sum(2, dtype=torch.float32) for x in (dk, dv))
    return dq, dk, dv


def _adapted(kernel: AttentionKernel, inputs: KernelInputs) -> KernelInputs:
    """The inputs with heads repeated and padded as the op requires."""
    q, k, v = inputs.q, inputs.k, inputs.v
    if not kernel.grouped and k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    head_dim, value_dim = kernel.head_dims(q.shape[3], v.shape[3])
    q, k, v = _padded(q, head_dim), _padded(k, head_dim), _padded(v, value_dim)
    causal = inputs.causal and q.shape[2] != 1  # a single query at the end sees every key
    return inputs._replace(q=q, k=k, v=v, causal=causal)


def _padded(x: Tensor, head_dim: int) -> Tensor:
    return functional.pad(x, (0, head_dim - x.shape[-1])) if x.shape[-1] < head_dim else x


def _rows(lse: Tensor, q_len: int) -> Tensor:
    """[B, Hq, S] of an lse with a trailing dim or with rows beyond S."""
    lse = lse.squeeze(-1) if lse.dim() == 4 else lse
    return lse[..., :q_len]


# FlashAttention 2, or whichever version torch.nn.attention.activate_flash_attention_impl has registered in its place


def flash_sequences(inputs: KernelInputs) -> tuple[tuple[Tensor, ...], Callable[[Tensor], Tensor], tuple[Any, ...]]:
    """(q, k, v) as [B, S, H, D], or as [S, H, D] with cu_seqlens; the function that does this; the op's lengths."""

    def lay(x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return x if inputs.cu_seqlens is None else x[0]

    if inputs.cu_seqlens is None:
        lengths: tuple[Any, ...] = (None, None, inputs.q.shape[2], inputs.k.shape[2])
    else:
        cu_seqlens = inputs.cu_seqlens.to(torch.int32)
        longest = inputs.q.shape[2] if inputs.max_seqlen is None else min(inputs.max_seqlen, inputs.q.shape[2])
        if inputs.cu_keys is None:
            lengths = (cu_seqlens, cu_seqlens, longest, longest)
        else:
            lengths = (cu_seqlens, inputs.cu_keys, longest, inputs.max_keys)
    return tuple(lay(x) for x in (inputs.q, inputs.k, inputs.v)), lay, lengths


def _flash_forward(inputs: KernelInputs) -> tuple[Tensor, Tensor]:
    qkv, _, lengths = flash_sequences(inputs)
    left, right = inputs.window_sizes
    out, lse, *_ = _aten._flash_attention_forward(
        *qkv, *lengths, 0.0, inputs.causal, False, scale=inputs.scale, window_size_left=left,
        window_size_right=right,
    )  # fmt: skip
    if inputs.cu_seqlens is not None:
        out, lse = out[None], lse[None]
    return out.transpose(1, 2), lse


def _flash_backward(dout: Tensor, out: Tensor, lse: Tensor, inputs: KernelInputs) -> tuple[Tensor, Tensor, Tensor]:
    qkv, lay, lengths = flash_sequences(inputs)
    left, right = inputs.window_sizes
    gradients = _aten._flash_attention_backward(
        lay(dout), *qkv, lay(out), lse if inputs.cu_seqlens is None else lse[0], *lengths, 0.0, inputs.causal,
        *_no_random_state(lse.device), scale=inputs.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    if inputs.cu_seqlens is not None:
        gradients = [x[None] for x in gradients]
    dq, dk, dv = (x.transpose(1, 2) for x in gradients)
    return dq, dk, dv


@functools.cache
def _no_random_state(device: torch.device) -> tuple[Tensor, Tensor]:
    """Seed and offset of a call without dropout, which reads neither, in the dtypes that the op returns."""
    if HIP:
        return torch.empty((), dtype=torch.int64, device=device), torch.empty((), dtype=torch.int64, device=device)
    return torch.empty(2, dtype=torch.uint64, device=device), torch.empty((), dtype=torch.uint64, device=device)


@functools.cache
def _no_seed_and_offset(device: torch.device) -> tuple[Tensor, Tensor]:
    """As :func:`_no_random_state`, for the ops of ``scaled_dot_product_attention``."""
    return torch.empty((), dtype=torch.int64, device=device), torch.empty((), dtype=torch.int64, device=device)


def _cudnn_forward(inputs: KernelInputs) -> tuple[Tensor, Tensor]:
    q, k, v = inputs.q, inputs.k, inputs.v
    out, lse, *_ = _aten._scaled_dot_product_cudnn_attention(
        q, k, v, inputs.mask, True, 0.0, inputs.causal, False, scale=inputs.scale
    )
    return out, lse


def _cudnn_backward(dout: Tensor, out: Tensor, lse: Tensor, inputs: KernelInputs) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs.q, inputs.k, inputs.v
    dq, dk, dv = _aten._scaled_dot_product_cudnn_attention_backward(
        dout, q, k, v, out, lse, *_no_seed_and_offset(lse.device), inputs.mask, None, None, q.shape[2],
        k.shape[2], 0.0, inputs.causal, scale=inputs.scale,
    )  # fmt: skip
    return dq, dk, dv


def _cudnn_lse(lse: Tensor) -> Tensor:
    """[B, Hq, S] -> [B, Hq, S, 1]."""
    return lse.contiguous()[..., None]


def _cudnn_limits(call: Call, features: tuple[str, ...], kv_len: int) -> list[str]:
    """cuDNN before 9.15.1 is wrong for causal attention over lengths that are no multiple of 128."""
    ragged = call.q_shape[2] % 128 or kv_len % 128
    if ragged and "non-causal" not in features and (torch.backends.cudnn.version() or 0) < 91501:
        return ["cuDNN before 9.15.1 has no causal attention over lengths that are no multiple of 128"]
    return []


def _efficient_forward(inputs: KernelInputs) -> tuple[Tensor, Tensor]:
    q, k, v = inputs.q, inputs.k, inputs.v
    out, lse, *_ = _aten._scaled_dot_product_efficient_attention(
        q, k, v, _full_mask(inputs), True, 0.0, inputs.causal, scale=inputs.scale
    )
    return out, lse


def _efficient_backward(
    dout: Tensor, out: Tensor, lse: Tensor, inputs: KernelInputs
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs.q, inputs.k, inputs.v
    dq, dk, dv, _ = _aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, _full_mask(inputs), out, lse, *_no_seed_and_offset(lse.device), 0.0,
        [True, True, True, False], inputs.causal, scale=inputs.scale,
    )  # fmt: skip
    return dq, dk, dv


def _full_mask(inputs: KernelInputs) -> Tensor | None:
    if inputs.mask is None:
        return None
    return inputs.mask.expand(*inputs.q.shape[:3], inputs.k.shape[2])


def _efficient_lse(lse: Tensor) -> Tensor:
    """Rows rounded up to 32 on NVIDIA, whose kernel loads whole vectors; the added rows hold +inf."""
    if HIP:
        return lse.contiguous()
    missing = -lse.shape[2] % 32
    return functional.pad(lse, (0, missing), value=torch.inf) if missing else lse.contiguous()


def _cpu_forward(inputs: KernelInputs) -> tuple[Tensor, Tensor]:
    q, k, v = inputs.q, inputs.k, inputs.v
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, inputs.causal, attn_mask=inputs.mask, scale=inputs.scale
    )
    return out, lse


def _cpu_backward(dout: Tensor, out: Tensor, lse: Tensor, inputs: KernelInputs) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = inputs.q, inputs.k, inputs.v
    dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, inputs.causal, attn_mask=inputs.mask, scale=inputs.scale
    )
    return dq, dk, dv


def _not_built(built: bool) -> Callable[[], str | None]:
    return lambda: None if built else "not in this build of torch"


#: In order of preference.
KERNELS = [
    AttentionKernel(
        "flash", "cuda", HALF, 256, _flash_forward, _flash_backward, head_dim_multiple=8,
        top_left=HIP, native=frozenset({"non-causal", "window"} | (set() if HIP else {"cu_seqlens"})),
        ordered_sums=True, missing=_not_built(torch.backends.cuda.is_flash_attention_available()),
    ),
    AttentionKernel(
        "cudnn", "cuda", HALF, 128, _cudnn_forward, _cudnn_backward, head_dim_multiple=8, own_value_dim=True,
        min_queries=2, top_left=True, native=frozenset({"non-causal"}), masks=True, repeatable=False, setup=0.03,
        limits=_cudnn_limits, lse_layout=_cudnn_lse,
        missing=_not_built(torch.backends.cudnn.is_available() and not HIP),
    ),
    AttentionKernel(
        "efficient", "cuda", (torch.float32, *HALF), 256, _efficient_forward, _efficient_backward,
        head_dim_multiple=8, own_value_dim=not HIP, grouped=False, top_left=True, native=frozenset({"non-causal"}),
        masks=True, lse_layout=_efficient_lse,
    ),
    AttentionKernel(
        "cpu flash", "cpu", (torch.float32, *HALF), 256, _cpu_forward, _cpu_backward, grouped=False, top_left=True,
        native=frozenset({"non-causal"}), masks=True, ordered_sums=True,
    ),
]  # fmt: skip
