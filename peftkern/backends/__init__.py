# SPDX-License-Identifier: Apache-2.0
"""Backends: the ways to compute an op, and the choice between them.

A backend is a module with the functions of :class:`Backend`. It receives tensors that
:mod:`peftkern.functional` has validated, writes into outputs laid out by :func:`allocate_outputs` and
:func:`allocate_gradients`, and says through ``why_not(call)`` what it cannot do. An explicitly named backend runs
or raises :class:`BackendUnavailable`; only ``"auto"`` looks for another one.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import torch

from .protocol import (
    AttentionArgs,
    AttentionGradients,
    Backend,
    Call,
    allocate_gradients,
    allocate_outputs,
    lse_dtype,
)

from . import cpu, reference  # isort: skip  (they import the names above)

__all__ = [
    "AttentionArgs",
    "AttentionGradients",
    "Backend",
    "BackendUnavailable",
    "Call",
    "Explanation",
    "allocate_gradients",
    "allocate_outputs",
    "available_backends",
    "explain",
    "get_backend",
    "lse_dtype",
    "resolve",
    "use_backend",
]

#: Every backend, in the order in which ``"auto"`` tries them: a table, since the compiler cannot trace an import.
BACKENDS: dict[str, Backend] = {"cpu": cast(Backend, cpu), "reference": cast(Backend, reference)}


class BackendUnavailable(RuntimeError):
    """No backend, or not the one that was asked for, can run a call. The message gives each one's reasons."""


@dataclass(frozen=True)
class Explanation:
    """Per backend, in the order that ``"auto"`` tries them, the reasons why it cannot run ``call``."""

    call: Call
    reasons: dict[str, list[str]]

    @property
    def chosen(self) -> str | None:
        """The backend that ``"auto"`` takes, or None."""
        return next((name for name, reasons in self.reasons.items() if not reasons), None)

    def __str__(self) -> str:
        lines = [f"{self.call.op}: {self.call}"]
        for name, reasons in self.reasons.items():
            verdict = "; ".join(reasons) or ("ok, taken by 'auto'" if name == self.chosen else "ok")
            lines.append(f"  {name}: {verdict}")
        return "\n".join(lines)


def get_backend(name: str) -> Backend:
    """The backend module called ``name``.

    Raises:
        ValueError: if there is no such backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {list(BACKENDS)}, got {name!r}")
    return BACKENDS[name]


def available_backends(device: torch.device | str = "cpu") -> tuple[str, ...]:
    """Names of the backends that can run a plain fp32 call on ``device``, in the order that ``"auto"`` tries them."""
    fp32, shape = torch.float32, (1, 1, 1, 64)
    call = Call("prefix_attention", torch.device(device), fp32, fp32, shape, shape, shape[1:])
    return tuple(name for name, reasons in explain(call).reasons.items() if not reasons)


def explain(call: Call) -> Explanation:
    """Why each backend can or cannot run ``call``."""
    return Explanation(call, {name: get_backend(name).why_not(call) for name in BACKENDS})


# One default for the whole process and not per thread: autograd recomputes checkpointed layers in its own threads,
# and they must resolve to the backend of the first pass.
_default = "auto"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, calls that say ``backend="auto"`` run on ``name``, or raise :class:`BackendUnavailable`.

    Holds for all threads of the process. A backward pass runs on the backend of its forward.

    >>> import torch, peftkern
    >>> q, prefix = torch.randn(1, 2, 3, 8), torch.randn(2, 4, 8)
    >>> with peftkern.use_backend("reference"):
    ...     out = peftkern.prefix_attention(q, q, q, prefix, prefix)
    """
    global _default
    if name != "auto":
        get_backend(name)
    previous, _default = _default, name
    try:
        yield
    finally:
        _default = previous


def resolve(call: Call, backend: str = "auto") -> str:
    """The name of the backend that runs ``call``.

    A name other than ``"auto"`` comes from the argument, else from :func:`use_backend`, else from the environment
    variable ``PEFTKERN_BACKEND``; the first one given must be able to run the call.

    Raises:
        BackendUnavailable: listing every backend with its reasons.
        ValueError: for a name that is no backend.
    """
    if backend == "auto":
        backend = _default
    if backend == "auto":
        backend = os.environ.get("PEFTKERN_BACKEND", "auto")
    if backend != "auto":
        if get_backend(backend).why_not(call):
            raise BackendUnavailable(f"backend={backend!r} cannot run {explain(call)}")
        return backend
    for name in BACKENDS:
        if not get_backend(name).why_not(call):
            if name == "reference" and call.device.type != "cpu":
                _warn_slow(call.device.type)
            return name
    raise BackendUnavailable(f"no backend can run {explain(call)}")


_warned: set[str] = set()


def _warn_slow(device_type: str) -> None:
    if device_type not in _warned:
        _warned.add(device_type)
        warnings.warn(
            f"peftkern runs its eager reference on {device_type}: right, but slow. `peftkern doctor` says which "
            "backends this machine lacks.",
            stacklevel=4,
        )
