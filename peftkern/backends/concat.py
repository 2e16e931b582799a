# SPDX-License-Identifier: Apache-2.0
"""A kernel writes [prefix | keys] and [prefix | values] into the buffers that torch's attention kernel reads.

Torch's kernel sees P + T keys, aligned bottom-right; the prefix needs no special handling. Its dk and dv are split
again, and the prefix's gradients are summed over the batch in fp32 in a fixed order; each sample's term has been
rounded to the kernel's dtype. The buffers are rebuilt in the backward instead of being kept. Sinks are merged
afterwards. Gradients of lse, sinks and biases are computed as in ``merge``.
"""

from __future__ import annotations

from torch import Tensor

from ..arguments import AttentionArgs, AttentionGradients, Call, allocate_gradients
from .base import PrefixKernels
from .composite import CompositeBackend, CompositePlan, as_bshd, needs_exact_softmax, with_sequence
from .cost.model import Pass, Sizes
from .dense_mask import joined_mask
from .torch_attention import AttentionKernel, KernelInputs, attention, attention_backward

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

    def prefix_attention(self, args: AttentionArgs) -> tuple[Tensor, Tensor]:
        if _is_empty(args):
            return self.prefix_kernels.merge_prefix(_only_sinks(args), None, None)
        joined = self.prefix_kernels.concat_prefix(args)
        out, lse, has_empty_rows = self.on_kernel(args, lambda kernel: _attention(kernel, args, *joined))
        if args.sinks is not None or has_empty_rows:
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
        joined = self.prefix_kernels.concat_prefix(args)
        dq, dk, dv = self.on_kernel(
            args, lambda kernel: attention_backward(kernel, dout, out, lse, _joined(kernel, args, *joined))
        )
        gradients = allocate_gradients(args, [False, False, False, *needs[3:]])
        for djoined, total in ((dk, gradients.dprefix_k), (dv, gradients.dprefix_v)):
            if total.numel():
                self.prefix_kernels.sum_prefix_gradient(args, djoined, total)
        prefix_len = args.prefix_k.shape[-2]
        return with_sequence(gradients, (dq, dk[:, :, prefix_len:], dv[:, :, prefix_len:]), needs)


def _attention(kernel: AttentionKernel, args: AttentionArgs, *joined: Tensor) -> tuple[Tensor, Tensor, bool]:
    """(out, lse, whether a row may see no key, so that its out is undefined)."""
    inputs = _joined(kernel, args, *joined)
    return *attention(kernel, inputs), inputs.empty is not None


def _joined(kernel: AttentionKernel, args: AttentionArgs, joined_k: Tensor, joined_v: Tensor) -> KernelInputs:
    """The attention over [prefix | sequence], with a dense mask if the kernel needs one."""
    inputs = KernelInputs(
        args.q, joined_k, joined_v, args.scale, args.causal, args.window, None, softcap=args.softcap
    )
    window_skips_prefix = args.window is not None and not args.prefix_in_window
    if not _is_masked(args) and not window_skips_prefix and not kernel.needs_mask(inputs):
        return inputs
    mask, empty = joined_mask(args)
    return inputs._replace(causal=False, window=None, mask=mask, empty=empty)


def _is_masked(args: AttentionArgs) -> bool:
    """Whether an argument needs a mask, whatever the kernel."""
    return any(x is not None for x in (args.cu_seqlens, args.prefix_ids, args.key_mask, args.bias, args.prefix_bias))


class ConcatBackend(CompositeBackend):
    """Torch's attention kernel on [prefix | sequence]."""

    name = "concat"
    plan_type = ConcatPlan

    def unsupported(self, call: Call) -> list[str]:
        reasons = super().unsupported(call)
        if "gate" in call.features:
            reasons.append("a gated prefix has a softmax of its own: use backend='merge' or 'triton'")
        if {"cu_seqlens", "bank"} <= set(call.features):
            reasons.append("supports one prefix per batch entry, not per packed sequence: use backend='merge'")
        return reasons

    def kernel_features(self, features: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(_MASKED_FEATURES.get(name, name) for name in features if name != "sinks")

    def num_keys(self, call: Call) -> int:
        return call.kv_shape[2] + call.prefix_shape[-2]

    def passes(
        self, call: Call, sizes: Sizes, prefix: PrefixKernels, forward: list[Pass], backward: list[Pass]
    ) -> tuple[list[Pass], list[Pass]]:
        x, engine = sizes, prefix.name
        concat = Pass(engine, 1, 0.0, 2 * x.kv + x.prefix_each + x.prefix_once)
        sinks = [Pass(engine, 1, 0.0, 2 * x.q + 2 * x.lse)] if "sinks" in call.features else []
        split = Pass(engine, 4, 0.0, 2 * x.kv + x.prefix_each + 2 * x.prefix_once)  # dk, dv; the prefix's sums
        return [*forward, concat, *sinks], [concat, *backward, split]


def _is_empty(args: AttentionArgs) -> bool:
    """Whether there are no rows or no keys; some ops divide by their number."""
    return args.q.numel() == 0 or args.k.shape[2] + args.prefix_k.shape[-2] == 0


def _only_sinks(args: AttentionArgs) -> AttentionArgs:
    """The arguments of a merge that adds the sinks and no prefix."""
    none = args.q.new_empty(args.k.shape[1], 0, args.q.shape[3])
    return args._replace(
        prefix_k=none, prefix_v=none, prefix_ids=None, prefix_lens=None, prefix_bias=None, window=None
    )
