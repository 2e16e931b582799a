# SPDX-License-Identifier: Apache-2.0
"""The plans that can run a call: every combination of a backend, an attention kernel of torch and prefix kernels."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import peftkern
from peftkern.arguments import Call
from peftkern.backends import composite, registry
from peftkern.backends.torch_attention import AttentionKernel
from peftkern.tools.bench.shapes import Shape

from .context import LeftOut

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def names(call: Call) -> list[str]:
    """The plans that can run ``call``, the cheapest first, without the eager reference.

    Each name may be passed as ``backend``.
    """
    return [name for name in registry.runnable_plans(call) if name != "reference"]


def plain_call(device: str, dtype: torch.dtype, needs_grad: bool = True) -> Call:
    """A call of ordinary size without features, that every plan of the device can run."""
    return Call(
        "prefix_attention", torch.device(device), dtype, dtype, (2, 4, 64, 64), (2, 2, 64, 64), (2, 16, 64), (),
        needs_grad,
    )  # fmt: skip


def call_of(device: str, tensors: dict[str, Tensor], options: dict[str, Any], needs_grad: bool = True) -> Call:
    """The call of tensors, on another device than theirs."""
    leaves = {name: x.detach().requires_grad_(needs_grad) for name, x in tensors.items()}
    return replace(peftkern.explain(**leaves, **options).call, device=torch.device(device))


def shape_call(device: str, shape: Shape) -> Call:
    """The call of a shape in bf16, with gradients unless it decodes."""
    sizes = {"q": (shape.B, shape.Hq, shape.S), **dict.fromkeys(("k", "v"), (shape.B, shape.Hkv, shape.T)),
             **dict.fromkeys(("prefix_k", "prefix_v"), (shape.Hkv, shape.P))}  # fmt: skip
    tensors = {name: torch.empty(*size, shape.D, dtype=torch.bfloat16, device="meta") for name, size in sizes.items()}
    return call_of(device, tensors, shape.options, needs_grad=shape.S > 1)


def matching(found: list[str], backend: str = "", prefix_kernels: str = "") -> list[str]:
    """The names with this backend and these prefix kernels; empty strings match every name.

    >>> matching(["triton", "merge/flash/cuda", "merge/cudnn/flash+triton"], "merge", "triton")
    ['merge/cudnn/flash+triton']
    """
    return [
        name
        for name in found
        if backend in ("", name.split("/")[0]) and prefix_kernels in ("", name.split("/")[-1].split("+")[-1])
    ]


def torch_kernel(name: str, call: Call) -> AttentionKernel | None:
    """The attention kernel beside ours that a plan runs ``call`` with, or None."""
    plan = registry.plan_named(registry.resolve(call, name))
    return plan.kernel if isinstance(plan, composite.CompositePlan) else None


@contextlib.contextmanager
def on_its_own_kernel() -> Iterator[None]:
    """Raise :class:`LeftOut` if a plan's kernel refuses sizes within the block, so that another one takes its place.

    The results of the block are then those of another plan.
    """
    composite.successors.clear()
    yield
    if composite.successors:
        refused = sorted({name for name, *_ in composite.successors})
        raise LeftOut(f"refused at run time, and another kernel took its place: {', '.join(refused)}")
