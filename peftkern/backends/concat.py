# SPDX-License-Identifier: Apache-2.0
"""A kernel writes [prefix | keys] and [prefix | values] into the buffers that torch's attention kernel reads.

Torch's kernel sees P + T keys, aligned bottom-right; the prefix needs no special handling. Its dk and dv are split
again, and the prefix's gradients are summed over the batch in fp32 in a fixed order; each sample's term has been
rounded to the kernel's dtype. The buffers are rebuilt in the backward instead of being kept. Sinks are merged
afterwards. Gradients of lse, sinks and biases are computed as in ``merge``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import AttentionArgs, AttentionGradients, Call, allocate_gradients
from .composite import CompositeBackend, CompositePlan, as_bshd, needs_exact_softmax, with_sequence
from .cost.model import Pass, Sizes
from .dense_mask import additive_mask, visibility
from .torch_attention import KernelInputs, attention, attention_backward

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
        assert self.kernel is not None
        inputs = self._joined(args)
        out, lse = attention(self.kernel, inputs)
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
        assert self.kernel is not None
        dq, dk, dv = attention_backward(self.kernel, dout, out, lse, self._joined(args))
        gradients = allocate_gradients(args, [False, False, False, *needs[3:]])
        for djoined, total in ((dk, gradients.dprefix_k), (dv, gradients.dprefix_v)):
            if total.numel():
                self.prefix_kernels.sum_prefix_gradient(args, djoined, total)
        prefix_len = args.prefix_k.shape[-2]
        return with_sequence(gradients, (dq, dk[:, :, prefix_len:], dv[:, :, prefix_len:]), needs)

    def _joined(self, args: AttentionArgs) -> KernelInputs:
        """The attention over [prefix | sequence], with a dense mask if the kernel needs one."""
        joined_k, joined_v = self.prefix_kernels.concat_prefix(args)
        inputs = KernelInputs(
            args.q, joined_k, joined_v, args.scale, args.causal, args.window, None, mask=None, empty=None
        )
        masked = (args.cu_seqlens, args.prefix_ids, args.key_mask, args.bias, args.prefix_bias)
        window_skips_prefix = args.window is not None and not args.prefix_in_window
        assert self.kernel is not None
        if all(x is None for x in masked) and not window_skips_prefix and not self.kernel.needs_mask(inputs):
            return inputs
        visible = visibility(args)
        mask, empty = additive_mask(
            _side_by_side(visible.prefix, visible.sequence), _bias(args), args.q, joined_k.shape[2]
        )
        return inputs._replace(causal=False, window=None, mask=mask, empty=empty)


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
        self, call: Call, sizes: Sizes, forward: list[Pass], backward: list[Pass]
    ) -> tuple[list[Pass], list[Pass]]:
        x = sizes
        concat = Pass("triton", 1, 0.0, 2 * x.kv + x.prefix_each + x.prefix_once)
        sinks = [Pass("triton", 1, 0.0, 2 * x.q + 2 * x.lse)] if "sinks" in call.features else []
        split = Pass("triton", 4, 0.0, 2 * x.kv + x.prefix_each + 2 * x.prefix_once)  # dk, dv; the prefix's sums
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


def _bias(args: AttentionArgs) -> Tensor | None:
    """The biases of prefix and sequence, broadcastable to [B, Hq, S, P + T]."""
    if args.bias is None and args.prefix_bias is None:
        return None
    kv_len, prefix_len = args.k.shape[2], args.prefix_k.shape[-2]
    seq = args.q.new_zeros(1, 1, 1, kv_len) if args.bias is None else args.bias.expand(-1, -1, -1, kv_len)
    if args.prefix_bias is None:
        prefix = args.q.new_zeros(1, 1, 1, prefix_len)
    else:
        prefix = args.prefix_bias.expand(-1, prefix_len)[None, :, None]
    return _side_by_side(prefix, seq)


def _side_by_side(prefix: Tensor, seq: Tensor) -> Tensor:
    """[..., P + T] from two tensors that are broadcastable to each other except along the keys."""
    shape = torch.broadcast_shapes(prefix.shape[:-1], seq.shape[:-1])
    return torch.cat([x.expand(*shape, x.shape[-1]) for x in (prefix, seq)], -1)
