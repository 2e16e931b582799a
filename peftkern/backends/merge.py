# SPDX-License-Identifier: Apache-2.0
"""Another library's kernel on the sequence, ours on the prefix, merged in place; exact in both directions.

Forward: the vendor's (out, lse) over the sequence is one state of the softmax, the prefix another; one pass over the
rows merges them where the vendor left them. Backward: the vendor's kernel, given the merged out and lse, computes the
joint gradient of the sequence; one pass over the rows adds the prefix's part to its dq and sums the prefix's own
gradients.

The prefix's kernels are CUDA C++ or Triton, :mod:`.prefix_kernels` says which. Gradients of lse, sinks, biases and
the gate are those of the ``cuda`` or ``triton`` backend, for the vendors' ops have none.
The prefix's gradients are bitwise repeatable; dq, dk and dv are as repeatable as the vendor's op, on CUDA under
``torch.use_deterministic_algorithms(True)``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .. import reference
from ..arguments import AttentionArgs, AttentionGradients, Call, allocate_gradients, call_of
from . import prefix_kernels, triton
from .prefix_kernels import soft_prompt_embedding, soft_prompt_embedding_backward
from .torch_attention import Problem, Vendor, additive_mask, attention, attention_backward, choose

__all__ = [
    "limits", "made_of", "prefix_attention", "prefix_attention_backward", "soft_prompt_embedding",
    "soft_prompt_embedding_backward", "why_not",
]  # fmt: skip

#: Features that the prefix's kernel has, so that no vendor needs them.
_OF_THE_PREFIX = frozenset({"bank", "prefix_lens", "prefix_bias", "gate", "sinks", "prefix outside window"})
NO_VENDOR_HAS = {"softcap": "softcap", "dropout": "peftkern's dropout"}


def why_not(call: Call) -> list[str]:
    return limits(call) or prefix_kernels.choose(call)[1]


def made_of(call: Call) -> str:
    """The kernels that run a call, for messages."""
    return prefix_kernels.names(call, sequence_features(call.features), call.kv_shape[2])


def limits(call: Call) -> list[str]:
    """What the prefix's kernels and the vendors' ops cannot do on ``call``'s device; Triton's can do most."""
    reasons = triton.limits(call)
    if call.op == "prefix_attention":
        reasons += [
            f"no kernel of torch's has {what}: use backend='triton'"
            for feature, what in NO_VENDOR_HAS.items()
            if feature in call.features
        ]
        if not reasons:
            reasons += choose(call, sequence_features(call.features), call.kv_shape[2])[1]
    return reasons


def sequence_features(features: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in features if name not in _OF_THE_PREFIX)


def prefix_attention(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    part = prefix_kernels.of_attention(args)
    if _nothing_to_see(args):
        return part.merge_prefix(args, None, None)
    vendor, problem = _sequence(args)
    return part.merge_prefix(args, *attention(vendor, problem))


def prefix_attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, needs: list[bool]
) -> AttentionGradients:
    part = prefix_kernels.of_attention(args, backward=True)
    if needs_exact_softmax(dlse, args, needs):
        return part.backend.prefix_attention_backward(dout, dlse, out, lse, args, needs)
    if _nothing_to_see(args) or not any(needs[:3]):
        gradients = allocate_gradients(args, needs)
        gradients.dk.zero_()
        gradients.dv.zero_()
        part.merge_prefix_backward(dout, out, lse, args, None, gradients)
        return gradients
    vendor, problem = _sequence(args)
    parts = attention_backward(vendor, dout, out, lse, problem)
    gradients = with_sequence(allocate_gradients(args, [False, False, False, *needs[3:]]), parts, needs)
    part.merge_prefix_backward(dout, out, lse, args, gradients.dq, gradients)
    return gradients


def needs_exact_softmax(dlse: Tensor | None, args: AttentionArgs, needs: list[bool]) -> bool:
    """Whether a gradient is wanted that takes more of the softmax than the rounded out and lse."""
    sums = dict(zip(AttentionGradients._fields, needs, strict=True))
    return (
        dlse is not None or args.gate is not None or any(sums[name] for name in ("dsinks", "dbias", "dprefix_bias"))
    )


def laid_out(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [B, H, N, D] in ``dtype`` with the memory order [B, N, H, D]; x itself if it is."""
    return x.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


def with_sequence(
    gradients: AttentionGradients, parts: tuple[Tensor, Tensor, Tensor], needs: list[bool]
) -> AttentionGradients:
    """``gradients`` with a vendor's dq, dk, dv where they are needed, in the layout of the op's outputs."""
    kept = [
        laid_out(part, empty.dtype) if need else empty
        for part, need, empty in zip(parts, needs[:3], gradients[:3], strict=True)
    ]
    return gradients._replace(dq=kept[0], dk=kept[1], dv=kept[2])


def _nothing_to_see(args: AttentionArgs) -> bool:
    """Whether there are no rows or no keys: some ops divide by their number."""
    return args.q.numel() == 0 or args.k.numel() == 0


def _sequence(args: AttentionArgs) -> tuple[Vendor, Problem]:
    """The part of a call that concerns the sequence, and the kernel for it."""
    vendor = chosen(args, sequence_features, args.k.shape[2])
    problem = Problem(
        args.q, args.k, args.v, args.scale, args.causal, args.window, args.cu_seqlens, mask=None, empty=None
    )
    if args.key_mask is None and args.bias is None and not vendor.needs_mask(problem):
        return vendor, problem
    batch, _, q_len, _ = args.q.shape
    kv_len = args.k.shape[2]
    visible, _ = reference.visibility(
        (batch, q_len, kv_len, 1, 0), args.q.device, args.causal, args.key_mask, args.cu_seqlens, None, None,
        args.window, False,
    )  # fmt: skip
    mask, empty = additive_mask(visible, args.bias, args.q, kv_len)
    return vendor, problem._replace(causal=False, window=None, cu_seqlens=None, mask=mask, empty=empty)


def chosen(args: AttentionArgs, needed: Callable[[tuple[str, ...]], tuple[str, ...]], kv_len: int) -> Vendor:
    """The kernel that :func:`limits` promised for a call; ``needed`` are the features that it must have."""
    call = call_of(args)
    vendor, reasons = choose(call, needed(call.features), kv_len)
    if vendor is None:
        raise RuntimeError(f"{call}: {reasons[0]}")
    return vendor
