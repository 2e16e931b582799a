# SPDX-License-Identifier: Apache-2.0
"""The choice of a backend: an explicit name runs or raises, ``"auto"`` takes the cheapest that can run the call."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from ..arguments import Call
from .base import Backend, Plan, Refusal
from .concat import ConcatBackend
from .cost.model import RATES, Estimate, Machine, estimate
from .cpu import CpuBackend
from .cuda import CudaBackend
from .machine import machine_of, registered_flash
from .merge import MergeBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

_Cached = TypeVar("_Cached", bound=Callable[..., Any])

__all__ = [
    "BACKENDS", "BackendUnavailable", "Explanation", "available_backends", "explain", "forget", "get_backend",
    "plan_named", "rank", "resolve", "use_backend",
]  # fmt: skip

#: Every backend. The order breaks ties between backends that are equally fast, or whose time is unknown.
BACKENDS: dict[str, Backend] = {
    backend.name: backend
    for backend in (
        TritonBackend(),
        MergeBackend(),
        ConcatBackend(),
        CudaBackend(),
        CpuBackend(),
        ReferenceBackend(),
    )
}


class BackendUnavailable(RuntimeError):
    """No backend, or not the requested one, can run a call. The message lists the reasons of each."""


def get_backend(name: str, by: str = "backend") -> Backend:
    """The backend called ``name``.

    Raises:
        ValueError: if there is no such backend. The message names what requested it, ``by``.
    """
    if name not in BACKENDS:
        raise ValueError(f"{by}: expected 'auto' or one of {list(BACKENDS)}, got {name!r}")
    return BACKENDS[name]


@functools.lru_cache(maxsize=64)
def plan_named(name: str) -> Plan:
    """The plan with a :attr:`~peftkern.backends.base.Plan.name` that :func:`resolve` has returned, in any process.

    Raises:
        ValueError: if it is not the name of a plan.
    """
    backend, *choices = name.split("/")
    plan = get_backend(backend, "plan").restore(tuple(choices))
    if plan.name != name:
        raise ValueError(f"plan: expected {plan.name!r}, got {name!r}")
    return plan


def resolve(call: Call, backend: str = "auto") -> str:
    """The name of the plan that runs ``call``.

    A backend other than ``"auto"`` comes from the argument, else from :func:`use_backend`, else from the environment
    variable ``PEFTKERN_BACKEND``. The first one given must be able to run the call.

    Raises:
        BackendUnavailable: listing every backend with its reasons.
        ValueError: if the name is not that of a backend.
    """
    requested, _ = _request(backend)
    if torch.compiler.is_compiling():
        fields = _with_known_sizes(call)
        plan = _constant_plan(requested, *fields)
    else:
        try:
            plan = _resolved(requested, call, *_state(call.device))
        except TypeError:  # symbolic sizes outside of torch.compile have no hash
            plan = _resolved(requested, _with_plain_sizes(call), *_state(call.device))
    if plan.startswith(_UNAVAILABLE):
        raise BackendUnavailable(plan.removeprefix(_UNAVAILABLE))
    return plan


#: Starts the message that takes the place of a plan's name. torch.compile can store a string, but no exception.
_UNAVAILABLE = "unavailable: "


@functools.lru_cache(maxsize=4096)
def _resolved(requested: str, call: Call, flash: str | None, threads: int) -> str:
    """The plan's name, or :data:`_UNAVAILABLE` and the reasons of each backend."""
    names = _ranked(call, flash, threads) if requested == "auto" else [requested]
    for name in names:
        plan = get_backend(name).plan(call)
        if isinstance(plan, Plan):
            if requested == "auto" and name == "reference" and call.device.type != "cpu":
                _warn_slow(call.device.type)
            return plan.name
    what = "no backend can run" if requested == "auto" else f"backend={requested!r} cannot run"
    return f"{_UNAVAILABLE}{what} {explain(call, requested)}"


def _state(device: torch.device) -> tuple[str | None, int]:
    """The state of torch that a choice depends on: the registered FlashAttention and the number of CPU threads."""
    return (None, torch.get_num_threads()) if device.type == "cpu" else (registered_flash(), 1)


def rank(call: Call, machine: Machine) -> dict[str, Estimate | None]:
    """The backends, fastest first; those whose time is unknown come last. Whether they can run the call is not asked.

    >>> shape = (4, 32, 2048, 128)
    >>> call = Call("prefix_attention", torch.device("cuda"), torch.half, torch.half, shape, shape, (32, 64, 128))
    >>> list(rank(call, Machine("sm_90")))  # without the attention kernels of other libraries
    ['triton', 'cuda', 'reference', 'merge', 'concat', 'cpu']
    """
    estimates = {name: estimate_of(call, name, machine) for name in BACKENDS}
    if call.device.type != "cpu" and machine.arch not in RATES["gpu"]:
        return estimates  # no rates: keep the order of the table

    def seconds(name: str) -> float:
        found = estimates[name]
        return math.inf if found is None else found.seconds

    return {name: estimates[name] for name in sorted(BACKENDS, key=seconds)}


def estimate_of(call: Call, backend: str, machine: Machine) -> Estimate | None:
    """The time that a backend takes for ``call`` on ``machine``, or None if it is unknown."""
    return estimate(BACKENDS[backend].cost(call, machine), call, backend, machine)


@functools.lru_cache(maxsize=4096)
def _ranked(call: Call, flash: str | None, threads: int) -> dict[str, Estimate | None]:
    return rank(call, machine_of(call.device, call.dtype, flash, threads))


def estimates(call: Call) -> dict[str, Estimate | None]:
    """:func:`rank` on this machine, cached."""
    return _ranked(call, *_state(call.device))


def choice(backend: str, on_cpu: bool) -> tuple[str, str | int | None]:
    """What a plan depends on besides the call: the requested backend and the state of torch."""
    requested = backend if backend == "auto" and not _overrides and not _in_environment() else _request(backend)[0]
    return requested, torch.get_num_threads() if on_cpu else registered_flash()


_caches: list[Any] = [_ranked, _resolved, plan_named]


def forgettable(cached: _Cached) -> _Cached:
    """Register a ``functools.lru_cache`` of plans, which :func:`forget` then clears."""
    _caches.append(cached)
    return cached


def forget() -> None:
    """Drop cached plans and estimates, for example after new rates have been measured."""
    for cached in (machine_of, *_caches):
        cached.cache_clear()


# Sizes of calls under torch.compile. Symbolic sizes are replaced by typical ones, so that the choice puts no guard on
# them. T differs from S then, so that the plan also serves calls with a KV cache.
_TYPICAL_QUERIES = (8, 32, 1024, 128)
_TYPICAL_KEYS = (8, 32, 2048, 128)


def _with_known_sizes(call: Call) -> tuple[Any, ...]:
    """The fields of ``call`` as constants for :func:`_constant_plan`."""
    prefix_typical = _TYPICAL_QUERIES[-len(call.prefix_shape) :]
    return (
        call.op, call.device, call.dtype, call.prefix_dtype, tuple(map(_known, call.q_shape, _TYPICAL_QUERIES)),
        tuple(map(_known, call.kv_shape, _TYPICAL_KEYS)), tuple(map(_known, call.prefix_shape, prefix_typical)),
        call.features, call.needs_grad,
    )  # fmt: skip


def _known(size: int, typical: int) -> int:
    return size if torch.fx.experimental.symbolic_shapes.has_static_value(size) else typical


def _with_plain_sizes(call: Call) -> Call:
    def plain(shape: tuple[int, ...], typical: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n if type(n) is int else t for n, t in zip(shape, typical, strict=False))

    return replace(
        call, q_shape=plain(call.q_shape, _TYPICAL_QUERIES), kv_shape=plain(call.kv_shape, _TYPICAL_KEYS),
        prefix_shape=plain(call.prefix_shape, _TYPICAL_QUERIES[-len(call.prefix_shape) :]),
    )  # fmt: skip


def _constant_plan(requested: str, *fields: Any) -> str:
    call = Call(*fields)
    return _resolved(requested, call, *_state(call.device))


# What torch.compiler.assume_constant_result does, without importing the compiler: the choice runs, untraced.
_constant_plan._dynamo_marked_constant = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Explanation:
    """Which backend runs a call, and why the others cannot or do not. Printing it gives a table."""

    call: Call
    #: Per backend, fastest first, its plan or its reasons.
    plans: dict[str, Plan | Refusal]
    #: The requested backend, or "auto", and what requested it.
    requested: str = "auto"
    by: str = ""
    #: The time of each backend, if known.
    estimates: dict[str, Estimate | None] = field(default_factory=dict)

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Per backend the reasons why it cannot run the call; empty if it can."""
        return {name: list(plan.reasons) if isinstance(plan, Refusal) else [] for name, plan in self.plans.items()}

    @property
    def chosen(self) -> str | None:
        """The backend that runs the call, or None."""
        names = self.plans if self.requested == "auto" else [self.requested]
        return next((name for name in names if isinstance(self.plans[name], Plan)), None)

    def __str__(self) -> str:
        lines, others = [f"{self.call.op}: {self.call}"], [f"for devices other than {self.call.device.type}:"]
        for name, plan in self.plans.items():
            group = others if isinstance(plan, Refusal) and plan.other_device else lines
            group.append(f"  {name}: {self._line(name, plan)}")
        return "\n".join(lines + (others if len(others) > 1 else []))

    def _line(self, name: str, plan: Plan | Refusal) -> str:
        if isinstance(plan, Refusal):
            return "; ".join(plan.reasons)
        kernels = f" ({plan.kernels})" if plan.kernels else ""
        chosen = ""
        if name == self.chosen:
            chosen = ", chosen by 'auto'" if self.requested == "auto" else f", requested by {self.by}"
        time = self.estimates.get(name)
        return f"ok{kernels}{chosen}{f', {time}' if time else ''}"


def explain(call: Call, backend: str = "auto") -> Explanation:
    """Why each backend can or cannot run ``call``, and which one does. The arguments are those of :func:`resolve`."""
    times = estimates(call)
    return Explanation(call, {name: get_backend(name).plan(call) for name in times}, *_request(backend), times)


def available_backends(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """Names of the backends that can run a plain call on ``device``, those that ``"auto"`` prefers first."""
    shape = (1, 1, 1, 64)
    call = Call("prefix_attention", torch.device(device), dtype, dtype, shape, shape, shape[1:])
    return tuple(name for name, plan in explain(call).plans.items() if isinstance(plan, Plan))


# The overrides hold for the whole process rather than for a thread: autograd recomputes checkpointed layers in other
# threads, and they must resolve to the backend of the first pass.
# Blocks of several threads may overlap: the last one that was entered and has not ended counts.
_overrides: list[list[str]] = []


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the block, calls with ``backend="auto"`` run on ``name``, or raise :class:`BackendUnavailable`.

    The setting holds for all threads of the process. A backward pass runs on the backend of its forward.

    >>> import torch, peftkern
    >>> q, prefix = torch.randn(1, 2, 3, 8), torch.randn(2, 4, 8)
    >>> with peftkern.use_backend("reference"):
    ...     out = peftkern.prefix_attention(q, q, q, prefix, prefix)
    """
    if name != "auto":
        get_backend(name, "use_backend")
    override = [name]
    _overrides.append(override)
    try:
        yield
    finally:
        _overrides[:] = [other for other in _overrides if other is not override]


def _request(backend: str) -> tuple[str, str]:
    """The requested backend, or ``"auto"``, and what requested it."""
    by = "backend"
    if backend == "auto" and _overrides:
        backend, by = _overrides[-1][0], "use_backend"
    if backend == "auto":
        backend, by = os.environ.get("PEFTKERN_BACKEND", "auto"), "PEFTKERN_BACKEND"
    if backend != "auto":
        get_backend(backend, by)
    return backend, by


def _in_environment() -> bool:
    """Whether ``PEFTKERN_BACKEND`` is set. ``os.environ`` encodes a name and raises inside before it says no."""
    return _ENCODED_NAME in _ENVIRONMENT


try:
    _ENVIRONMENT: Any = os.environ._data  # type: ignore[attr-defined]
    _ENCODED_NAME: Any = os.environ.encodekey("PEFTKERN_BACKEND")
except AttributeError:
    _ENVIRONMENT, _ENCODED_NAME = os.environ, "PEFTKERN_BACKEND"


_warned: set[str] = set()


def _warn_slow(device_type: str) -> None:
    if device_type not in _warned:
        _warned.add(device_type)
        warnings.warn(
            f"peftkern runs its eager reference on {device_type}, which is correct but slow. `peftkern doctor` lists "
            "what the other backends need.",
            stacklevel=_caller_level(),
        )


def _caller_level() -> int:
    """The ``stacklevel`` of the first frame outside of this package, for a warning in the calling function."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("peftkern"):
        level, frame = level + 1, frame.f_back
    return level
