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
from dataclasses import dataclass, field
from typing import cast

import torch

from ..arguments import (
    AttentionArgs,
    AttentionGradients,
    Backend,
    Call,
    allocate_gradients,
    allocate_outputs,
    call_of,
    lse_dtype,
)

from . import concat, cpu, cuda, merge, reference, triton  # isort: skip  (they import the names above)
from .cost import model as choose  # isort: skip

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
    "call_of",
    "explain",
    "get_backend",
    "lse_dtype",
    "resolve",
    "use_backend",
]

#: Every backend; :mod:`.cost` orders them. A table, since the compiler cannot trace an import.
BACKENDS: dict[str, Backend] = {
    "triton": cast(Backend, triton),
    "merge": cast(Backend, merge),
    "concat": cast(Backend, concat),
    "cuda": cast(Backend, cuda),
    "cpu": cast(Backend, cpu),
    "reference": cast(Backend, reference),
}


class BackendUnavailable(RuntimeError):
    """No backend, or not the one that was asked for, can run a call. The message gives each one's reasons."""


@dataclass(frozen=True)
class Explanation:
    """Per backend, in the order that ``"auto"`` tries them, the reasons why it cannot run ``call``."""

    call: Call
    reasons: dict[str, list[str]]
    #: The backend that is asked for, or "auto", and by what.
    requested: str = "auto"
    by: str = ""
    #: How long each takes, as far as that is known.
    estimates: dict[str, choose.Estimate | None] = field(default_factory=dict)

    @property
    def chosen(self) -> str | None:
        """The backend that runs the call, or None."""
        names = self.reasons if self.requested == "auto" else [self.requested]
        return next((name for name in names if not self.reasons[name]), None)

    def __str__(self) -> str:
        lines = [f"{self.call.op}: {self.call}"]
        for name, reasons in self.reasons.items():
            taken = ", taken by 'auto'" if self.requested == "auto" else f", asked for by {self.by}"
            time = f", {self.estimates[name]}" if self.estimates.get(name) else ""
            runs = f"ok{self._kernels(name)}{taken if name == self.chosen else ''}{time}"
            lines.append(f"  {name}: {'; '.join(reasons) or runs}")
        return "\n".join(lines)

    def _kernels(self, name: str) -> str:
        """Of a backend that has several, those that it takes."""
        made_of = getattr(get_backend(name), "made_of", None)
        return f" ({made_of(self.call)})" if made_of else ""


def get_backend(name: str) -> Backend:
    """The backend module called ``name``.

    Raises:
        ValueError: if there is no such backend.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {list(BACKENDS)}, got {name!r}")
    return BACKENDS[name]


def available_backends(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Names of the backends that can run a plain call on ``device``, in the order that ``"auto"`` tries them."""
    shape = (1, 1, 1, 64)
    call = Call("prefix_attention", torch.device(device), dtype, dtype, shape, shape, shape[1:])
    return tuple(name for name, reasons in explain(call).reasons.items() if not reasons)


def explain(call: Call, backend: str = "auto") -> Explanation:
    """Why each backend can or cannot run ``call``, and which one does; arguments as for :func:`resolve`."""
    estimates = choose.estimates(call)
    reasons = {name: get_backend(name).why_not(call) for name in estimates}
    return Explanation(call, reasons, *_request(backend), estimates)


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


def _request(backend: str) -> tuple[str, str]:
    """The backend that is asked for, ``"auto"`` for none, and by what."""
    if backend != "auto":
        return backend, "backend="
    if _default != "auto":
        return _default, "use_backend"
    name = os.environ.get("PEFTKERN_BACKEND", "auto")
    if name != "auto":
        get_backend(name)
    return name, "PEFTKERN_BACKEND"


def resolve(call: Call, backend: str = "auto") -> str:
    """The name of the backend that runs ``call``.

    A name other than ``"auto"`` comes from the argument, else from :func:`use_backend`, else from the environment
    variable ``PEFTKERN_BACKEND``; the first one given must be able to run the call.

    Raises:
        BackendUnavailable: listing every backend with its reasons.
        ValueError: for a name that is no backend.
    """
    requested, _ = _request(backend)
    if requested != "auto":
        if get_backend(requested).why_not(call):
            raise BackendUnavailable(f"backend={requested!r} cannot run {explain(call, backend)}")
        return requested
    for name in choose.order(call):
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
