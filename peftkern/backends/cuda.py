# SPDX-License-Identifier: Apache-2.0
"""CUDA C++ kernels (``csrc/cuda``), built ahead of time: no compiler and no warm-up on the user's machine.

A whole attention in fp16 and bf16, for machines without another library's kernel, and the prefix kernels that run
beside one.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .. import native
from ..arguments import AttentionArgs, AttentionGradients, Call, allocate_gradients, allocate_outputs
from .base import OnePlanBackend, Plan, PrefixKernels, Refusal, first_row_with_prefix
from .cost.model import Machine, Pass, attention_passes, embedding_passes, sizes_of

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
_UNSUPPORTED = ("bias", "dropout")
#: Rows of a key head (half a tile) up to which the prefix is merged separately, so that the samples' rows share
#: its tiles.
_FEW_ROWS = 32
#: The number of keys from which splitting them among programs pays for two extra launches.
_SPLIT_KEYS = 1024


class CudaPlan(Plan):
    """Calls the native CUDA library."""

    name = "cuda"

    def prefix_attention(self, args: AttentionArgs) -> tuple[Tensor, Tensor]:
        out, lse = allocate_outputs(args)
        aligned = _aligned_args(args)
        few_rows = args.q.shape[2] * args.q.shape[1] // args.k.shape[1] <= _FEW_ROWS and args.cu_seqlens is None
        split = few_rows and args.k.shape[2] + args.prefix_k.shape[-2] >= _SPLIT_KEYS
        if args.gate is not None or (few_rows and not split and _shares_prefix(args)):
            native.cuda.prefix_attention(_without_prefix(aligned)._replace(sinks=None), out, lse, split)
            native.cuda.merge_prefix(aligned, out, lse, out, lse)
        else:
            native.cuda.prefix_attention(aligned, out, lse, split)
        return out, lse

    def prefix_attention_backward(
        self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, needs: list[bool]
    ) -> AttentionGradients:
        gradients = allocate_gradients(args, needs)
        if args.q.numel() == 0:
            for x in gradients:
                x.zero_()
            return gradients
        dout, aligned = _aligned(dout), _aligned_args(args)
        delta = lse.new_empty(lse.shape)
        if args.gate is not None:
            _gated_backward(dout, dlse, lse, aligned, gradients, delta)
            return gradients
        exact = bool(gradients.dsinks.numel() or gradients.dprefix_bias.numel())
        if exact:
            native.cuda.softmax_sums(dout, dlse, lse, aligned, delta)
        native.cuda.prefix_attention_backward(dout, dlse, _aligned(out), lse, aligned, gradients, delta, exact)
        _sink_gradient(args, lse, delta, gradients)
        return gradients

    def soft_prompt_embedding(
        self, input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None
    ) -> Tensor:
        out = weight.new_empty(input_ids.shape[0], prompt.shape[-2] + input_ids.shape[1], weight.shape[1])
        native.cuda.soft_prompt_embedding(input_ids, _aligned(weight), _aligned(prompt), prompt_ids, out)
        return out

    def soft_prompt_embedding_backward(
        self,
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


class CudaBackend(OnePlanBackend):
    """The native CUDA library: fp16 and bf16, head dims that are multiples of 8 up to 256, no bias, no dropout."""

    name = "cuda"
    _plan = CudaPlan()

    def limits(self, call: Call) -> list[str]:
        reasons = []
        if call.dtype not in _DTYPES:
            reasons.append(
                f"has no {str(call.dtype).removeprefix('torch.')} kernels: use fp16 or bf16, or backend='triton'"
            )
        if call.op == "soft_prompt_embedding" and call.kv_shape[-1] % 8:
            reasons.append(f"width {call.kv_shape[-1]} is not a multiple of 8: use backend='triton'")
        if call.op == "prefix_attention":
            head_dim = call.q_shape[-1]
            if head_dim % 8 or not 0 < head_dim <= _MAX_HEAD_DIM:
                reasons.append(
                    f"head dim {head_dim} is not a multiple of 8 up to {_MAX_HEAD_DIM}: use backend='triton'"
                )
            if call.own_value_dim is not None:
                reasons.append(
                    f"values of head dim {call.own_value_dim} beside keys of another: use backend='triton'"
                )
            unsupported = [name for name in _UNSUPPORTED if name in call.features]
            if unsupported:
                reasons.append(f"does not support {', '.join(unsupported)}: use backend='triton'")
        return reasons

    def plan(self, call: Call) -> Plan | Refusal:
        missing, other_device = _missing(call.device)
        reasons = (*self.limits(call), *missing)
        return Refusal(reasons, other_device) if reasons else self._plan

    def restore(self, choices: tuple[str, ...]) -> Plan:
        return self._plan

    def cost(self, call: Call, machine: Machine) -> list[Pass] | None:
        if call.device.type == "cpu":
            return None
        if call.op == "soft_prompt_embedding":
            return embedding_passes(call, self.name)
        x = sizes_of(call)
        merged_separately = x.batch > 1 and x.queries * x.group <= _FEW_ROWS and x.prefix
        return attention_passes(
            call, self.name, 2 if merged_separately else 1, backward_kernels=6, backward_products=3.5
        )


class CudaPrefixKernels(PrefixKernels):
    """The prefix kernels of the native CUDA library."""

    name = "cuda"
    title = "CUDA C++"
    attention = CudaPlan()

    def merge_costs(self, call: Call) -> tuple[Pass, Pass]:
        """Forward: q and the parts are read, out and lse written, and the prefix read, once each.

        Backward: for each chunk of the prefix, a walk over all rows reads q, dout, out, dq and lse and writes dq.
        That moves 5 times the bytes of q up to 64 tokens, 10 times at 128 and 40 times at 512. What several blocks
        read, and the sums of the splits, are left to the L2 cache.
        """
        x = sizes_of(call)
        forward = Pass(self.name, 1, x.prefix_flops, 3 * x.q + 2 * x.lse + x.prefix_once)
        walks = -(-x.prefix // (64 if x.head_dim <= 128 else 32))
        moved = walks * (5 * x.q + x.lse) + x.prefix_once
        return forward, Pass(self.name, 2, 2.5 * x.prefix_flops, moved, True)

    def merge_prefix(
        self, args: AttentionArgs, part_out: Tensor | None, part_lse: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        out, lse = allocate_outputs(args)
        if part_out is not None:
            part_out = _aligned(part_out)
            out = part_out if part_out.stride() == out.stride() else out
        if part_lse is not None and part_lse.stride() == lse.stride():
            lse = part_lse
        if first_row_with_prefix(args) is None:
            args = args._replace(prefix_start=None)
        native.cuda.merge_prefix(_aligned_args(args), part_out, part_lse, out, lse)
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
        dq = gradients.dq
        if part_dq is None:
            dq.zero_()
        elif dq.numel() and part_dq is not dq:
            dq.copy_(part_dq)
        aligned = _aligned_args(args)
        native.cuda.merge_prefix_backward(_aligned(dout), None, _aligned(out), lse, aligned, gradients)

    def concat_prefix(self, args: AttentionArgs) -> tuple[Tensor, Tensor]:
        batch, kv_heads, kv_len, head_dim = args.k.shape
        length = args.prefix_k.shape[-2] + kv_len
        joined_k, joined_v = (args.k.new_empty(batch, length, kv_heads, head_dim).transpose(1, 2) for _ in "kv")
        k, v, prefix_k, prefix_v = (_aligned(x) for x in args[1:5])
        aligned = args._replace(k=k, v=v, prefix_k=prefix_k, prefix_v=prefix_v)
        native.cuda.concat(aligned, joined_k, joined_v)
        return joined_k, joined_v

    def sum_prefix_gradient(self, args: AttentionArgs, djoined: Tensor, total: Tensor) -> None:
        if total.numel():
            native.cuda.concat_backward(_aligned(djoined), args.prefix_ids, total)


def _missing(device: torch.device) -> tuple[list[str], bool]:
    """What this machine or ``device`` lacks, and whether it is the kind of device."""
    if device.type != native.cuda.DEVICE_TYPE:
        return [f"supports {native.cuda.DEVICE_TYPE} tensors only"], True
    if native.cuda.MISSING:
        return [native.cuda.MISSING], False
    if device.type != "cuda":
        return [], False
    if torch.version.hip is not None:
        return ["needs an NVIDIA GPU: use backend='triton'"], False
    if not torch.cuda.is_available():
        return ["torch.cuda.is_available() is False"], False
    reason = native.cuda.unsupported(*torch.cuda.get_device_capability(device))
    return [reason] if reason else [], False


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy whose rows are aligned to 16 bytes, as the kernels' vector loads require."""
    if x.data_ptr() % 16 == 0 and _is_aligned_layout(x.shape, x.stride()):
        return x
    return x.clone(memory_format=torch.contiguous_format)


@functools.lru_cache(maxsize=1024)
def _is_aligned_layout(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether all rows are multiples of 8 elements apart. Layouts repeat from call to call."""
    return all(n == 1 or s % 8 == 0 for n, s in zip(shape[:-1], strides[:-1], strict=True))


def _aligned_args(args: AttentionArgs) -> AttentionArgs:
    """``args`` with aligned rows and the prefix in q's dtype."""
    tensors = args[:5]
    if args.prefix_k.dtype != args.q.dtype:
        tensors = *args[:3], args.prefix_k.to(args.q.dtype), args.prefix_v.to(args.q.dtype)
    return AttentionArgs(*map(_aligned, tensors), *args[5:])  # type: ignore[arg-type, call-arg]


def _without_prefix(args: AttentionArgs) -> AttentionArgs:
    """The arguments of attention over the sequence and the sinks alone."""
    none = args.prefix_k.new_empty(args.k.shape[1], 0, args.q.shape[3])
    return args._replace(
        prefix_k=none, prefix_v=none, prefix_ids=None, prefix_lens=None, prefix_bias=None, gate=None,
        prefix_start=None,
    )  # fmt: skip


def _shares_prefix(args: AttentionArgs) -> bool:
    """Whether several samples share a prefix, so that their few rows can fill its tiles together."""
    return args.prefix_ids is None and args.q.shape[0] > 1 and args.prefix_k.shape[-2] > 0


def _gated_backward(
    dout: Tensor, dlse: Tensor | None, lse: Tensor, args: AttentionArgs, gradients: AttentionGradients, delta: Tensor
) -> None:
    """The gradients of two attentions, whose results are computed again because out is only their sum."""
    out, part_lse = allocate_outputs(args)
    seq = _without_prefix(args)
    exact = bool(gradients.dsinks.numel())
    if exact:
        native.cuda.softmax_sums(dout, dlse, lse, seq, delta)
    else:
        native.cuda.prefix_attention(seq, out, part_lse)
    none = gradients.dq.new_empty(0)
    seq_gradients = AttentionGradients(*gradients[:3], *[none] * 6)
    native.cuda.prefix_attention_backward(dout, dlse, out, lse, seq, seq_gradients, delta, exact)
    _sink_gradient(args, lse, delta, gradients)

    prefix = args._replace(sinks=None, gate=None)
    native.cuda.merge_prefix(prefix, None, None, out, part_lse)
    native.cuda.softmax_sums(dout, None, part_lse, prefix, delta, sequence=False)
    gated = prefix._replace(gate=args.gate)
    native.cuda.merge_prefix_backward(dout, None, out, part_lse, gated, gradients, delta)
    if gradients.dgate.numel():
        assert args.gate is not None
        torch.mul(delta.sum((0, 2)), 1 - args.gate.tanh().square(), out=gradients.dgate)


def _sink_gradient(args: AttentionArgs, lse: Tensor, delta: Tensor, gradients: AttentionGradients) -> None:
    """dsinks, if requested: a sink has the weight exp(sink - lse) and the value 0."""
    if gradients.dsinks.numel():
        assert args.sinks is not None
        sinks = args.sinks[:, None]
        weights = torch.exp(sinks - lse).masked_fill(sinks == torch.inf, 0.0)
        torch.sum(weights * -delta, (0, 2), out=gradients.dsinks)
