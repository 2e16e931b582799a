# SPDX-License-Identifier: Apache-2.0
"""The Triton backend: what it can run, what a call costs, and how a call runs."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ...arguments import AttentionArgs, AttentionGradients, Call, allocate_gradients, allocate_outputs
from ..base import OnePlanBackend, Plan, Refusal
from ..cost.model import (
    Machine,
    Pass,
    attention_passes,
    embedding_passes,
    recomputes_softmax,
    sizes_of,
    softmax_sums_pass,
)
from . import attention
from .arguments import Matrices, dense
from .device import INTERPRETED, lacks
from .launch import WIDTH, LaunchContext, decodes, launch_kernel, num_blocks
from .tiles import MAX_HEAD_DIM, Direction

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
#: The gradients that each kernel of the backward computes.
_GRADIENTS: dict[Direction, tuple[str, ...]] = {
    "dq": ("dq",), "dkv": ("dk", "dv"), "prefix": ("dprefix_k", "dprefix_v", "dprefix_bias"), "bias": ("dbias",),
}  # fmt: skip


class TritonPlan(Plan):
    """Runs the Triton kernels."""

    name = "triton"

    def prefix_attention(self, args: AttentionArgs) -> tuple[Tensor, Tensor]:
        """Compute (out, lse) by one kernel, or by the three for decoding."""
        out, lse = allocate_outputs(args)
        context = LaunchContext(args)
        if context.decodes:  # it reads each used prefix once, so it skips rounding a mostly unused bank
            context.tune("decode", lambda: self.prefix_attention(args))
            attention.decode(context, out, lse)
        else:
            context.round_prefix()
            context.tune("forward", lambda: self.prefix_attention(args))
            attention.forward(context, out, lse)
        return out, lse

    def prefix_attention_backward(
        self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, needs: list[bool]
    ) -> AttentionGradients:
        """Compute the gradients: first statistics of each row, then a kernel per group of gradients.

        If a bias, sinks or a gate need a gradient, the softmax is computed once more: see :mod:`.kernels.backward`.
        """
        gradients = allocate_gradients(args, needs)
        needed = dict(zip(AttentionGradients._fields, needs, strict=True))
        context = LaunchContext(args)
        context.round_prefix()
        for direction, names in _GRADIENTS.items():
            only = [need and name in names for name, need in needed.items()]
            if any(only):
                run = functools.partial(self.prefix_attention_backward, dout, dlse, out, lse, args, only)
                context.tune(direction, run)
        gated = args.gate is not None
        exact = gated or any(needed[name] for name in ("dsinks", "dbias", "dprefix_bias"))
        douts = Matrices.of(dout)
        stats = attention.row_statistics(context, None if exact else Matrices.of(out), douts, lse, dlse, gated)
        if needed["dq"]:
            attention.query_gradient(context, douts, stats, Matrices.of(gradients.dq))
        if needed["dk"] or needed["dv"]:
            attention.key_gradients(context, douts, stats, gradients.dk, gradients.dv)
        if needed["dprefix_k"] or needed["dprefix_v"] or needed["dprefix_bias"]:
            attention.prefix_gradients(context, douts, stats, gradients)
        if gradients.dbias.numel():
            attention.bias_gradient(context, douts, stats, gradients.dbias)
        if gradients.dsinks.numel():
            assert args.sinks is not None
            attention.sink_gradient(args.sinks, stats, gradients.dsinks)
        if gradients.dgate.numel():
            assert args.gate is not None
            attention.gate_gradient(args.gate, stats, gradients.dgate)
        return gradients

    def soft_prompt_embedding(
        self, input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None
    ) -> Tensor:
        """Compute [B, P+S, E]; the prompt is rounded to the weight's dtype."""
        from .kernels.embedding import _soft_prompt_embedding_fwd_kernel

        batch, seq_len = input_ids.shape
        vocabulary, width = weight.shape
        length = prompt.shape[-2] + seq_len
        out = weight.new_empty(batch, length, width)
        prompt = prompt if prompt.dim() == 3 else prompt[None]
        launch_kernel(
            _soft_prompt_embedding_fwd_kernel, (batch * length, num_blocks(width, WIDTH)), weight.device,
            input_ids, *input_ids.stride(), weight, *weight.stride(), prompt, *prompt.stride(), dense(prompt_ids),
            out, length, length - seq_len, vocabulary, width, BLOCK=WIDTH,
        )  # fmt: skip
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
        """Compute (dweight, dprompt); the prompt's sums over the batch have a fixed order."""
        from .kernels.embedding import _soft_prompt_embedding_bwd_kernel

        prefix_len, width = prompt.shape[-2:]
        dweight = weight.new_zeros(weight.shape if needs[0] else 0, dtype=torch.float32)
        dprompt = prompt.new_empty(prompt.shape if needs[1] else 0, dtype=torch.float32)
        if needs[0]:
            rows = dout[:, prefix_len:].float().flatten(0, 1)
            dweight.index_put_((input_ids.flatten(),), rows, accumulate=True)
        if needs[1] and dprompt.numel():
            launch_kernel(
                _soft_prompt_embedding_bwd_kernel, (dprompt.numel() // width, num_blocks(width, WIDTH)), dout.device,
                dout, *dout.stride()[:2], dense(prompt_ids), dprompt, dout.shape[0], prefix_len, width,
                BLOCK=WIDTH,
            )  # fmt: skip
        return dweight, dprompt


_PLAN = TritonPlan()


class TritonBackend(OnePlanBackend):
    """Triton kernels for CUDA and ROCm GPUs; with TRITON_INTERPRET=1, for CPU tensors too, by name only."""

    name = "triton"

    def limits(self, call: Call) -> list[str]:
        reasons = []
        if call.dtype not in _DTYPES:
            name = str(call.dtype).removeprefix("torch.")
            reasons.append(f"{name} is not supported: use fp32, fp16 or bf16, or backend='reference'")
        if call.op == "prefix_attention":
            head_dim = max(call.q_shape[-1], call.value_dim)
            if not 1 <= head_dim <= MAX_HEAD_DIM:
                reasons.append(f"head dim {head_dim} is not within 1 to {MAX_HEAD_DIM}: use backend='reference'")
        return reasons

    def plan(self, call: Call) -> Plan | Refusal:
        reasons = self.limits(call) + lacks(call.device)
        return Refusal(tuple(reasons), call.device.type == "cpu" and not INTERPRETED) if reasons else _PLAN

    def restore(self, choices: tuple[str, ...]) -> Plan:
        """The only plan: tiles and splits follow from the tensors and the device."""
        return _PLAN

    def cost(self, call: Call, machine: Machine) -> list[Pass] | None:
        """None on a CPU, where the kernels are only interpreted."""
        if call.device.type == "cpu":
            return None
        if call.op == "soft_prompt_embedding":
            return embedding_passes(call, self.name)
        sizes = sizes_of(call)
        forward_kernels = 3 if decodes(sizes.queries, sizes.keys + sizes.prefix) else 1
        passes = attention_passes(call, self.name, forward_kernels, backward_kernels=6, backward_products=3.5)
        if call.needs_grad and recomputes_softmax(call):
            passes.append(softmax_sums_pass(call, self.name))
        return passes
