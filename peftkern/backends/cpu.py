# SPDX-License-Identifier: Apache-2.0
"""Fused C++ kernels for CPUs (``csrc/cpu``): one set per instruction set, selected at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import native
from ..arguments import (
    AttentionArgs,
    AttentionGradients,
    Call,
    allocate_gradients,
    allocate_outputs,
    lse_dtype,
    output_layouts,
)
from .base import OnePlanBackend, Plan, Refusal, RowPlan
from .cost.model import Machine, Pass, attention_passes, embedding_passes

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MAX_HEAD_DIM = 256
_Layout = tuple[tuple[int, ...], tuple[int, ...]]

#: Stands for a gradient that nobody needs.
_NOTHING = torch.empty(0, device="cpu")


class CpuPlan(RowPlan):
    """Calls the native CPU library."""

    name = "cpu"

    def bind(self, args: AttentionArgs) -> Plan:
        return _BoundCpuPlan(args)

    def prefix_attention(self, args: AttentionArgs) -> tuple[Tensor, Tensor]:
        out, lse = allocate_outputs(args)
        native.cpu.prefix_attention(args, out, lse)
        return out, lse

    def prefix_attention_backward(
        self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, needs: list[bool]
    ) -> AttentionGradients:
        gradients = allocate_gradients(args, needs)
        native.cpu.prefix_attention_backward(dout, dlse, out, lse, args, gradients)
        return gradients

    def attention_of_rows(self, args: AttentionArgs, rows: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = allocate_outputs(args)
        native.cpu.prefix_attention(args, out, lse, rows=rows)
        return out, lse

    def attention_of_rows_backward(
        self,
        dout: Tensor,
        dlse: Tensor | None,
        out: Tensor,
        lse: Tensor,
        args: AttentionArgs,
        needs: list[bool],
        rows: Tensor,
    ) -> AttentionGradients:
        prefix_k, prefix_v = needs[3:5]
        gradients = allocate_gradients(args, [*needs[:3], False, False, *needs[5:]])
        shape, dtype = (rows.shape[0], args.k.shape[1], rows.shape[1]), lse_dtype(args.q.dtype)
        if prefix_k:
            gradients = gradients._replace(dprefix_k=dout.new_empty(*shape, args.k.shape[3], dtype=dtype))
        if prefix_v:
            gradients = gradients._replace(dprefix_v=dout.new_empty(*shape, args.v.shape[3], dtype=dtype))
        native.cpu.prefix_attention_backward(dout, dlse, out, lse, args, gradients, rows=rows)
        return gradients

    def soft_prompt_embedding(
        self, input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None
    ) -> Tensor:
        weight, prompt = (x if x.stride(-1) == 1 else x.contiguous() for x in (weight, prompt))
        out = weight.new_empty(input_ids.shape[0], prompt.shape[-2] + input_ids.shape[1], weight.shape[1])
        native.cpu.soft_prompt_embedding(input_ids, weight, prompt, prompt_ids, out)
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
        dweight, dprompt = (
            x.new_empty(x.shape if need else 0, dtype=torch.float32)
            for x, need in zip((weight, prompt), needs, strict=True)
        )
        native.cpu.soft_prompt_embedding_backward(
            dout, input_ids, weight, prompt, prompt_ids, dweight if needs[0] else None, dprompt if needs[1] else None
        )
        return dweight, dprompt


@dataclass(frozen=True, slots=True)
class _Backward:
    """What backwards share whose tensors have the same strides, and that compute the same gradients.

    Attributes:
        key: :func:`_backward_key` of such a backward.
        layouts: (size, strides) of the nine gradients, None for those that nobody needs.
        constants: of the native call.
    """

    key: tuple[Any, ...]
    layouts: tuple[_Layout | None, ...]
    constants: native.fill.BackwardConstants


class _BoundCpuPlan(CpuPlan):
    """The plan for calls like one: it fills in addresses only.

    Backwards may differ from each other in strides and in the gradients that are needed. What the last one was
    prepared with is kept.
    """

    _last: _Backward | None = None

    def __init__(self, args: AttentionArgs) -> None:
        self._out, self._lse = output_layouts(args)
        dtype = lse_dtype(args.q.dtype)
        self._lse_dtype: dict[str, Any] = {} if dtype == args.q.dtype else {"dtype": dtype}  # a keyword costs time
        self._constants = native.fill.attention_constants(args, self._out[1])

    def prefix_attention(self, args: AttentionArgs) -> tuple[Tensor, Tensor]:
        q = args[0]
        out, lse = q.new_empty_strided(*self._out), q.new_empty_strided(*self._lse, **self._lse_dtype)
        native.cpu.prefix_attention(args, out, lse, constants=self._constants)
        return out, lse

    def prefix_attention_backward(
        self, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, args: AttentionArgs, needs: list[bool]
    ) -> AttentionGradients:
        key, last = _backward_key(dout, dlse, out, args, needs), self._last
        if last is None or last.key != key:
            gradients = allocate_gradients(args, needs)
            layouts = tuple([(tuple(g.shape), g.stride()) if g.shape != _NOTHING.shape else None for g in gradients])
            constants = native.fill.backward_constants(dout, dlse, out, args, gradients)
            self._last = _Backward(key, layouts, constants)
        else:
            gradients, constants = self._allocate(args.q, last.layouts), last.constants
        native.cpu.prefix_attention_backward(dout, dlse, out, lse, args, gradients, constants=constants)
        return gradients

    def _allocate(self, q: Tensor, layouts: tuple[_Layout | None, ...]) -> AttentionGradients:
        """What :func:`allocate_gradients` allocates, but gradients without elements are shared between calls."""
        new, dtype = q.new_empty_strided, self._lse_dtype
        if not dtype:
            return AttentionGradients._make([_NOTHING if x is None else new(*x) for x in layouts])
        return AttentionGradients(
            *[_NOTHING if layout is None else new(*layout) for layout in layouts[:3]],
            *[_NOTHING if layout is None else new(*layout, **dtype) for layout in layouts[3:]],
        )


def _backward_key(
    dout: Tensor, dlse: Tensor | None, out: Tensor, args: AttentionArgs, needs: list[bool]
) -> tuple[Any, ...]:
    """What backwards of calls with the same sizes, dtypes and numbers can differ in."""
    q, k, v, prefix_k, prefix_v, _, bias, prefix_bias, _, key_mask = args[:10]
    return (
        dout.stride(), out.stride(), q.stride(), k.stride(), v.stride(), prefix_k.stride(), prefix_v.stride(),
        dlse if dlse is None else dlse.stride(), bias if bias is None else bias.stride(),
        prefix_bias if prefix_bias is None else prefix_bias.stride(),
        key_mask if key_mask is None else key_mask.stride(), tuple(needs), torch.get_num_threads(),
    )  # fmt: skip


class CpuBackend(OnePlanBackend):
    """The native CPU library: fp32, fp16 and bf16, head dims up to 256, every feature."""

    name = "cpu"
    _plan = CpuPlan()

    def limits(self, call: Call) -> list[str]:
        reasons = []
        if call.dtype not in _DTYPES:
            reasons.append(f"has no {str(call.dtype).removeprefix('torch.')} kernels: use fp32, fp16 or bf16")
        if call.op == "prefix_attention":
            head_dim = max(call.q_shape[-1], call.value_dim)
            if head_dim > _MAX_HEAD_DIM:
                reasons.append(f"head dim {head_dim} is above {_MAX_HEAD_DIM}: use backend='reference'")
        return reasons

    def plan(self, call: Call) -> Plan | Refusal:
        reasons = self.limits(call)
        other_device = call.device.type != "cpu"
        if other_device:
            reasons.append("supports CPU tensors only")
        if native.cpu.MISSING:
            reasons.append(native.cpu.MISSING)
        return Refusal(tuple(reasons), other_device) if reasons else self._plan

    def restore(self, choices: tuple[str, ...]) -> Plan:
        return self._plan

    def cost(self, call: Call, machine: Machine) -> list[Pass] | None:
        if call.device.type != "cpu":
            return None
        if call.op == "soft_prompt_embedding":
            return embedding_passes(call, self.name)
        # the backward computes both products of dq and (dk, dv) in one pass
        return attention_passes(call, self.name, forward_kernels=1, backward_kernels=2, backward_products=2.5)
