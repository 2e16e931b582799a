# SPDX-License-Identifier: Apache-2.0
"""The FlashAttention that may run in the place of torch's own, and what it refuses.

``torch.nn.attention.activate_flash_attention_impl("FA3")`` puts Python functions behind the flash ops of torch, which
call the package flash-attn-3 or flash-attn-4. Read from ``torch/nn/attention/_fa3.py`` and ``_fa4.py`` of torch 2.11
and 2.13, ``hopper/flash_api.cpp`` and flash-attn-4 4.0.0b4 to 4.0.0b36.
"""

from __future__ import annotations

import inspect
import sys
import typing
from dataclasses import replace
from typing import Any

import torch

from ..arguments import Call
from .torch_attention import AttentionKernel


def registered_flash() -> str | None:
    """The FlashAttention that ``torch.nn.attention.activate_flash_attention_impl`` has activated, or None."""
    return torch.nn.attention.current_flash_attention_impl()


def as_registered(kernels: list[AttentionKernel]) -> list[AttentionKernel]:
    """Torch's kernels, where "flash" has the limits of the FlashAttention that is registered in its place."""
    limits = _REGISTERED.get(registered_flash() or "", {})
    return [replace(kernel, **limits) if kernel.name == "flash" else kernel for kernel in kernels]


def _fa4_mismatch() -> str | None:
    """Torch 2.11 to 2.13 expect (out, lse) of flash-attn-4, which returns more since 4.0.0b20."""
    module = sys.modules.get("flash_attn.cute.interface")
    returned = inspect.signature(module._flash_attn_fwd).return_annotation if module else None
    count = len(typing.get_args(returned))
    return f"torch expects 2 results of flash-attn-4, which returns {count}" if count > 2 else None


def fa3_limits(call: Call, features: tuple[str, ...], kv_len: int) -> list[str]:
    """FA3's largest tiles have no deterministic backward."""
    if call.needs_grad and call.q_shape[-1] > 192 and torch.are_deterministic_algorithms_enabled():
        return ["no deterministic gradients for head dims above 192"]
    return []


#: What torch/nn/attention/_fa3.py and _fa4.py refuse or hand to a library that refuses it.
_REGISTERED: dict[str, dict[str, Any]] = {
    "FA3": {"capabilities": frozenset({9}), "limits": fa3_limits, "ordered_sums": False},
    "FA4": {
        "capabilities": frozenset({9, 10}),
        "max_head_dim": 128,  # beyond, compute capability 10.0 has 256 alone
        "native": frozenset({"non-causal", "cu_seqlens"}),  # torch 2.11 refuses a window
        "missing": _fa4_mismatch,
        "ordered_sums": False,
    },
}
