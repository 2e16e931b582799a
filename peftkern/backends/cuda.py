# SPDX-License-Identifier: Apache-2.0
"""Kernels in CUDA C++ (``csrc/cuda``), built ahead of time: no compiler and no warm-up on the user's machine.

A whole attention in fp16 and bf16, for those without another library's kernel; and the parts that stand beside one:
:func:`merge_prefix`, :func:`merge_prefix_backward`, :func:`lay_slot` and :func:`sum_slot`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import native
from ..arguments import AttentionArgs, AttentionGradients, Call, allocate_gradients, allocate_outputs

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
_REFUSED = ("bias", "dropout")


def why_not(call: Call) -> list[str]:
    return limits(call) + _lacks(call.device)


def limits(call: Call) -> list[str]:
    """What no machine can run here."""
    reasons = []
    if call.dtype not in _DTYPES:
        reasons.append(
            f"has no {str(call.dtype).removeprefix('torch.')} kernels: use fp16 or bf16, or backend='triton'"
        )
    if call.op == "soft_prompt_embedding" and call.kv_shape[-1] % 8:
        reasons.append(f"width {call.kv_shape[-1]} is no multiple of 8: use backend='triton'")
    if call.op == "prefix_attention":
        head_dim = call.q_shape[-1]
        if head_dim % 8 or not 0 < head_dim <= _MAX_HEAD_DIM:
            reasons.append(f"head dim {head_dim} is no multiple of 8 up to {_MAX_HEAD_DIM}: use backend='triton'")
        refused = [name for name in _REFUSED if name in call.features]
        if refused:
            reasons.append(f"has no {', '.join(refused)}: use backend='triton'")
    return reasons


def _lacks(device: torch.device) -> list[str]:
    """What this machine and ``device`` lack."""
    if device.type != native.cuda.DEVICE_TYPE:
        return [f"runs on {native.cuda.DEVICE_TYPE} tensors, not on {device.type}"]
    if native.cuda.MISSING:
        return [native.cuda.MISSING]
    if device.type != "cuda":
        return []
    if torch.version.hip is not None:
        return ["needs an NVIDIA GPU: use backend='triton'"]
    if not torch.cuda.is_available():
        return ["torch sees no GPU"]
    reason = native.cuda.unsupported(*torch.cuda.get_device_capability(device))
    return [reason] if reason else []


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy, with every row on 16 bytes."""
    if x.data_ptr() % 16 == 0 and all(
        n == 1 or s % 8 == 0 for n, s in zip(x.shape[:-1], x.stride()[:-1], strict=True)
    ):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _prepared(args: AttentionArgs) -> AttentionArgs:
    """``args`` as the kernels want them: rows on 16 bytes, the prefix in q's dtype."""
    return args._replace(
        q=_aligned(args.q), k=_aligned(args.k), v=_aligned(args.v),
        prefix_k=_aligned(args.prefix_k.to(args.q.dtype)), prefix_v=_aligned(args.prefix_v.to(args.q.dtype)),
    )  # fmt: skip


def prefix_attention(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    out, lse = allocate_outputs(args)
    prepared = _prepared(args)
    few_rows = args.q.shape[2] * args.q.shape[1] // args.k.shape[1] <= _FEW_ROWS and args.cu_seqlens is None
    split = few_rows and args.k.shape[2] + args.prefix_k.shape[-2] >= _SPLIT_KEYS
    if args.gate is not None or (few_rows and not split and _shares_prefix(args)):
        native.cuda.prefix_attention(_sequence(prepared)._replace(sinks=None), out, lse, split)
        native.cuda.merge_prefix(prepared, out, lse, out, lse)
    else:
        native.cuda.prefix_attention(prepared, out, lse, split)
    return out, lse


def _sequence(args: AttentionArgs) -> AttentionArgs:
    """The attention over the sequence and sinks alone."""
    none = args.prefix_k.new_empty(args.k.shape[1], 0, args.q.shape[3])
    return args._replace(prefix_k=none, prefix_v=none, prefix_ids=None, prefix_lens=None, prefix_bias=None, gate=None)


def _shares_prefix(args: AttentionArgs) -> bool:
    """Whether samples share a prefix: if they have few rows, these fill tiles together, once it is read."""
    return args.prefix_ids is None and args.q.shape[0] > 1 and args.prefix_k.shape[-2] > 0


_FEW_ROWS = 32  # of a key head: half a tile
_SPLIT_KEYS = 1024  # from where on two more launches pay


def prefix_attention_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, needs: list[bool]
) -> AttentionGradients:
    gradients = allocate_gradients(args, needs)
    if args.q.numel() == 0:
        for x in gradients:
            x.zero_()
        return gradients
    dout, prepared = _aligned(dout), _prepared(args)
    delta = lse.new_empty(lse.shape)
    if args.gate is not None:
        _gated_backward(dout, dlse, lse, prepared, gradients, delta)
        return gradients
    exact = bool(gradients.dsinks.numel() or gradients.dprefix_bias.numel())
    if exact:
        native.cuda.softmax_sums(dout, dlse, lse, prepared, delta)
    native.cuda.prefix_attention_backward(dout, dlse, _aligned(out), lse, prepared, gradients, delta, exact)
    _sink_gradient(args, lse, delta, gradients)
    return gradients


def _gated_backward(
    dout: Tensor, dlse: Tensor | None, lse: Tensor, args: AttentionArgs, gradients: AttentionGradients, delta: Tensor
) -> None:
    """Those of two attentions, whose results are computed again: out is only their sum."""
    out, part_lse = allocate_outputs(args)
    seq = _sequence(args)
    exact = bool(gradients.dsinks.numel())
    if exact:
        native.cuda.softmax_sums(dout, dlse, lse, seq, delta)
    else:
        native.cuda.prefix_attention(seq, out, part_lse)
    native.cuda.prefix_attention_backward(dout, dlse, out, lse, seq, _of_sequence(gradients), delta, exact)
    _sink_gradient(args, lse, delta, gradients)

    prefix = args._replace(sinks=None, gate=None)
    native.cuda.merge_prefix(prefix, None, None, out, part_lse)
    native.cuda.softmax_sums(dout, None, part_lse, prefix, delta, sequence=False)
    gated = prefix._replace(gate=args.gate)
    native.cuda.merge_prefix_backward(dout, None, out, part_lse, gated, gradients, delta)
    if gradients.dgate.numel():
        assert args.gate is not None
        torch.mul(delta.sum((0, 2)), 1 - args.gate.tanh().square(), out=gradients.dgate)


def _of_sequence(gradients: AttentionGradients) -> AttentionGradients:
    """Those of q, k and v."""
    none = gradients.dq.new_empty(0)
    return AttentionGradients(*gradients[:3], *[none] * 6)


def _sink_gradient(args: AttentionArgs, lse: Tensor, delta: Tensor, gradients: AttentionGradients) -> None:
    """A sink's weight is exp(sink - lse), and its value 0."""
    if gradients.dsinks.numel():
        assert args.sinks is not None
        torch.sum(torch.exp(args.sinks[:, None] - lse) * -delta, (0, 2), out=gradients.dsinks)


def soft_prompt_embedding(input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None) -> Tensor:
    out = weight.new_empty(input_ids.shape[0], prompt.shape[-2] + input_ids.shape[1], weight.shape[1])
    native.cuda.soft_prompt_embedding(input_ids, _aligned(weight), _aligned(prompt), prompt_ids, out)
    return out


def soft_prompt_embedding_backward(
    dout: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    prompt_ids: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    dweight = weight.new_zeros(weight.shape if needs[0] else 0, dtype=torch.float32)
    dprompt = prompt.new_empty(prompt.shape if needs[1] else 0, dtype=torch.float32)
    if needs[0]:
        rows = dout[:, prompt.shape[-2] :].float().flatten(0, 1)
        dweight.index_put_((input_ids.flatten(),), rows, accumulate=True)
    if dprompt.numel():
        native.cuda.soft_prompt_embedding_backward(_aligned(dout), input_ids, weight, prompt, prompt_ids, dprompt)
    return dweight, dprompt


def merge_prefix(args: AttentionArgs, part_out: Tensor | None, part_lse: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse) of prefix, sinks and the sequence's ``part_out`` [B, Hq, S, D] and ``part_lse`` [B, Hq, S].

    The parts have any strides (unit along D) and are merged in place where they lie as the op's outputs do.
    None: there is no sequence.
    """
    out, lse = allocate_outputs(args)
    if part_out is not None:
        part_out = _aligned(part_out)
        out = part_out if part_out.stride() == out.stride() else out
    if part_lse is not None and part_lse.stride() == lse.stride():
        lse = part_lse
    native.cuda.merge_prefix(_prepared(args), part_out, part_lse, out, lse)
    return out, lse


def merge_prefix_backward(
    dout: Tensor, out: Tensor, lse: Tensor, args: AttentionArgs, part_dq: Tensor | None, gradients: AttentionGradients
) -> None:
    """Fill in dq = ``part_dq`` + the prefix's part, dprefix_k and dprefix_v; what is empty nobody needs."""
    dq = gradients.dq
    if part_dq is None:
        dq.zero_()
    elif dq.numel() and part_dq is not dq:
        dq.copy_(part_dq)
    native.cuda.merge_prefix_backward(_aligned(dout), None, _aligned(out), lse, _prepared(args), gradients)


def lay_slot(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """[prefix | k] and [prefix | v], [B, Hkv, P + T, D] with the memory order [B, P + T, Hkv, D]."""
    batch, kv_heads, kv_len, head_dim = args.k.shape
    length = args.prefix_k.shape[-2] + kv_len
    slot_k, slot_v = (args.k.new_empty(batch, length, kv_heads, head_dim).transpose(1, 2) for _ in "kv")
    k, v, prefix_k, prefix_v = (_aligned(x) for x in args[1:5])
    native.cuda.concat(args._replace(k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v), slot_k, slot_v)
    return slot_k, slot_v


def sum_slot(args: AttentionArgs, dslot: Tensor, total: Tensor) -> None:
    """total, shaped like a prefix, = the sum over the batch of dslot [B, Hkv, P + T, D] before the sequence."""
    if total.numel():
        native.cuda.concat_backward(_aligned(dslot), args.prefix_ids, total)
