# SPDX-License-Identifier: Apache-2.0
"""Torch's attention kernel on the sequence, a prefix kernel of ours merged in place; exact in both directions.

Forward: torch's kernel returns (out, lse) over the sequence, one state of an online softmax. A pass over the rows
merges the prefix into it, in the memory where torch's kernel left it. Backward: torch's kernel receives the merged
out and lse and computes the joint gradient of the sequence. A pass over the rows adds the prefix's share to dq and
sums the prefix's gradients.

Gradients of lse, sinks, biases and the gate are those of the ``cuda`` or ``triton`` backend, since torch's ops have
none. The prefix's gradients are bitwise repeatable. dq, dk and dv are as repeatable as torch's op: on CUDA, under
``torch.use_deterministic_algorithms(True)``.
"""

from __future__ import annotations

from torch import Tensor

from ..arguments import AttentionArgs, AttentionGradients, Call, allocate_gradients
from . import torch_attention
from .base import JoiningKernels, MergeKernels, Refusal
from .composite import CompositeBackend, CompositePlan, needs_exact_softmax, with_sequence
from .cost.model import Pass, Sizes
from .dense_mask import sequence_mask
from .kernel_table import kernel_named
from .long_prefix import LongPrefixKernels, with_long_prefixes
from .torch_attention import AttentionKernel, KernelInputs, attention, attention_backward

#: Features of the prefix alone: the prefix kernels have them, so torch's kernel need not.
_PREFIX_FEATURES = frozenset({
    "bank", "prefix_lens", "gathered prefixes", "prefix_bias", "gate", "sinks", "prefix outside window",
})  # fmt: skip


class MergePlan(CompositePlan):
    """Runs torch's kernel on the sequence and merges the prefix into its result."""

    backend = "merge"

    def prefix_attention(self, args: AttentionArgs) -> tuple[Tensor, Tensor]:
        if _is_empty(args):
            return self.prefix_kernels.merge_prefix(args, None, None)
        _, (out, lse) = self.on_kernel(args, attention)
        return self.prefix_kernels.merge_prefix(args, out, lse)

    def prefix_attention_backward(
        self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, needs: list[bool]
    ) -> AttentionGradients:
        kernels = self.prefix_kernels
        if needs_exact_softmax(dlse, args, needs):
            return kernels.attention.prefix_attention_backward(dout, dlse, out, lse, args, needs)
        if _is_empty(args) or not any(needs[:3]):
            gradients = allocate_gradients(args, needs)
            gradients.dk.zero_()
            gradients.dv.zero_()
            kernels.merge_prefix_backward(dout, out, lse, args, None, gradients)
            return gradients
        _, sequence = self.on_kernel(args, lambda kernel, inputs: attention_backward(kernel, dout, out, lse, inputs))
        gradients = with_sequence(allocate_gradients(args, [False, False, False, *needs[3:]]), sequence, needs)
        kernels.merge_prefix_backward(dout, out, lse, args, gradients.dq, gradients)
        return gradients

    def attention_inputs(self, kernel: AttentionKernel, args: AttentionArgs) -> KernelInputs:
        """The attention over the sequence's keys, with a dense mask if the kernel needs one."""
        inputs = KernelInputs(
            args.q, args.k, args.v, args.scale, args.causal, args.window, args.cu_seqlens, max_seqlen=args.max_seqlen,
            softcap=args.softcap,
        )  # fmt: skip
        if args.key_mask is None and args.bias is None and not kernel.needs_mask(inputs):
            return inputs
        mask, empty = sequence_mask(args)
        return inputs._replace(causal=False, window=None, cu_seqlens=None, mask=mask, empty=empty)


class MergeBackend(CompositeBackend):
    """Torch's attention kernel on the sequence, the prefix merged into its result."""

    name = "merge"
    plan_type = MergePlan

    def beside(self, call: Call) -> dict[str, MergeKernels | Refusal]:
        return with_long_prefixes(call, super().beside(call))

    def beside_anywhere(self, call: Call) -> dict[str, MergeKernels]:
        anywhere = [kernel.on_any_machine() for kernel in torch_attention.KERNELS]
        found = with_long_prefixes(call, {**super().beside_anywhere(call)}, anywhere)
        return {name: kernels for name, kernels in found.items() if isinstance(kernels, MergeKernels)}

    def beside_named(self, name: str) -> MergeKernels:
        kernel, plus, beside = name.rpartition("+")
        kernels = super().beside_named(beside)
        if not plus:
            return kernels
        if not isinstance(kernels, JoiningKernels):
            raise ValueError(f"plan: expected prefix kernels that merge two results behind '+', got {beside!r}")
        return LongPrefixKernels(kernel_named(kernel), kernels)

    def kernel_features(self, features: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(name for name in features if name not in _PREFIX_FEATURES)

    def num_keys(self, call: Call) -> int:
        return call.kv_shape[2]

    def passes(
        self, call: Call, sizes: Sizes, prefix: MergeKernels, forward: list[Pass], backward: list[Pass]
    ) -> tuple[list[Pass], list[Pass]]:
        merge, merge_backward = prefix.merge_costs(call)
        return [*forward, merge], [*backward, merge_backward]


def _is_empty(args: AttentionArgs) -> bool:
    """Whether there are no rows or no keys; some ops divide by their number."""
    return args.q.numel() == 0 or args.k.numel() == 0
