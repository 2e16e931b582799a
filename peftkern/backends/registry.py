# SPDX-License-Identifier: Apache-2.0
"""The choice of a plan: an explicit name runs or raises, ``"auto"`` takes the cheapest that can run the call."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

from ..argument_types import checks_arguments
from ..arguments import Call
from ..callers import caller_level
from . import composite
from .base import Backend, OnePlanBackend, Plan, Refusal
from .concat import ConcatBackend
from .cost.model import Estimate, Machine, Pass, estimate
from .cpu import CpuBackend
from .cuda import CudaBackend
from .machine import machine_of, registered_flash
from .merge import MergeBackend
from .reference import ReferenceBackend
from .triton import TritonBackend

_Cached = TypeVar("_Cached", bound=Callable[..., Any])

__all__ = [
    "BACKENDS", "BackendUnavailable", "Explanation", "available_backends", "check_plan", "explain", "forget",
    "get_backend", "plan_named", "rank", "resolve", "runnable_plans", "use_backend",
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

    A name other than ``"auto"`` comes from the argument, else from :func:`use_backend`, else from the environment
    variable ``PEFTKERN_BACKEND``. The first one given must be able to run the call. It is the name of a backend, of
    whose plans the cheapest is taken, or that of a plan.

    Raises:
        BackendUnavailable: listing every backend with its reasons.
        ValueError: if it is not the name of a backend or a plan.
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
def _resolved(requested: str, call: Call, *state: Any) -> str:
    """The plan's name, or :data:`_UNAVAILABLE` and the reasons of each backend."""
    name = next((name for name in _ordered(call, *state) if _matches(name, requested)), None)
    if name is not None:
        if requested == "auto" and name == "reference" and call.device.type != "cpu":
            _warn_slow(call.device.type)
        return name
    what = "no backend can run" if requested == "auto" else f"backend={requested!r} cannot run"
    return f"{_UNAVAILABLE}{what} {explain(call, requested)}"


def _matches(plan: str, requested: str) -> bool:
    """Whether the plan of this name is what was requested: anything, a backend, or this plan."""
    return requested in ("auto", plan, plan.partition("/")[0])


def _state(device: torch.device) -> tuple[str | None, int, bool]:
    """The state of torch that a choice depends on.

    It is the registered FlashAttention, the number of CPU threads, and whether only deterministic algorithms may run.
    """
    if device.type == "cpu":
        return None, torch.get_num_threads(), False
    return registered_flash(), 1, torch.are_deterministic_algorithms_enabled()


def check_plan(name: str, call: Call) -> None:
    """Raise unless the plan called ``name`` is for calls like this one: its device, its dtypes, its head dims.

    Raises:
        BackendUnavailable: if it is not.
        ValueError: if it is not the name of a plan.
    """
    plan = plan_named(name)
    backend = BACKENDS[plan.name.partition("/")[0]]
    refused = backend.plans(call).get(backend.name)
    # What torch's kernels refuse depends on lengths too, and under torch.compile they were chosen for typical ones.
    if isinstance(refused, Refusal) and (refused.other_device or isinstance(backend, OnePlanBackend)):
        raise BackendUnavailable(f"plan={name!r} cannot run {call}: {'; '.join(refused.reasons)}")


def rank(call: Call, machine: Machine) -> dict[str, Estimate | None]:
    """The time of each plan by its name, fastest first. Whether the plans can run the call is not asked.

    Those whose time is unknown come last. A backend whose plans have no known cost stands there with its own name.

    >>> shape = (4, 32, 2048, 128)
    >>> call = Call("prefix_attention", torch.device("cuda"), torch.half, torch.half, shape, shape, (32, 64, 128))
    >>> list(rank(call, Machine("sm_90")))  # without the attention kernels of other libraries
    ['triton', 'cuda', 'reference', 'merge', 'concat', 'cpu']
    """
    times = {plan: estimate(passes, call, plan, machine) for plan, passes in costs(call, machine).items()}
    return {plan: times[plan] for plan in sorted(times, key=lambda plan: _seconds(times[plan]))}


def costs(call: Call, machine: Machine) -> dict[str, list[Pass] | None]:
    """The passes of each plan by its name. A backend without any stands there with its own name, and None."""
    found: dict[str, list[Pass] | None] = {}
    for name, backend in BACKENDS.items():
        passes: dict[str, Any] = {**backend.costs(call, machine)}
        found |= passes or {name: None}
    return found


def _seconds(time: Estimate | None) -> float:
    return math.inf if time is None else time.seconds


@functools.lru_cache(maxsize=4096)
def _ranked(call: Call, flash: str | None, threads: int, deterministic: bool) -> dict[str, Estimate | None]:
    return rank(call, machine_of(call.device, call.dtype, flash, threads))


def estimates(call: Call) -> dict[str, Estimate | None]:
    """:func:`rank` on this machine, cached."""
    return _ranked(call, *_state(call.device))


@functools.lru_cache(maxsize=1024)
def _ordered(call: Call, *state: Any) -> dict[str, Estimate | None]:
    """The plans that can run ``call`` on this machine with their times, fastest first."""
    times = _ranked(call, *state)
    names = [
        name for backend in BACKENDS.values() for name, plan in backend.plans(call).items() if isinstance(plan, Plan)
    ]
    return {name: times.get(name) for name in sorted(names, key=lambda name: _seconds(times.get(name)))}


def runnable_plans(call: Call) -> dict[str, Estimate | None]:
    """The plans that can run ``call`` on this machine by name with their times, fastest first.

    Each name may be passed as ``backend``.
    """
    return _ordered(call, *_state(call.device))


def choice(backend: str, on_cpu: bool) -> tuple[str, object]:
    """What a plan depends on besides the call: the requested backend, and the state of torch (:func:`_state`)."""
    requested = backend if backend == "auto" and not _overrides and not _in_environment() else _request(backend)[0]
    if on_cpu:
        return requested, torch.get_num_threads()
    return requested, (registered_flash(), torch.are_deterministic_algorithms_enabled())


_caches: list[Any] = [_ranked, _ordered, _resolved, plan_named, composite.successors]


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
        call.features, call.needs_grad, call.own_value_dim and _known(call.own_value_dim, _TYPICAL_QUERIES[-1]),
    )  # fmt: skip


def _known(size: int, typical: int) -> int:
    return size if torch.fx.experimental.symbolic_shapes.has_static_value(size) else typical


def _with_plain_sizes(call: Call) -> Call:
    def plain(shape: tuple[int, ...], typical: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n if type(n) is int else t for n, t in zip(shape, typical, strict=False))

    return replace(
        call, q_shape=plain(call.q_shape, _TYPICAL_QUERIES), kv_shape=plain(call.kv_shape, _TYPICAL_KEYS),
        prefix_shape=plain(call.prefix_shape, _TYPICAL_QUERIES[-len(call.prefix_shape) :]),
        own_value_dim=call.own_value_dim and plain((call.own_value_dim,), _TYPICAL_QUERIES[-1:])[0],
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
    #: Per backend, fastest first, its fastest plan or its reasons.
    plans: dict[str, Plan | Refusal]
    #: The requested backend or plan, or "auto", and what requested it.
    requested: str = "auto"
    by: str = ""
    #: The plans that can run the call by name, fastest first, each with its time if that is known.
    times: dict[str, Estimate | None] = field(default_factory=dict)
    #: Why the requested plan cannot run the call.
    refused: Refusal | None = None

    @property
    def reasons(self) -> dict[str, list[str]]:
        """Per backend the reasons why it cannot run the call; empty if it can."""
        return {name: list(plan.reasons) if isinstance(plan, Refusal) else [] for name, plan in self.plans.items()}

    @property
    def chosen(self) -> str | None:
        """The backend that runs the call, or None."""
        return None if self.chosen_plan is None else self.chosen_plan.partition("/")[0]

    @property
    def chosen_plan(self) -> str | None:
        """The name of the plan that runs the call, or None."""
        return next((name for name in self.times if _matches(name, self.requested)), None)

    def __str__(self) -> str:
        lines, others = [f"{self.call.op}: {self.call}"], [f"for devices other than {self.call.device.type}:"]
        if "gathered prefixes" in self.call.features:
            lines.append(
                "  every backend but reference and cpu copies the prefixes into a bank first, which the times leave "
                "out"
            )
        for name, plan in self.plans.items():
            group = others if isinstance(plan, Refusal) and plan.other_device else lines
            group.append(f"  {name}: {self._line(name, plan)}")
            shown = plan.name if isinstance(plan, Plan) else ""
            group += [
                f"    {other}{self._mark(other)}{_suffix(time)}"
                for other, time in self.times.items()
                if other.partition("/")[0] == name and other != shown
            ]
        if self.refused:
            lines.append(f"  {self.requested}: {'; '.join(self.refused.reasons)}")
        return "\n".join(lines + (others if len(others) > 1 else []))

    def _line(self, name: str, plan: Plan | Refusal) -> str:
        if isinstance(plan, Refusal):
            return "; ".join(plan.reasons)
        kernels = f" ({plan.kernels})" if plan.kernels else ""
        return f"ok{kernels}{self._mark(plan.name)}{_suffix(self.times.get(plan.name))}"

    def _mark(self, plan: str) -> str:
        if plan != self.chosen_plan:
            return ""
        return ", chosen by 'auto'" if self.requested == "auto" else f", requested by {self.by}"


def _suffix(time: Estimate | None) -> str:
    return f", {time}" if time else ""


def explain(call: Call, backend: str = "auto") -> Explanation:
    """Why each backend can or cannot run ``call``, and which one does. The arguments are those of :func:`resolve`."""
    requested, by = _request(backend)
    every = {name: backend.plans(call) for name, backend in BACKENDS.items()}
    times = runnable_plans(call)
    plans: dict[str, Plan | Refusal] = {}
    for plan in times:
        name = plan.partition("/")[0]
        plans.setdefault(name, every[name][plan])
    plans |= {name: next(iter(found.values())) for name, found in every.items() if name not in plans}
    refused = None
    if "/" in requested and requested not in times:
        found = every[requested.partition("/")[0]].get(requested)
        refused = found if isinstance(found, Refusal) else Refusal(("this plan is not for such a call",))
    return Explanation(call, plans, requested, by, times, refused)


@checks_arguments()
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

    ``name`` is that of a backend, or of a plan (:func:`runnable_plans`).

    The setting holds for all threads of the process. A backward pass runs on the backend of its forward.

    >>> import torch, peftkern
    >>> q, prefix = torch.randn(1, 2, 3, 8), torch.randn(2, 4, 8)
    >>> with peftkern.use_backend("reference"):
    ...     out = peftkern.prefix_attention(q, q, q, prefix, prefix)
    """
    _check_name(name, "name")
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
    _check_name(backend, by)
    return backend, by


def _check_name(name: str, by: str) -> None:
    """Raise ValueError if ``name`` is neither ``"auto"`` nor that of a backend or a plan."""
    if not isinstance(name, str):
        raise ValueError(f"{by}: expected 'auto' or one of {list(BACKENDS)}, got {type(name).__name__}")
    if name != "auto":
        get_backend(name.partition("/")[0], by)
        if "/" in name:
            plan_named(name)


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
            stacklevel=caller_level(),
        )
