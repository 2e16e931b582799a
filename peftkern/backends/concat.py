# SPDX-License-Identifier: Apache-2.0
"""A kernel writes [prefix | keys] and [prefix | values] into the buffers that torch's attention kernel reads.

Torch's kernel sees P + T keys, aligned bottom-right; the prefix needs no special handling. If torch's kernel takes
the offsets of packed sequences, each has its prefix laid before it, [P | K_0 | P | K_1 | ...]. No mask is needed
then, and each sequence may have another prefix, or none.

The kernel's dk and dv are split again, and the prefix's gradients are summed over the batch in fp32 in a fixed order;
each sample's term has been rounded to the kernel's dtype. The buffers are rebuilt in the backward instead of being
kept. Sinks are merged afterwards. Gradients of lse, sinks and biases are computed as in ``merge``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ..arguments import AttentionArgs, AttentionGradients, Call, allocate_gradients
from .base import JoiningKernels, MergeKernels, PrefixKernels, Refusal
from .composite import CompositeBackend, CompositePlan, as_bshd, needs_exact_softmax, with_sequence
from .cost.model import Pass, Sizes
from .dense_mask import joined_mask
from .derived import derived
from .torch_attention import AttentionKernel, KernelInputs, attention, attention_backward

#: Features with which the keys of packed sequences cannot be laid out without a mask.
_NOT_LAID_OUT = frozenset({"key_mask", "bias", "prefix_bias", "prefix outside window"})
#: Features that torch's kernel does not see where the keys are laid out without a mask.
_LAID_OUT = frozenset({"sinks", "bank", "prefix_lens", "gathered prefixes"})
#: Features that need a mask here even if torch's op has an argument of that name, as messages call them.
_MASKED_FEATURES = {
    "cu_seqlens": "packed sequences behind one prefix",
    "bank": "samples without a prefix",
    "prefix_lens": "prefixes of different lengths",
    "prefix outside window": "prefix outside of the window",
}


class ConcatPlan(CompositePlan):
    """Runs torch's kernel on the concatenation of prefix and sequence."""

    backend = "concat"
    prefix_kernels: PrefixKernels

    def prefix_attention(self, args: AttentionArgs) -> tuple[Tensor, Tensor]:
        if _is_empty(args):
            return self.prefix_kernels.merge_prefix(_only_sinks(args), None, None)
        inputs, (out, lse) = self.on_kernel(args, attention)
        if args.sinks is not None or inputs.empty is not None:
            return self.prefix_kernels.merge_prefix(_only_sinks(args), out, lse)
        return as_bshd(out, args.q), lse.contiguous()

    def prefix_attention_backward(
        self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, needs: list[bool]
    ) -> AttentionGradients:
        if needs_exact_softmax(dlse, args, needs):
            return self.prefix_kernels.attention.prefix_attention_backward(dout, dlse, out, lse, args, needs)
        if _is_empty(args):
            gradients = allocate_gradients(args, needs)
            for x in gradients:
                x.zero_()
            return gradients
        inputs, (dq, dk, dv) = self.on_kernel(
            args, lambda kernel, inputs: attention_backward(kernel, dout, out, lse, inputs)
        )
        kernels, cu_keys = self.prefix_kernels, inputs.cu_keys
        if isinstance(kernels, JoiningKernels):
            gradients = allocate_gradients(args, [False, *needs[1:]])
            for djoined, total in ((dk, gradients.dprefix_k), (dv, gradients.dprefix_v)):
                if total.numel():
                    kernels.sum_prefix_gradient(args, djoined, total, cu_keys)
            kernels.split_gradient(args, dk, dv, cu_keys, gradients.dk, gradients.dv)
            return with_sequence(gradients, (dq, gradients.dk, gradients.dv), needs)
        gradients = allocate_gradients(args, [False, False, False, *needs[3:]])
        for djoined, total in ((dk, gradients.dprefix_k), (dv, gradients.dprefix_v)):
            if total.numel():
                kernels.sum_prefix_gradient(args, djoined, total)
        prefix_len = args.prefix_k.shape[-2]
        return with_sequence(gradients, (dq, dk[:, :, prefix_len:], dv[:, :, prefix_len:]), needs)

    def attention_inputs(self, kernel: AttentionKernel, args: AttentionArgs) -> KernelInputs:
        """The attention over [prefix | sequence], with a dense mask if the kernel needs one."""
        kernels, prefix_len = self.prefix_kernels, args.prefix_k.shape[-2]
        window_skips_prefix = args.window is not None and not args.prefix_in_window
        masked = window_skips_prefix or any(x is not None for x in (args.key_mask, args.bias, args.prefix_bias))
        lays_out = args.cu_seqlens is not None and "cu_seqlens" in kernel.native and not masked
        if lays_out and isinstance(kernels, JoiningKernels):
            cu_keys = _cu_keys(args)
            joined_k, joined_v = kernels.concat_prefix(args, cu_keys)
            longest = args.q.shape[2] if args.max_seqlen is None else args.max_seqlen
            return KernelInputs(
                args.q, joined_k, joined_v, args.scale, args.causal, args.window, args.cu_seqlens,
                max_seqlen=longest, cu_keys=cu_keys, max_keys=longest + prefix_len, softcap=args.softcap,
            )  # fmt: skip
        joined_k, joined_v = kernels.concat_prefix(args)
        inputs = KernelInputs(
            args.q, joined_k, joined_v, args.scale, args.causal, args.window, None, softcap=args.softcap
        )
        masked = masked or args.cu_seqlens is not None or args.prefix_ids is not None
        if not masked and not kernel.needs_mask(inputs):
            return inputs
        mask, empty = joined_mask(args)
        return inputs._replace(causal=False, window=None, mask=mask, empty=empty)


def _cu_keys(args: AttentionArgs) -> Tensor:
    """int32 [n + 1]: the offsets of the packed sequences' keys, with each one's prefix before them."""
    cu_seqlens, prefix_len, ids = args.cu_seqlens, args.prefix_k.shape[-2], args.prefix_ids
    assert cu_seqlens is not None

    def offsets() -> Tensor:
        num_sequences = cu_seqlens.shape[0] - 1
        if ids is None:
            added = torch.arange(num_sequences + 1, device=cu_seqlens.device) * prefix_len
        else:
            lengths: Tensor | int = prefix_len
            if args.prefix_lens is not None:
                lengths = args.prefix_lens[ids.clamp(min=0)]
            added = functional.pad(torch.where(ids >= 0, lengths, 0).cumsum(0), (1, 0))
        return (cu_seqlens + added).to(torch.int32)

    return derived("offsets of joined keys", (cu_seqlens, ids, args.prefix_lens), (prefix_len,), offsets)


class ConcatBackend(CompositeBackend):
    """Torch's attention kernel on [prefix | sequence]."""

    name = "concat"
    plan_type = ConcatPlan

    def unsupported(self, call: Call) -> list[str]:
        reasons = super().unsupported(call)
        if "gate" in call.features:
            reasons.append("a gated prefix has a softmax of its own: use backend='merge' or 'triton'")
        return reasons

    def attention_kernels(
        self, call: Call, kernels: list[AttentionKernel] | None = None
    ) -> dict[str, AttentionKernel | Refusal]:
        found = super().attention_kernels(call, kernels)
        if not {"cu_seqlens", "bank"} <= set(call.features):
            return found
        # a mask of [S, P + T] has the keys of one prefix only
        reason = "no prefixes of their own for packed sequences"
        packs = _NOT_LAID_OUT.isdisjoint(call.features)
        return {
            name: kernel
            if isinstance(kernel, Refusal) or (packs and "cu_seqlens" in kernel.native)
            else Refusal((f"{name}: {reason}",))
            for name, kernel in found.items()
        }

    def why_not_together(self, call: Call, kernel: AttentionKernel, prefix: MergeKernels) -> list[str]:
        if isinstance(prefix, JoiningKernels) or "cu_seqlens" not in kernel.native.intersection(call.features):
            return []
        return [f"{prefix.title}: no concatenation of packed sequences"]

    def kernel_features(self, features: tuple[str, ...]) -> tuple[str, ...]:
        if "cu_seqlens" in features and _NOT_LAID_OUT.isdisjoint(features):
            return tuple(name for name in features if name not in _LAID_OUT)
        own = ("sinks", "gathered prefixes")
        return tuple(_MASKED_FEATURES.get(name, name) for name in features if name not in own)

    def num_keys(self, call: Call) -> int:
        return call.kv_shape[2] + call.prefix_shape[-2]

    def passes(
        self, call: Call, sizes: Sizes, prefix: MergeKernels, forward: list[Pass], backward: list[Pass]
    ) -> tuple[list[Pass], list[Pass]]:
        x, engine = sizes, prefix.name
        concat = Pass(engine, 1, 0.0, 2 * x.kv + x.prefix_each + x.prefix_once)
        sinks = [Pass(engine, 1, 0.0, x.q + x.out + 2 * x.lse)] if "sinks" in call.features else []
        # dk and dv together or apart, and the sums of the prefix
        kernels = 3 if isinstance(prefix, JoiningKernels) else 4
        split = Pass(engine, kernels, 0.0, 2 * x.kv + x.prefix_each + 2 * x.prefix_once)
        return [*forward, concat, *sinks], [concat, *backward, split]


def _is_empty(args: AttentionArgs) -> bool:
    """Whether there are no rows or no keys; some ops divide by their number."""
    return args.q.numel() == 0 or args.k.shape[2] + args.prefix_k.shape[-2] == 0


def _only_sinks(args: AttentionArgs) -> AttentionArgs:
    """The arguments of a merge that adds the sinks and no prefix."""
    none_k, none_v = (args.q.new_empty(args.k.shape[1], 0, x.shape[3]) for x in (args.k, args.v))
    return args._replace(
        prefix_k=none_k, prefix_v=none_v, prefix_ids=None, prefix_lens=None, prefix_bias=None, window=None
    )
