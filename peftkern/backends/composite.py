# SPDX-License-Identifier: Apache-2.0
"""What ``merge`` and ``concat`` share: plans made of an attention kernel of torch and prefix kernels beside it."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

from ..arguments import AttentionArgs, AttentionGradients, Call, attention_call
from ..callers import caller_level
from . import prefix_kernels, torch_attention
from .base import Backend, MergeKernels, Plan, Refusal
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
from .kernel_table import attention_kernels, kernel_named, known_kernels
from .torch_attention import AttentionKernel, KernelInputs
from .triton import TritonBackend

_Result = TypeVar("_Result")

#: Features that no attention kernel beside ours has, and what they are called in messages.
_UNSUPPORTED = {"dropout": "peftkern's reproducible dropout"}


@dataclass(frozen=True)
class CompositePlan(Plan):
    """An attention kernel of torch and the prefix kernels beside it. An embedding needs no attention kernel."""

    kernel: AttentionKernel | None
    prefix_kernels: MergeKernels
    backend: ClassVar[str]

    @property
    def name(self) -> str:
        kernel = self.kernel.name if self.kernel else ""
        return f"{self.backend}/{kernel}/{self.prefix_kernels.name}"

    @property
    def kernels(self) -> str:
        beside = f" beside {self.kernel.title}" if self.kernel else ""
        return self.prefix_kernels.title + beside

    @abstractmethod
    def attention_inputs(self, kernel: AttentionKernel, args: AttentionArgs) -> KernelInputs:
        """What a kernel is to compute."""

    def on_kernel(
        self, args: AttentionArgs, run: Callable[[AttentionKernel, KernelInputs], _Result]
    ) -> tuple[KernelInputs, _Result]:
        """``run`` the plan's kernel on its inputs or, if it refuses them at run time, the next that can run the call.

        cuDNN builds a plan for each set of sizes and raises if it finds none. A warning names both kernels, once.
        """
        assert self.kernel is not None
        kernel = self.kernel
        if successors:
            kernel = successors.get(self._key(args), kernel)
        inputs = self.attention_inputs(kernel, args)
        try:
            return inputs, run(kernel, inputs)
        except (torch.OutOfMemoryError, torch.AcceleratorError):
            raise
        except (RuntimeError, AssertionError) as error:
            successor = self._successor(args)
            if kernel is not self.kernel or successor is None:
                raise
            self._announce(successor, error)
            successors[self._key(args)] = successor
        return self.on_kernel(args, run)

    def _key(self, args: AttentionArgs) -> tuple[object, ...]:
        return self.name, attention_call(args, needs_grad=True), torch.are_deterministic_algorithms_enabled()

    def _successor(self, args: AttentionArgs) -> AttentionKernel | None:
        """The first kernel besides the plan's own that can run the call beside the same prefix kernels."""
        for plan in BACKENDS[self.backend].plans(attention_call(args, needs_grad=True)).values():
            if not isinstance(plan, CompositePlan) or plan.prefix_kernels.name != self.prefix_kernels.name:
                continue
            if plan.kernel and self.kernel and plan.kernel.name != self.kernel.name:
                return plan.kernel
        return None

    def _announce(self, successor: AttentionKernel, error: Exception) -> None:
        assert self.kernel is not None
        if not any(name == self.name for name, *_ in successors):
            warnings.warn(
                f"{self.kernel.title} attention refuses a call that it was expected to run, so {successor.name} runs "
                f"it: {error}",
                stacklevel=caller_level(),
            )

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


class _Successors(dict[tuple[object, ...], AttentionKernel]):
    """The kernels that run instead of a plan's own, by the plan's name and the call that its kernel has refused."""

    cache_clear = dict.clear


successors = _Successors()
#: The composite backends by name.
BACKENDS: dict[str, CompositeBackend] = {}


class CompositeBackend(Backend):
    """Pairs the attention kernels of torch with the prefix kernels that can run a call."""

    plan_type: ClassVar[type[CompositePlan]]

    def __init__(self) -> None:
        BACKENDS[self.name] = self

    @abstractmethod
    def kernel_features(self, features: tuple[str, ...]) -> tuple[str, ...]:
        """The features of a call that torch's kernel must support."""

    @abstractmethod
    def num_keys(self, call: Call) -> int:
        """The number of keys that torch's kernel reads."""

    def limits(self, call: Call) -> list[str]:
        """Those of torch's kernels: packages are optional."""
        reasons = self.unsupported(call)
        if not reasons and call.op == "prefix_attention":
            on_gpu = replace(call, device=torch.device("cuda"))
            found = self.attention_kernels(on_gpu, [x.on_any_machine() for x in torch_attention.KERNELS])
            refusal = torch_attention.refusal(on_gpu, found)
            reasons = list(refusal.reasons) if refusal else []
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

    def plans(self, call: Call) -> dict[str, Plan | Refusal]:
        beside = self.beside(call)
        refusal = prefix_kernels.refusal(beside)
        if refusal and refusal.other_device:
            return {self.name: Refusal(("requires a CUDA or ROCm device",), other_device=True)}
        if reasons := self.unsupported(call):
            return {self.name: Refusal(tuple(reasons))}
        kernels: dict[str, AttentionKernel | Refusal | None] = {"": None}
        if call.op == "prefix_attention":
            found = self.attention_kernels(call)
            refusal = torch_attention.refusal(call, found) or refusal
            kernels = {**found}
        if refusal:
            return {self.name: refusal}
        return {
            f"{self.name}/{kernel_name}/{beside_name}": self._pair(call, kernel, prefix)
            for kernel_name, kernel in kernels.items()
            for beside_name, prefix in beside.items()
        }

    def beside(self, call: Call) -> dict[str, MergeKernels | Refusal]:
        """The prefix kernels by name, or why they cannot run a call on this machine."""
        return prefix_kernels.candidates(call)

    def beside_anywhere(self, call: Call) -> dict[str, MergeKernels]:
        """The prefix kernels by name that can run a call on some machine."""
        return prefix_kernels.supported(call)

    def _pair(
        self, call: Call, kernel: AttentionKernel | Refusal | None, prefix: MergeKernels | Refusal
    ) -> Plan | Refusal:
        if isinstance(kernel, Refusal) or isinstance(prefix, Refusal):
            refusals = [x for x in (kernel, prefix) if isinstance(x, Refusal)]
            return Refusal(tuple(reason for refused in refusals for reason in refused.reasons))
        reasons = [] if kernel is None else self.why_not_together(call, kernel, prefix)
        return Refusal(tuple(reasons)) if reasons else self.plan_type(kernel, prefix)

    def why_not_together(self, call: Call, kernel: AttentionKernel, prefix: MergeKernels) -> list[str]:
        """Reasons why a kernel and prefix kernels that can each run a call cannot do so together."""
        return []

    def attention_kernels(
        self, call: Call, kernels: list[AttentionKernel] | None = None
    ) -> dict[str, AttentionKernel | Refusal]:
        """The kernels for a call, by name, or why they cannot run it. ``kernels`` replaces the table."""
        features = self.kernel_features(call.features)
        kernels = attention_kernels() if kernels is None else kernels
        return torch_attention.candidates(call, features, self.num_keys(call), kernels)

    def restore(self, choices: tuple[str, ...]) -> Plan:
        if len(choices) != 2:
            got = "/".join((self.name, *choices))
            raise ValueError(f"plan: expected {self.name}/KERNEL/PREFIX_KERNELS, got {got}")
        kernel, kernels = choices
        return self.plan_type(kernel_named(kernel) if kernel else None, self.beside_named(kernels))

    def beside_named(self, name: str) -> MergeKernels:
        """The prefix kernels with this name. Raises ValueError if there are none."""
        return prefix_kernels.kernels_named(name)

    def costs(self, call: Call, machine: Machine) -> dict[str, list[Pass]]:
        if call.device.type == "cpu" or self.unsupported(call):
            return {}
        beside = self.beside_anywhere(call)
        if call.op == "soft_prompt_embedding":
            return {f"{self.name}//{prefix.name}": embedding_passes(call, prefix.name) for prefix in beside.values()}
        usable = [x.on_any_machine() for x in known_kernels() if x.name in machine.attention_kernels]
        return {
            f"{self.name}/{name}/{prefix.name}": self._passes(call, machine, kernel, prefix)
            for name, kernel in self.attention_kernels(call, usable).items()
            if isinstance(kernel, AttentionKernel)
            for prefix in beside.values()
            if not self.why_not_together(call, kernel, prefix)
        }

    def _passes(self, call: Call, machine: Machine, kernel: AttentionKernel, prefix: MergeKernels) -> list[Pass]:
        sizes, features, num_keys = sizes_of(call), self.kernel_features(call.features), self.num_keys(call)
        own = _kernel_passes(call, machine, kernel, features, num_keys)
        forward, backward = self.passes(call, sizes, prefix, *own)
        if not call.needs_grad:
            return forward
        if recomputes_softmax(call):
            engine = prefix.attention.name
            _, fused = attention_passes(call, engine, 1, backward_kernels=6, backward_products=3.5)
            return [*forward, fused, softmax_sums_pass(call, engine)]
        return forward + backward

    @abstractmethod
    def passes(
        self, call: Call, sizes: Sizes, prefix: MergeKernels, forward: list[Pass], backward: list[Pass]
    ) -> tuple[list[Pass], list[Pass]]:
        """The passes forward and backward with these prefix kernels, given those of torch's kernel."""


def _kernel_passes(
    call: Call, machine: Machine, kernel: AttentionKernel, features: tuple[str, ...], num_keys: int
) -> tuple[list[Pass], list[Pass]]:
    """The passes of torch's kernel over ``num_keys`` keys, forward and backward."""
    x = sizes_of(_with_one_head_dim(call, kernel))
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
    # sizes that are no multiple of 64 rarely come again
    setup = kernel.setup if queries % 64 or x.keys % 64 else 0.0
    forward = [Pass(engine, 1, flops, x.q + x.out + x.lse + kv + read + mask, setup=setup), *prepare]
    moved = 2 * (x.q + x.out) + 2 * (kv + read) + mask
    backward = [Pass(engine, 3, 2.5 * flops, moved, True, setup), *prepare]
    padding, backward_padding = _padding_passes(call, x, engine)
    return forward + padding, backward + backward_padding


def _with_one_head_dim(call: Call, kernel: AttentionKernel) -> Call:
    """``call`` as ``kernel`` sees it: padded to the larger head dim unless v may have one of its own."""
    if call.own_value_dim is None or kernel.own_value_dim:
        return call
    larger = max(call.q_shape[-1], call.own_value_dim)
    return replace(call, q_shape=(*call.q_shape[:-1], larger), own_value_dim=None)


def _padding_passes(call: Call, padded: Sizes, engine: str) -> tuple[list[Pass], list[Pass]]:
    """The copies that pad a call's tensors to ``padded``: forward q and k, or v; backward also out and dout, or q."""
    x = sizes_of(call)
    if padded.kv == x.kv:
        return [], []
    queries = x.q + padded.q if padded.q > x.q else 0.0
    outs = 2 * (x.out + padded.out) if padded.out > x.out else 0.0
    # one of k and v is read and the wider one written, which together are the bytes of both
    return [Pass(engine, 1, 0.0, x.kv + queries)], [Pass(engine, 3, 0.0, x.kv + queries + outs)]


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
