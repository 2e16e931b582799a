# SPDX-License-Identifier: Apache-2.0
"""Prefix kernels of ``merge`` for long prefixes: an attention kernel of torch attends to the prefix as well.

Attention over a prefix of a few hundred tokens is bound by arithmetic, at which torch's kernels are faster than ours.
All rows of the batch share the prefix, so to the kernel they are one sequence of B S queries over P keys, a view,
without causality. A kernel of ours merges the two results. Backward: the kernel receives the merged out and lse and
computes the prefix's share of dq, dprefix_k and dprefix_v. It sums them in fp32 and rounds the sums to its dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..arguments import AttentionArgs, AttentionGradients, Call
from . import torch_attention
from .base import JoiningKernels, MergeKernels, Plan, Refusal
from .composite import as_bshd
from .cost.model import Pass, sizes_of
from .flash_registration import as_registered
from .torch_attention import AttentionKernel, KernelInputs, attention, attention_backward

#: Features with which a row does not see the whole prefix, or not by the joint softmax alone.
_UNSUPPORTED = frozenset({"bank", "prefix_lens", "prefix_bias", "gate", "sinks"})


def with_long_prefixes(
    call: Call, beside: dict[str, MergeKernels | Refusal], kernels: Sequence[AttentionKernel] | None = None
) -> dict[str, MergeKernels | Refusal]:
    """``beside`` and, if they can run ``call``, the same prefix kernels with torch's kernels on the prefix.

    Args:
        call: the call.
        beside: prefix kernels by name.
        kernels: replaces the kernels of this build of torch.
    """
    windowed = "window" in call.features and "prefix outside window" not in call.features
    if call.op != "prefix_attention" or windowed or not _UNSUPPORTED.isdisjoint(call.features):
        return beside
    batch, heads, q_len, head_dim = call.q_shape
    features = tuple(name for name in ("non-causal", "softcap") if name == "non-causal" or name in call.features)
    rows = replace(call, q_shape=(1, heads, batch * q_len, head_dim), features=features)
    if 0 in rows.q_shape or call.prefix_shape[-2] == 0:
        return beside
    kernels = as_registered(torch_attention.KERNELS) if kernels is None else kernels
    found = torch_attention.candidates(rows, rows.features, call.prefix_shape[-2], kernels)
    long = [
        LongPrefixKernels(kernel, ours)
        for kernel in found.values()
        if isinstance(kernel, AttentionKernel) and kernel.ordered_sums
        for ours in beside.values()
        if isinstance(ours, JoiningKernels)
    ]
    return {**beside, **{x.name: x for x in long}}


@dataclass(frozen=True)
class LongPrefixKernels(MergeKernels):
    """A kernel of torch on the prefix. Other kernels merge its result, and run where there is no sequence."""

    kernel: AttentionKernel
    beside: JoiningKernels

    @property
    def name(self) -> str:
        return f"{self.kernel.name}+{self.beside.name}"

    @property
    def title(self) -> str:
        return f"{self.kernel.title} on the prefix, {self.beside.title}"

    @property
    def attention(self) -> Plan:
        return self.beside.attention

    def merge_costs(self, call: Call) -> tuple[Pass, Pass]:
        x, engine = sizes_of(call), self.kernel.name
        # attention reads q and writes out, the merge reads two and writes one
        forward = Pass(engine, 2, x.prefix_flops, x.q + 4 * x.out + 4 * x.lse + x.prefix_once)
        # q, dq, out and dout by the attention, 2 q for dq in fp32, 3 q for its sum
        moved = 7 * x.q + 2 * x.out + 3 * x.lse + 2 * x.prefix_once
        # FlashAttention's backward runs one block per head and 128 keys, over all rows
        blocks = x.heads * -(-x.prefix // 128)
        return forward, Pass(engine, 7, 2.5 * x.prefix_flops, moved, True, blocks=blocks)

    def merge_prefix(
        self, args: AttentionArgs, part_out: Tensor | None, part_lse: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if part_out is None or part_lse is None:
            return self.beside.merge_prefix(args, part_out, part_lse)
        prefix_out, prefix_lse = attention(self.kernel, _prefix_inputs(args))
        out, lse = as_bshd(part_out, args.q), part_lse.contiguous()
        batch = args.q.shape[0]
        self.beside.merge_states(out, lse, _batched(prefix_out, batch), _batched(prefix_lse, batch))
        return out, lse

    def merge_prefix_backward(
        self,
        dout: Tensor,
        out: Tensor,
        lse: Tensor,
        args: AttentionArgs,
        part_dq: Tensor | None,
        gradients: AttentionGradients,
    ) -> None:
        if args.q.numel() == 0 or part_dq is None:
            self.beside.merge_prefix_backward(dout, out, lse, args, part_dq, gradients)
            return
        statistics = lse.transpose(0, 1).flatten(1, 2)[None]  # [1, Hq, B * S]; a copy if B > 1
        dq, dk, dv = attention_backward(self.kernel, _rows(dout), _rows(out), statistics, _prefix_inputs(args))
        if gradients.dq.numel():
            if part_dq is not gradients.dq:
                gradients.dq.copy_(part_dq)
            _rows(gradients.dq).add_(dq)
        for x, total in ((dk, gradients.dprefix_k), (dv, gradients.dprefix_v)):
            if total.numel():
                total.copy_(x[0])


def _prefix_inputs(args: AttentionArgs) -> KernelInputs:
    """The attention of all rows to the prefix, rounded to q's dtype."""
    prefix_k, prefix_v = (x[None].to(args.q.dtype) for x in (args.prefix_k, args.prefix_v))
    return KernelInputs(_rows(args.q), prefix_k, prefix_v, args.scale, False, None, None, softcap=args.softcap)


def _rows(x: Tensor) -> Tensor:
    """[B, H, S, D] -> [1, H, B * S, D], a view if x lies in memory as [B, S, H, D]."""
    return x.transpose(1, 2).flatten(0, 1).transpose(0, 1)[None]


def _batched(x: Tensor, batch: int) -> Tensor:
    """[1, H, B * S, ...] -> [B, H, S, ...], a view."""
    batched: Tensor = x[0].unflatten(1, (batch, -1)).transpose(0, 1)
    return batched
