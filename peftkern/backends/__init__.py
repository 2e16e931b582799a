# SPDX-License-Identifier: Apache-2.0
"""Backends: the ways to compute the ops. :mod:`.base` is their contract, :mod:`.registry` chooses between them."""

from ..arguments import Call
from .base import Backend, Plan, Refusal
from .registry import (
    BACKENDS,
    BackendUnavailable,
    Explanation,
    available_backends,
    explain,
    forget,
    get_backend,
    plan_named,
    resolve,
    use_backend,
)

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendUnavailable",
    "Call",
    "Explanation",
    "Plan",
    "Refusal",
    "available_backends",
    "explain",
    "forget",
    "get_backend",
    "plan_named",
    "resolve",
    "use_backend",
]
