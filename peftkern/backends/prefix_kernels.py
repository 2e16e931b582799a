# SPDX-License-Identifier: Apache-2.0
"""The kernels that ``merge`` and ``slot`` put beside another library's attention: in CUDA C++ where a library of
them is built that serves the device and the call, else in Triton.

A part merges a prefix into the result of an attention, lays and sums slots, and its backend computes what takes more
of the softmax than another library's op returns. Both write the same tensors, so a forward and its backward may take
different parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from ..arguments import AttentionArgs, AttentionGradients, Backend, Call, call_of
from . import cuda, triton
from .torch_attention import choose as choose_vendor
from .triton import prefix_kernels as triton_kernels

__all__ = [
    "PARTS", "PrefixPart", "choose", "names", "of_attention", "soft_prompt_embedding",
    "soft_prompt_embedding_backward",
]  # fmt: skip


@dataclass(frozen=True)
class PrefixPart:
    """A row of the table."""

    name: str
    #: The same kernels as a whole attention.
    backend: Backend
    merge_prefix: Callable[[AttentionArgs, Tensor | None, Tensor | None, float], tuple[Tensor, Tensor]]
    merge_prefix_backward: Callable[[Tensor, Tensor, Tensor, AttentionArgs, Tensor | None, AttentionGradients], None]
    lay_slot: Callable[[AttentionArgs], tuple[Tensor, Tensor]]
    sum_slot: Callable[[AttentionArgs, Tensor, Tensor], None]

    def why_not(self, call: Call) -> list[str]:
        """Reasons why the kernels cannot run beside another library's. Forwards do not meet the sequence's bias."""
        if not call.needs_grad:
            call = replace(call, features=tuple(name for name in call.features if name != "bias"))
        return self.backend.why_not(call)


#: In the order in which they are tried.
PARTS = [
    PrefixPart(
        "CUDA C++", cuda, cuda.merge_prefix, cuda.merge_prefix_backward, cuda.lay_slot, cuda.sum_slot,
    ),
    PrefixPart(
        "Triton", triton, triton_kernels.merge_prefix, triton_kernels.merge_prefix_backward, triton_kernels.lay_slot,
        triton_kernels.sum_slot,
    ),
]  # fmt: skip


def choose(call: Call) -> tuple[PrefixPart | None, list[str]]:
    """The first part that can run ``call``; else a line with the reasons of each."""
    lacks = []
    for part in PARTS:
        reasons = part.why_not(call)
        if not reasons:
            return part, []
        lacks.append(f"{part.name}: {', '.join(reasons)}")
    return None, [f"no kernels for the prefix ({'; '.join(lacks)})"]


def _chosen(call: Call) -> PrefixPart:
    part, reasons = choose(call)
    if part is None:
        raise RuntimeError(f"{call}: {reasons[0]}")
    return part


def of_attention(args: AttentionArgs, backward: bool = False) -> PrefixPart:
    """The part for a forward, or for a backward with whatever gradients."""
    return _chosen(call_of(args, needs_grad=backward))


def names(call: Call, features: tuple[str, ...], kv_len: int) -> str:
    """The kernels that run ``call`` beside a vendor's with these ``features`` over ``kv_len`` keys, for messages."""
    part, _ = choose(call)
    vendor = choose_vendor(call, features, kv_len)[0] if call.op == "prefix_attention" else None
    kernels = [part.name] if part else []
    return " beside ".join([*kernels, f"torch's {vendor.name}"] if vendor else kernels)


def _of_embedding(input_ids: Tensor, weight: Tensor, prompt: Tensor) -> Backend:
    return _chosen(Call(
        "soft_prompt_embedding", weight.device, weight.dtype, prompt.dtype, tuple(input_ids.shape),
        tuple(weight.shape), tuple(prompt.shape),
    )).backend  # fmt: skip


def soft_prompt_embedding(input_ids: Tensor, weight: Tensor, prompt: Tensor, prompt_ids: Tensor | None) -> Tensor:
    backend = _of_embedding(input_ids, weight, prompt)
    return backend.soft_prompt_embedding(input_ids, weight, prompt, prompt_ids)


def soft_prompt_embedding_backward(
    dout: Tensor,
    input_ids: Tensor,
    weight: Tensor,
    prompt: Tensor,
    prompt_ids: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor]:
    backend = _of_embedding(input_ids, weight, prompt)
    return backend.soft_prompt_embedding_backward(dout, input_ids, weight, prompt, prompt_ids, needs)
