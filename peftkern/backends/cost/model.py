# SPDX-License-Identifier: Apache-2.0
"""The order in which ``"auto"`` tries the backends: by the time that a model of each says a call takes.

A backend's work is a list of passes (:class:`Pass`): kernels, bytes moved, floating-point operations and whose kernel
does them. A pass takes ``kernels * launch + max(bytes / bandwidth, flops / rate)``. The rates of each GPU and CPU,
with their sources, are in ``rates.json``; :mod:`peftkern.tools.calibrate` measures this machine, and what it found
takes their place. :func:`rank` is a pure function of the call and the :class:`Machine`; whether a backend can run a
call is not asked here. The model does not know what is in a mask, a window's size or how long packed sequences are.

Times of a GPU are modelled until that GPU was measured. Bytes and operations per pass: ``D`` elements per row,
4 D per (query, key) pair forward; backward 2.5 times that in one pass, 3.5 times with dq and dk, dv apart
(Dao et al., FlashAttention, 2022).
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ... import native
from ...arguments import Call
from .. import concat, merge, triton
from ..torch_attention import VENDORS, Vendor
from ..torch_attention import choose as choose_vendor

RATES: dict[str, Any] = json.loads(Path(__file__).with_name("rates.json").read_text())

#: What decides between backends that are as fast, or unknown.
NAMES = ("triton", "merge", "concat", "cuda", "cpu", "reference")


class Machine(NamedTuple):
    """What a time depends on beside the call."""

    #: A row of the rates: "sm_90", "gfx942", or a CPU's instruction set.
    arch: str
    vendors: tuple[Vendor, ...] = tuple(VENDORS)
    #: Threads of a CPU.
    threads: int = 1
    #: The FlashAttention that serves torch's op, where one is registered: "FA3", "FA4".
    flash: str | None = None
    #: What was measured: per :func:`kind` of work (factor of the launches, factor of the rest).
    scales: tuple[tuple[str, tuple[float, float]], ...] = ()


class Estimate(NamedTuple):
    """How long a backend takes, and whether it was measured on this machine."""

    seconds: float
    measured: bool

    def __str__(self) -> str:
        unit, factor = ("ms", 1e3) if self.seconds >= 1e-3 else ("us", 1e6)
        return f"about {self.seconds * factor:.3g} {unit} ({'measured rates' if self.measured else 'modelled'})"


class Pass(NamedTuple):
    """Kernels that run one after another; ``engine`` names the row of rates, ``backward`` its direction."""

    engine: str
    kernels: float
    flops: float
    bytes: float
    backward: bool = False


class _Sizes(NamedTuple):
    """Of a prefix attention: bytes of q, of k and v, of the prefix once and per sample, of lse; pairs per head."""

    batch: int
    heads: int
    queries: int
    keys: int
    prefix: int
    head_dim: int
    group: int
    q: float
    kv: float
    prefix_once: float
    prefix_each: float
    lse: float
    element: int
    #: Of all samples and heads, times 4 D.
    seq_flops: float
    full_flops: float
    prefix_flops: float


#: Length of a packed sequence, which a call does not tell.
_PACKED = 512


def _sizes(call: Call) -> _Sizes:
    batch, heads, queries, head_dim = call.q_shape
    kv_heads, keys, prefix = call.kv_shape[1], call.kv_shape[2], call.prefix_shape[-2]
    bank = call.prefix_shape[0] if len(call.prefix_shape) == 4 else 1
    element, per_pair = call.dtype.itemsize, 4.0 * batch * heads * head_dim
    full = queries * keys
    if "cu_seqlens" in call.features:
        pairs = queries * min(keys, _PACKED) * (1 if "non-causal" in call.features else 0.5)
    else:
        pairs = full if "non-causal" in call.features else full - queries * (queries - 1) / 2
    return _Sizes(
        batch, heads, queries, keys, prefix, head_dim, heads // max(1, kv_heads),
        q=float(batch * heads * queries * head_dim * element), kv=2.0 * batch * kv_heads * keys * head_dim * element,
        prefix_once=2.0 * bank * kv_heads * prefix * head_dim * element,
        prefix_each=2.0 * batch * kv_heads * prefix * head_dim * element, lse=4.0 * batch * heads * queries,
        element=element, seq_flops=per_pair * pairs, full_flops=per_pair * full,
        prefix_flops=per_pair * queries * prefix,
    )  # fmt: skip


def passes(call: Call, backend: str, machine: Machine) -> list[Pass] | None:
    """What ``backend`` does for ``call``, backward included if one will follow; None where no rate is known."""
    on_cpu = call.device.type == "cpu"
    if on_cpu != (backend == "cpu") and backend != "reference":
        return None
    if call.op == "soft_prompt_embedding":
        return _embedding(call, backend)
    if backend == "reference":
        return _reference(call)
    work = {"triton": _fused, "cuda": _fused, "cpu": _fused, "merge": _merge, "concat": _concat}[backend]
    return work(call, backend, machine)


def _embedding(call: Call, backend: str) -> list[Pass]:
    (batch, seq), width, prefix = call.q_shape, call.kv_shape[-1], call.prefix_shape[-2]
    moved = 2.0 * batch * (seq + prefix) * width * call.dtype.itemsize
    copies = 3 if backend == "reference" else 1
    return [Pass(backend, copies * (1 + call.needs_grad), 0.0, copies * moved * (1 + call.needs_grad))]


def _reference(call: Call) -> list[Pass]:
    """Scores of all pairs in fp32, some forty times through memory, twice as often in backward."""
    x = _sizes(call)
    scores = 4.0 * x.batch * x.heads * x.queries * (x.keys + x.prefix)
    flops, keys = x.full_flops + x.prefix_flops, 4 / x.element * (x.kv + x.prefix_once)
    work = [Pass("reference", 1, flops, 40 * scores + 4 * x.q + 3 * keys)]
    if call.needs_grad:
        work.append(Pass("reference", 2, 3.5 * flops, 80 * scores + 20 * keys, True))
    return work


def _fused(call: Call, backend: str, machine: Machine) -> list[Pass]:
    x = _sizes(call)
    flops, once = x.seq_flops + x.prefix_flops, x.kv + x.prefix_once
    rows = x.queries * x.group
    if backend == "triton":
        kernels = 3 if 1 <= x.queries <= 16 and x.keys + x.prefix >= 1024 else 1
    else:
        kernels = 2 if backend == "cuda" and x.batch > 1 and rows <= 32 and x.prefix else 1
    work = [Pass(backend, kernels, flops, 2 * x.q + x.lse + once)]
    if call.needs_grad:
        launches = 2 if backend == "cpu" else 6
        work.append(Pass(backend, launches, (2.5 if backend == "cpu" else 3.5) * flops, 9 * x.q + 3 * once, True))
        if backend == "triton" and _exact(call):
            work.append(Pass(backend, 1, flops, 2 * x.q + once))
    return work


def _exact(call: Call) -> bool:
    """Whether a backward computes the softmax twice: see ``merge.needs_exact_softmax``."""
    return not {"gate", "sinks", "bias", "prefix_bias"}.isdisjoint(call.features)


def _vendor(call: Call, machine: Machine, features: tuple[str, ...], keys: int) -> tuple[Vendor, bool] | None:
    """The kernel that takes a call over ``keys`` keys, and whether it needs a dense mask."""
    vendor, _ = choose_vendor(call, features, keys, machine.vendors)
    if vendor is None or not merge.NO_VENDOR_HAS.keys().isdisjoint(features):
        return None
    queries = call.q_shape[2]
    shifted = vendor.top_left and "non-causal" not in features and queries not in (1, keys)
    return vendor, shifted or any(name not in vendor.native for name in features)


def _vendor_passes(
    call: Call, x: _Sizes, machine: Machine, found: tuple[Vendor, bool], prefix: bool
) -> tuple[list[Pass], list[Pass]]:
    """(forward, backward) over the sequence's keys, or the prefix's as well."""
    vendor, masked = found
    kv = x.kv + prefix * x.prefix_each
    flops = (x.full_flops if masked else x.seq_flops) + prefix * x.prefix_flops
    mask = 0.0
    if masked:  # built, read once per head
        heads = x.heads if "bias" in call.features else 1
        mask = float(x.batch * heads * x.queries * (x.keys + prefix * x.prefix) * x.element)
    repeat = 0.0 if vendor.grouped or x.group == 1 else (1 + x.group) * kv
    engine = machine.flash if vendor.name == "flash" and machine.flash else vendor.name
    laying = [Pass(engine, 6 * masked + 2 * (repeat > 0), 0.0, 4 * mask + repeat)]
    read = 0.0 if vendor.grouped else (x.group - 1) * kv
    forward = [Pass(engine, 1, flops, 2 * x.q + x.lse + kv + read + mask), *laying]
    backward = [Pass(engine, 3, 2.5 * flops, 4 * x.q + 2 * (kv + read) + mask, True), *laying]
    return forward, backward


def _merge(call: Call, backend: str, machine: Machine) -> list[Pass] | None:
    x = _sizes(call)
    found = _vendor(call, machine, merge.sequence_features(call.features), x.keys)
    if found is None:
        return None
    forward, backward = _vendor_passes(call, x, machine, found, prefix=False)
    forward.append(Pass("triton", 1, x.prefix_flops, 3 * x.q + 2 * x.lse + x.prefix_once))
    if not call.needs_grad:
        return forward
    if _exact(call):
        return forward + _fused(call, "triton", machine)[1:]
    one_tile = x.prefix * x.head_dim <= 8192
    products, moved = (2.5, 5) if one_tile else (3.5, 7)
    backward.append(Pass("triton", 4 if one_tile else 5, products * x.prefix_flops, moved * x.q + 2 * x.lse, True))
    return forward + backward


def _concat(call: Call, backend: str, machine: Machine) -> list[Pass] | None:
    x = _sizes(call)
    found = _vendor(call, machine, concat.joined_features(call.features), x.keys + x.prefix)
    if found is None:
        return None
    forward, backward = _vendor_passes(call, x, machine, found, prefix=True)
    laying = Pass("triton", 1, 0.0, 2 * x.kv + x.prefix_each + x.prefix_once)
    forward.append(laying)
    if "sinks" in call.features:
        forward.append(Pass("triton", 1, 0.0, 2 * x.q + 2 * x.lse))
    if not call.needs_grad:
        return forward
    if _exact(call):
        return forward + _fused(call, "triton", machine)[1:]
    parts = Pass("triton", 4, 0.0, 2 * x.kv + x.prefix_each + 2 * x.prefix_once)  # dk, dv laid out; the prefix's sums
    return [*forward, laying, *backward, parts]


def kind(call: Call, backend: str) -> str:
    """What calls share a measured factor.

    >>> shape = (1, 2, 1, 64)
    >>> kind(Call("prefix_attention", torch.device("cpu"), torch.half, torch.half, shape, shape, shape[1:]), "cpu")
    'cpu prefix_attention float16 decode'
    """
    if call.needs_grad:
        what = "training"
    else:
        what = "decode" if call.op == "prefix_attention" and call.q_shape[2] <= 16 else "forward"
    return f"{backend} {call.op} {str(call.dtype).removeprefix('torch.')} {what}"


def _time(part: Pass, call: Call, machine: Machine) -> tuple[float, float] | None:
    """(seconds of launches, seconds of work)."""
    if call.device.type == "cpu":
        rates = RATES["cpu"].get(machine.arch, RATES["cpu"]["portable"])
        launch, bandwidth = rates["launch"][part.engine], rates["bandwidth"] * machine.threads
        own = rates["fp32"] if call.dtype == torch.float32 else rates["half"]
        flops = (rates["matmul"] if part.engine == "reference" else own) * 1e12 * machine.threads
    else:
        rates = RATES["gpu"].get(machine.arch)
        if rates is None or (part.engine == "cuda" and "cuda" not in rates["flops"]):
            return None
        launch, bandwidth, flops = rates["launch"], rates["bandwidth"], _flops(part, call, machine.arch)
        if part.engine == "reference":
            launch *= 60
    return part.kernels * launch, max(part.bytes / bandwidth, part.flops / flops)


def _flops(part: Pass, call: Call, arch: str) -> float:
    rates = RATES["gpu"][arch]
    queries = call.q_shape[2] if call.op == "prefix_attention" else 1
    blocks = call.q_shape[0] * call.q_shape[1] * -(-queries // 128)
    busy = min(1.0, max(blocks, 1) / rates["processors"])
    if call.dtype.itemsize > 2 or part.engine == "reference":
        fp32 = rates["fp32"]
        return float(fp32.get(part.engine, fp32["triton"]) * 1e12 * (1.0 if part.engine == "reference" else busy))
    engine = part.engine if part.engine in rates["flops"] else "triton"
    top, half = rates["flops"][engine]["backward" if part.backward else "forward"]
    if queries <= 16:  # keys are cut into splits, so that all processors work
        return float(top * 1e12 / 4)
    return float(top * 1e12 * queries / (queries + half) * busy)


def model(call: Call, backend: str, machine: Machine) -> tuple[float, float] | None:
    """(seconds of launches, seconds of work) by the rates of ``rates.json``; None where there are none."""
    parts = passes(call, backend, machine)
    if parts is None:
        return None
    launches = work = 0.0
    for part in parts:
        times = _time(part, call, machine)
        if times is None:
            return None
        launches, work = launches + times[0], work + times[1]
    return launches, work


def estimate(call: Call, backend: str, machine: Machine) -> Estimate | None:
    """How long ``backend`` takes for ``call`` on ``machine``; None where that is not known."""
    times = model(call, backend, machine)
    if times is None:
        return None
    scale = dict(machine.scales).get(kind(call, backend))
    if scale is None:
        return Estimate(sum(times), False)
    return Estimate(scale[0] * times[0] + scale[1] * times[1], True)


def rank(call: Call, machine: Machine) -> dict[str, Estimate | None]:
    """Backends, the fastest first; those of which nothing is known behind them.

    >>> shape = (4, 32, 2048, 128)
    >>> call = Call("prefix_attention", torch.device("cuda"), torch.half, torch.half, shape, shape, (32, 64, 128))
    >>> list(rank(call, Machine("sm_90", vendors=()))) # without another library's kernels
    ['triton', 'cuda', 'reference', 'merge', 'concat', 'cpu']
    """
    estimates = {name: estimate(call, name, machine) for name in NAMES}
    if call.device.type != "cpu" and machine.arch not in RATES["gpu"]:
        return estimates  # nothing to go by: the order of the table

    def time(name: str) -> float:
        found = estimates[name]
        return math.inf if found is None else found.seconds

    return {name: estimates[name] for name in sorted(NAMES, key=time)}


@functools.lru_cache(maxsize=16)
def machine_of(device: torch.device, dtype: torch.dtype, flash: str | None, threads: int) -> Machine:
    """The machine behind ``device``, with what was measured on it."""
    from ...tools import calibrate

    arch = ""
    if device.type == "cpu":
        arch = "portable" if native.cpu.MISSING or dtype not in native.cpu.DTYPES else native.cpu.default_isa(dtype)
    elif device.type == "cuda" and torch.cuda.is_available():
        arch = triton.architecture(device)
    return Machine(arch, tuple(VENDORS), threads, flash, calibrate.load(device))


def registered_flash() -> str | None:
    """The FlashAttention that is registered in the place of torch's own; torch has that since 2.10."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current() if current is not None else None


@functools.lru_cache(maxsize=4096)
def _ranked(call: Call, flash: str | None, threads: int) -> dict[str, Estimate | None]:
    return rank(call, machine_of(call.device, call.dtype, flash, threads))


def estimates(call: Call) -> dict[str, Estimate | None]:
    """:func:`rank` on this process's machine, remembered per call."""
    if call.device.type == "cpu":
        return _ranked(call, None, torch.get_num_threads())
    return _ranked(call, registered_flash(), 1)


def order(call: Call) -> tuple[str, ...]:
    """Names of all backends, in the order in which ``"auto"`` tries them.

    While torch compiles, sizes that are not known take typical values, so that no guard is put on them.
    """
    if torch.compiler.is_compiling():
        shapes = [tuple(map(_known, shape, _TYPICAL)) for shape in (call.q_shape, call.kv_shape)]
        prefix = tuple(map(_known, call.prefix_shape, _TYPICAL[-len(call.prefix_shape) :]))
        return _constant_order(
            call.op, call.device, call.dtype, call.prefix_dtype, *shapes, prefix, call.features, call.needs_grad
        )
    try:
        return tuple(estimates(call))
    except TypeError:  # symbolic sizes outside of the compiler have no hash
        shapes = [tuple(n if type(n) is int else t for n, t in zip(shape, _TYPICAL, strict=False))
                  for shape in (call.q_shape, call.kv_shape)]  # fmt: skip
        return tuple(estimates(replace(call, q_shape=shapes[0], kv_shape=shapes[1])))


_TYPICAL = (8, 32, 1024, 128)


def _known(size: int, typical: int) -> int:
    return size if torch.fx.experimental.symbolic_shapes.has_static_value(size) else typical


def _constant_order(*fields: Any) -> tuple[str, ...]:
    return tuple(estimates(Call(*fields)))


# What torch.compiler.assume_constant_result does, without importing the compiler: the model runs, untraced.
_constant_order._dynamo_marked_constant = True  # type: ignore[attr-defined]


def forget() -> None:
    """Read the measured rates again."""
    machine_of.cache_clear()
    _ranked.cache_clear()
