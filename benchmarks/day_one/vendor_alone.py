# SPDX-License-Identifier: Apache-2.0
"""Torch's attention kernel on concatenated keys: how exact a result can be that this kernel takes part in.

Some kernels of torch compute fp32 with less precision than fp32 has: the memory-efficient one multiplies in three
TF32 products. A result of ``merge`` or ``concat`` that is as exact as such a kernel alone is no fault of theirs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from peftkern.arguments import AttentionArgs
from peftkern.backends.dense_mask import additive_mask, visibility
from peftkern.backends.torch_attention import AttentionKernel, KernelInputs, attention
from peftkern.testing.bounds import Attention
from peftkern.validation import validate_attention

#: Options that torch's kernels lack, or do not differentiate.
_OTHERS = {"sinks", "gate", "softcap", "dropout_p", "bias", "prefix_bias"}


def vendor_alone(kernel: AttentionKernel, device: str, options: dict[str, Any]) -> Attention | None:
    """A function for :func:`peftkern.testing.ratios` that runs ``kernel``, or None if it lacks one of the options."""
    if {"cu_seqlens", "prefix_ids"} <= options.keys() or not _OTHERS.isdisjoint(options):
        return None

    def run(**inputs: Any) -> tuple[Tensor, Tensor]:
        args = _arguments({n: x.to(device) if isinstance(x, Tensor) else x for n, x in inputs.items()})
        keys, values = (
            torch.cat([_expanded(prefix, args), sequence], 2)
            for prefix, sequence in ((args.prefix_k, args.k), (args.prefix_v, args.v))
        )
        seen = visibility(args)
        shape = torch.broadcast_shapes(seen.prefix.shape[:-1], seen.sequence.shape[:-1])
        visible = torch.cat([x.expand(*shape, x.shape[-1]) for x in (seen.prefix, seen.sequence)], -1)
        mask, empty = additive_mask(visible, None, args.q.detach(), keys.shape[2])
        inputs = KernelInputs(args.q, keys, values, args.scale, False, None, None, mask=mask)
        out, lse = attention(kernel, inputs)
        return torch.where(empty[..., None], 0.0, out).cpu(), torch.where(empty, -torch.inf, lse).cpu()

    return run


def _arguments(inputs: dict[str, Any]) -> AttentionArgs:
    defaults: dict[str, Any] = dict.fromkeys(AttentionArgs._fields)
    defaults |= {"causal": True, "prefix_in_window": True, "dropout_p": 0.0}
    return validate_attention(AttentionArgs(**{**defaults, **inputs}), None)


def _expanded(prefix: Tensor, args: AttentionArgs) -> Tensor:
    """The prefix of each sample, [B, Hkv, P, D]."""
    prefix = prefix.to(args.q.dtype)
    if args.prefix_ids is None:
        return prefix.expand(args.q.shape[0], *prefix.shape[-3:])
    return prefix[args.prefix_ids.long().clamp(min=0)]
