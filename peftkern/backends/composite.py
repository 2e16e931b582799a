# SPDX-License-Identifier: Apache-2.0
"""What ``merge`` and ``concat`` share: a plan made of an attention kernel of torch and prefix kernels beside it."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..arguments import AttentionArgs, AttentionGradients, Call
from . import prefix_kernels, torch_attention
from .base import Backend, Plan, PrefixKernels, Refusal
from .cost.model import (
    Machine,
    Pass,
    Sizes,
    attention_passes,
    embedding_passes,
    recomputes_softmax,
    sizes_of,
    softmax_sums_pass,
)
from .torch_attention import TorchKernel
from .triton import TritonBackend

#: Features that no attention kernel of torch has, and what they are called in messages.
_UNSUPPORTED = {"softcap": "softcap", "dropout": "peftkern's reproducible dropout"}


@dataclass(frozen=True)
class CompositePlan(Plan):
    """An attention kernel of torch and the prefix kernels beside it. An embedding needs no attention kernel."""

    kernel: TorchKernel | None
    prefix_kernels: PrefixKernels
    backend: ClassVar[str]

    @property
    def name(self) -> str:
        kernel = self.kernel.name if self.kernel else ""
        return f"{self.backend}/{kernel}/{self.prefix_kernels.name}"

    @property
    def kernels(self) -> str:
        beside = f" beside torch's {self.kernel.name}" if self.kernel else ""
        return self.prefix_kernels.title + beside

    def soft_prompt_embedding(
        self, input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None
    ) -> Tensor:
        return self.prefix_kernels.attention.soft_prompt_embedding(input_ids, weight, prompt, prompt_ids)

    def soft_prompt_embedding_backward(
        self,
        dout: Tensor,
        input_ids: Tensor,
        weight: Tensor,
        prompt: Tensor,
        prompt_ids: Tensor | None,
        needs: list[bool],
    ) -> tuple[Tensor, Tensor]:
        plan = self.prefix_kernels.attention
        return plan.soft_prompt_embedding_backward(dout, input_ids, weight, prompt, prompt_ids, needs)


class CompositeBackend(Backend):
    """Chooses an attention kernel of torch and prefix kernels that together can run a call."""

    plan_type: ClassVar[type[CompositePlan]]

    @abstractmethod
    def kernel_features(self, features: tuple[str, ...]) -> tuple[str, ...]:
        """The features of a call that torch's kernel must support."""

    @abstractmethod
    def num_keys(self, call: Call) -> int:
        """The number of keys that torch's kernel reads."""

    def limits(self, call: Call) -> list[str]:
        reasons = self.unsupported(call)
        if not reasons and call.op == "prefix_attention":
            on_gpu = replace(call, device=torch.device("cuda"))
            kernel = self._select_kernel(on_gpu, [replace(x, usable=True) for x in torch_attention.KERNELS])
            reasons = list(kernel.reasons) if isinstance(kernel, Refusal) else []
        return reasons

    def unsupported(self, call: Call) -> list[str]:
        """What the prefix kernels (those of Triton support the most) and all of torch's kernels lack."""
        reasons = TritonBackend().limits(call)
        if call.op == "prefix_attention":
            reasons += [
                f"torch has no attention kernel with {title}: use backend='triton'"
                for feature, title in _UNSUPPORTED.items()
                if feature in call.features
            ]
        return reasons

    def plan(self, call: Call) -> Plan | Refusal:
        kernels = prefix_kernels.select(call)
        if isinstance(kernels, Refusal) and kernels.other_device:
            return Refusal(("requires a CUDA or ROCm device",), other_device=True)
        reasons = self.unsupported(call)
        if reasons:
            return Refusal(tuple(reasons))
        kernel = self._select_kernel(call) if call.op == "prefix_attention" else None
        if isinstance(kernel, Refusal):
            return kernel
        return kernels if isinstance(kernels, Refusal) else self.plan_type(kernel, kernels)

    def _select_kernel(self, call: Call, kernels: list[TorchKernel] | None = None) -> TorchKernel | Refusal:
        return torch_attention.select(call, self.kernel_features(call.features), self.num_keys(call), kernels)

    def restore(self, choices: tuple[str, ...]) -> Plan:
        if len(choices) != 2:
            got = "/".join((self.name, *choices))
            raise ValueError(f"plan: expected {self.name}/KERNEL/PREFIX_KERNELS, got {got}")
        kernel, kernels = choices
        return self.plan_type(
            torch_attention.kernel_named(kernel) if kernel else None, prefix_kernels.kernels_named(kernels)
        )

    def cost(self, call: Call, machine: Machine) -> list[Pass] | None:
        if call.device.type == "cpu":
            return None
        if call.op == "soft_prompt_embedding":
            return embedding_passes(call, self.name)
        kernels = [replace(x, usable=True) for x in torch_attention.KERNELS if x.name in machine.torch_kernels]
        features, num_keys = self.kernel_features(call.features), self.num_keys(call)
        found = self._select_kernel(call, kernels)
        if isinstance(found, Refusal) or not _UNSUPPORTED.keys().isdisjoint(features):
            return None
        sizes = sizes_of(call)
        forward, backward = self.passes(call, sizes, *_kernel_passes(call, sizes, machine, found, features, num_keys))
        if not call.needs_grad:
            return forward
        if recomputes_softmax(call):
            _, fused = attention_passes(call, "triton", 1, backward_kernels=6, backward_products=3.5)
            return [*forward, fused, softmax_sums_pass(call, "triton")]
        return forward + backward

    @abstractmethod
    def passes(
        self, call: Call, sizes: Sizes, forward: list[Pass], backward: list[Pass]
    ) -> tuple[list[Pass], list[Pass]]:
        """The passes forward and backward, given those of torch's kernel."""


def _kernel_passes(
    call: Call, x: Sizes, machine: Machine, kernel: TorchKernel, features: tuple[str, ...], num_keys: int
) -> tuple[list[Pass], list[Pass]]:
    """The passes of torch's kernel over ``num_keys`` keys, forward and backward."""
    with_prefix = num_keys != x.keys
    queries = call.q_shape[2]
    shifted = kernel.top_left and "non-causal" not in features and queries not in (1, num_keys)
    masked = shifted or any(name not in kernel.native for name in features)
    kv = x.kv + with_prefix * x.prefix_each
    flops = (x.full_flops if masked else x.seq_flops) + with_prefix * x.prefix_flops
    mask = 0.0
    if masked:  # built once and read once per head
        heads = x.heads if "bias" in call.features else 1
        mask = float(x.batch * heads * x.queries * num_keys * x.element)
    repeated = 0.0 if kernel.grouped or x.group == 1 else (1 + x.group) * kv
    engine = machine.flash if kernel.name == "flash" and machine.flash else kernel.name
    prepare = [Pass(engine, 6 * masked + 2 * (repeated > 0), 0.0, 4 * mask + repeated)]
    read = 0.0 if kernel.grouped else (x.group - 1) * kv
    forward = [Pass(engine, 1, flops, 2 * x.q + x.lse + kv + read + mask), *prepare]
    backward = [Pass(engine, 3, 2.5 * flops, 4 * x.q + 2 * (kv + read) + mask, True), *prepare]
    return forward, backward


def needs_exact_softmax(dlse: Tensor | None, args: AttentionArgs, needs: list[bool]) -> bool:
    """Whether a requested gradient needs more of the softmax than the rounded out and lse."""
    wanted = dict(zip(AttentionGradients._fields, needs, strict=True))
    return (
        dlse is not None or args.gate is not None or any(wanted[name] for name in ("dsinks", "dbias", "dprefix_bias"))
    )


def as_bshd(x: Tensor, like: Tensor) -> Tensor:
    """x [B, H, N, D] in the dtype of ``like``, lying in memory as [B, N, H, D]; x itself if it is."""
    return x.to(like.dtype).transpose(1, 2).contiguous().transpose(1, 2)


def with_sequence(
    gradients: AttentionGradients, sequence: tuple[Tensor, Tensor, Tensor], needs: list[bool]
) -> AttentionGradients:
    """``gradients`` with dq, dk and dv of torch's kernel where they are needed, laid out as the op's outputs."""
    dq, dk, dv = (
        as_bshd(x, empty) if need else empty
        for x, need, empty in zip(sequence, needs[:3], gradients[:3], strict=True)
    )
    return gradients._replace(dq=dq, dk=dk, dv=dv)
