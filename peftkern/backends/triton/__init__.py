# SPDX-License-Identifier: Apache-2.0
"""Fused Triton kernels for CUDA and ROCm: forward and backward over [prefix blocks | sequence blocks].

With TRITON_INTERPRET=1 in the environment the kernels run in Triton's interpreter, on CPU tensors too: for tests, and
by name only (``backend="triton"``). Importing this package does not import Triton.
"""

from .backend import TritonBackend

__all__ = ["TritonBackend"]

# BEGIN: the face of a backend that is a module. Delete it when the registry holds TritonBackend().
from ...arguments import Call
from ..base import Refusal
from .backend import TritonPlan
from .backend import limits as limits
from .device import architecture as architecture

_PLAN = TritonPlan()
prefix_attention, prefix_attention_backward = _PLAN.prefix_attention, _PLAN.prefix_attention_backward
soft_prompt_embedding, soft_prompt_embedding_backward = (
    _PLAN.soft_prompt_embedding, _PLAN.soft_prompt_embedding_backward,
)  # fmt: skip


def why_not(call: Call) -> list[str]:
    """Reasons why a call cannot run."""
    plan = TritonBackend().plan(call)
    return list(plan.reasons) if isinstance(plan, Refusal) else []


# END
