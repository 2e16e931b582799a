# SPDX-License-Identifier: Apache-2.0
"""The plans that can run a call: every combination of a backend, an attention kernel of torch and prefix kernels."""

from __future__ import annotations

import torch

from peftkern.arguments import Call
from peftkern.backends import registry
from peftkern.backends.composite import CompositePlan
from peftkern.backends.torch_attention import TorchKernel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def names(call: Call) -> list[str]:
    """The plans that can run ``call``, the cheapest first. Each name may be passed as ``backend``."""
    return list(registry.runnable_plans(call))


def plain_call(device: str, dtype: torch.dtype, needs_grad: bool = True) -> Call:
    """A call of ordinary size without features, that every plan of the device can run."""
    return Call(
        "prefix_attention", torch.device(device), dtype, dtype, (2, 4, 64, 64), (2, 2, 64, 64), (2, 16, 64), (),
        needs_grad,
    )  # fmt: skip


def matching(found: list[str], backend: str = "", prefix_kernels: str = "") -> list[str]:
    """The names with this backend and these prefix kernels; empty strings match every name."""
    return [
        name for name in found if backend in ("", name.split("/")[0]) and prefix_kernels in ("", name.split("/")[-1])
    ]


def fast(found: list[str]) -> list[str]:
    """The names of plans that are worth a measurement: without the eager reference."""
    return [name for name in found if name != "reference"]


def torch_kernel(name: str, call: Call) -> TorchKernel | None:
    """The attention kernel of torch that a plan runs ``call`` with, or None."""
    plan = registry.plan_named(registry.resolve(call, name))
    return plan.kernel if isinstance(plan, CompositePlan) else None
