# SPDX-License-Identifier: Apache-2.0
"""[prefix | keys] laid out once by a kernel of ours and read by another library's attention kernel.

The vendor's kernel sees P + T keys, aligned bottom-right, so that the prefix is nothing special to it. Its dk and dv
are taken apart again, the prefix's gradients summed over the batch in fp32 in a fixed order; what is summed has been
rounded to the vendor's dtype per sample. The slot is laid again in backward and not kept. Sinks join afterwards,
gradients of lse, sinks and biases are computed as in ``merge``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import reference
from ..arguments import AttentionArgs, AttentionGradients, Call, allocate_gradients
from . import prefix_kernels, triton
from .merge import NO_VENDOR_HAS, chosen, laid_out, needs_exact_softmax, with_sequence
from .prefix_kernels import PrefixPart, soft_prompt_embedding, soft_prompt_embedding_backward
from .torch_attention import Problem, Vendor, additive_mask, attention, attention_backward, choose

__all__ = [
    "limits", "made_of", "prefix_attention", "prefix_attention_backward", "soft_prompt_embedding",
    "soft_prompt_embedding_backward", "why_not",
]  # fmt: skip

#: Features that ask for a mask here although a vendor's op may have an argument of that name.
_OF_THE_SLOT = {
    "cu_seqlens": "packed sequences behind one prefix",
    "bank": "samples without a prefix",
    "prefix_lens": "prefixes of different lengths",
    "prefix outside window": "prefix outside of the window",
}


def why_not(call: Call) -> list[str]:
    return limits(call) or prefix_kernels.choose(call)[1]


def made_of(call: Call) -> str:
    """The kernels that run a call, for messages."""
    return prefix_kernels.names(call, joined_features(call.features), call.kv_shape[2] + call.prefix_shape[-2])


def limits(call: Call) -> list[str]:
    """What one softmax over [prefix | keys], by the vendors' ops on ``call``'s device, cannot express."""
    reasons = triton.limits(call)
    if call.op == "prefix_attention":
        reasons += [
            f"no kernel of torch's has {what}: use backend='triton'"
            for feature, what in NO_VENDOR_HAS.items()
            if feature in call.features
        ]
        if "gate" in call.features:
            reasons.append("a gated prefix has a softmax of its own: use backend='merge' or 'triton'")
        if {"cu_seqlens", "bank"} <= set(call.features):
            reasons.append("a slot holds one prefix per batch entry, not per packed sequence: use backend='merge'")
        if not reasons:
            reasons += choose(call, joined_features(call.features), call.kv_shape[2] + call.prefix_shape[-2])[1]
    return reasons


def joined_features(features: tuple[str, ...]) -> tuple[str, ...]:
    """What the vendor's op must be able to do."""
    return tuple(_OF_THE_SLOT.get(name, name) for name in features if name != "sinks")


def prefix_attention(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    part = prefix_kernels.of_attention(args)
    if _nothing_to_see(args):
        return part.merge_prefix(_without_prefix(args), None, None)
    vendor, problem = _joined(args, part)
    out, lse = attention(vendor, problem)
    if args.sinks is not None or problem.empty is not None or vendor.lse_unit != 1.0:
        return part.merge_prefix(_without_prefix(args), out, lse)
    return laid_out(out, args.q.dtype), lse.contiguous()


def prefix_attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, needs: list[bool]
) -> AttentionGradients:
    part = prefix_kernels.of_attention(args, backward=True)
    if needs_exact_softmax(dlse, args, needs):
        return part.backend.prefix_attention_backward(dout, dlse, out, lse, args, needs)
    if _nothing_to_see(args):
        gradients = allocate_gradients(args, needs)
        for x in gradients:
            x.zero_()
        return gradients
    vendor, problem = _joined(args, part)
    dq, dk, dv = attention_backward(vendor, dout, out, lse, problem)
    gradients = allocate_gradients(args, [False, False, False, *needs[3:]])
    for dslot, total in ((dk, gradients.dprefix_k), (dv, gradients.dprefix_v)):
        if total.numel():
            part.sum_slot(args, dslot, total)
    prefix_len = args.prefix_k.shape[-2]
    parts = (dq, dk[:, :, prefix_len:], dv[:, :, prefix_len:])
    return with_sequence(gradients, parts, needs)


def _nothing_to_see(args: AttentionArgs) -> bool:
    """Whether there are no rows or no keys: some ops divide by their number."""
    return args.q.numel() == 0 or args.k.shape[2] + args.prefix_k.shape[-2] == 0


def _without_prefix(args: AttentionArgs) -> AttentionArgs:
    """The arguments of a merge that has only the sink to add."""
    none = args.q.new_empty(args.k.shape[1], 0, args.q.shape[3])
    return args._replace(
        prefix_k=none, prefix_v=none, prefix_ids=None, prefix_lens=None, prefix_bias=None, window=None
    )


def _joined(args: AttentionArgs, part: PrefixPart) -> tuple[Vendor, Problem]:
    """Attention over the slot, and the kernel for it."""
    slot_k, slot_v = part.lay_slot(args)
    vendor = chosen(args, joined_features, slot_k.shape[2])
    problem = Problem(args.q, slot_k, slot_v, args.scale, args.causal, args.window, None, mask=None, empty=None)
    masked = (args.cu_seqlens, args.prefix_ids, args.key_mask, args.bias, args.prefix_bias)
    window_skips_prefix = args.window is not None and not args.prefix_in_window
    if all(x is None for x in masked) and not window_skips_prefix and not vendor.needs_mask(problem):
        return vendor, problem
    visible, bias = _visible(args), _bias(args)
    mask, empty = additive_mask(visible, bias, args.q, problem.k.shape[2])
    return vendor, problem._replace(causal=False, window=None, mask=mask, empty=empty)


def _visible(args: AttentionArgs) -> Tensor:
    """Bool, broadcastable to [B, Hq, S, P + T]."""
    batch, _, q_len, _ = args.q.shape
    bank = args.prefix_k.shape[0] if args.prefix_k.dim() == 4 else 1
    seq, prefix = reference.visibility(
        (batch, q_len, args.k.shape[2], bank, args.prefix_k.shape[-2]), args.q.device, args.causal, args.key_mask,
        args.cu_seqlens, args.prefix_ids, args.prefix_lens, args.window, args.prefix_in_window,
    )  # fmt: skip
    return _beside(prefix.any(3), seq)  # of the bank, the one prefix that is laid


def _bias(args: AttentionArgs) -> Tensor | None:
    """Broadcastable to [B, Hq, S, P + T]."""
    if args.bias is None and args.prefix_bias is None:
        return None
    kv_len, prefix_len = args.k.shape[2], args.prefix_k.shape[-2]
    seq = args.q.new_zeros(1, 1, 1, kv_len) if args.bias is None else args.bias.expand(-1, -1, -1, kv_len)
    if args.prefix_bias is None:
        prefix = args.q.new_zeros(1, 1, 1, prefix_len)
    else:
        prefix = args.prefix_bias.expand(-1, prefix_len)[None, :, None]
    return _beside(prefix, seq)


def _beside(prefix: Tensor, seq: Tensor) -> Tensor:
    """[... , P + T] of two tensors that broadcast against each other except along the keys."""
    shape = torch.broadcast_shapes(prefix.shape[:-1], seq.shape[:-1])
    return torch.cat([x.expand(*shape, x.shape[-1]) for x in (prefix, seq)], -1)
