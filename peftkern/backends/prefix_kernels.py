# SPDX-License-Identifier: Apache-2.0
"""The prefix kernels that ``merge`` and ``concat`` run beside an attention kernel of torch: CUDA C++ or Triton."""

from __future__ import annotations

from dataclasses import replace

from ..arguments import Call
from .base import MergeKernels, OnePlanBackend, PrefixKernels, Refusal
from .cuda import CudaBackend, CudaPrefixKernels
from .triton import TritonBackend, TritonPrefixKernels

__all__ = ["PREFIX_KERNELS", "candidates", "kernels_named", "refusal", "supported"]

#: The prefix kernels and the backend whose device, dtypes and features they share. At equal cost those built ahead of
#: time are preferred: they need no compilation at the first call.
PREFIX_KERNELS: list[tuple[PrefixKernels, OnePlanBackend]] = [
    (CudaPrefixKernels(), CudaBackend()),
    (TritonPrefixKernels(), TritonBackend()),
]


def candidates(call: Call) -> dict[str, MergeKernels | Refusal]:
    """The prefix kernels by name, or why they cannot run ``call`` on this machine."""
    found: dict[str, MergeKernels | Refusal] = {}
    for kernels, backend in PREFIX_KERNELS:
        plan = backend.plan(_as_prefix_kernels_see(call))
        found[kernels.name] = (
            plan._replace(reasons=(f"{kernels.title}: {', '.join(plan.reasons)}",))
            if isinstance(plan, Refusal)
            else kernels
        )
    return found


def refusal(found: dict[str, MergeKernels | Refusal]) -> Refusal | None:
    """Why none of the :func:`candidates` can run a call; None if one can."""
    refusals = [kernels for kernels in found.values() if isinstance(kernels, Refusal)]
    if len(refusals) < len(found):
        return None
    reasons = "; ".join(reason for refused in refusals for reason in refused.reasons)
    return Refusal((f"no prefix kernels can run this call ({reasons})",), all(r.other_device for r in refusals))


def supported(call: Call) -> dict[str, MergeKernels]:
    """The prefix kernels by name that can run ``call`` on some machine."""
    seen = _as_prefix_kernels_see(call)
    return {kernels.name: kernels for kernels, backend in PREFIX_KERNELS if not backend.limits(seen)}


def _as_prefix_kernels_see(call: Call) -> Call:
    """``call`` with the features that prefix kernels read.

    A forward does not read the sequence's bias, which is in the mask of torch's kernel. A backward may have to
    compute the bias' gradient, by the whole attention of the same backend.
    """
    if call.needs_grad:
        return call
    return replace(call, features=tuple(name for name in call.features if name != "bias"))


def kernels_named(name: str) -> MergeKernels:
    """The prefix kernels with this name.

    Raises:
        ValueError: if there are none.
    """
    for kernels, _ in PREFIX_KERNELS:
        if kernels.name == name:
            return kernels
    raise ValueError(f"plan: expected prefix kernels {[kernels.name for kernels, _ in PREFIX_KERNELS]}, got {name!r}")
