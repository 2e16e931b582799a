# SPDX-License-Identifier: Apache-2.0
"""The prefix kernels that ``merge`` and ``concat`` run beside an attention kernel of torch: CUDA C++ or Triton."""

from __future__ import annotations

from dataclasses import replace

from ..arguments import Call
from .base import Backend, Plan, PrefixKernels, Refusal
from .cuda import CudaBackend, CudaPrefixKernels
from .triton import TritonBackend, TritonPrefixKernels

__all__ = ["PREFIX_KERNELS", "kernels_named", "select"]

#: The prefix kernels and the backend whose device, dtypes and features they share, in order of preference: those
#: built ahead of time need no compilation at the first call.
PREFIX_KERNELS: list[tuple[PrefixKernels, Backend]] = [
    (CudaPrefixKernels(), CudaBackend()),
    (TritonPrefixKernels(), TritonBackend()),
]


def select(call: Call) -> PrefixKernels | Refusal:
    """The first prefix kernels that can run ``call``, or the reasons of each.

    A forward does not read the sequence's bias, which is in the mask of torch's kernel. A backward may have to
    compute the bias' gradient, by the whole attention of the same backend.
    """
    if not call.needs_grad:
        call = replace(call, features=tuple(name for name in call.features if name != "bias"))
    refusals = {}
    for kernels, backend in PREFIX_KERNELS:
        plan = backend.plan(call)
        if isinstance(plan, Plan):
            return kernels
        refusals[kernels.title] = plan
    reasons = "; ".join(f"{title}: {', '.join(refusal.reasons)}" for title, refusal in refusals.items())
    other_device = all(refusal.other_device for refusal in refusals.values())
    return Refusal((f"no prefix kernels can run this call ({reasons})",), other_device)


def kernels_named(name: str) -> PrefixKernels:
    """The prefix kernels with this name.

    Raises:
        ValueError: if there are none.
    """
    for kernels, _ in PREFIX_KERNELS:
        if kernels.name == name:
            return kernels
    raise ValueError(f"plan: expected prefix kernels {[kernels.name for kernels, _ in PREFIX_KERNELS]}, got {name!r}")
