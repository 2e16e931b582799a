# SPDX-License-Identifier: Apache-2.0
"""The cost model behind ``"auto"``: the time of a list of passes over memory on a machine.

Each backend describes its work for a call as a list of :class:`Pass`: the number of kernels, the bytes they move,
their floating-point operations, and whose kernels they are. A pass takes
``kernels * launch + max(bytes / bandwidth, flops / rate)``. ``rates.json`` holds the rates of each GPU and CPU, with
their sources. Factors measured on this machine (:mod:`.measured`) correct them. The times of a GPU are modelled until
that GPU has been measured.

The number of operations: 2 (D + D_v) per (query, key) pair forward; backward 2.5 times that in one
pass, or 3.5 times if dq and (dk, dv) are computed separately (Dao et al., FlashAttention, 2022). The model does
not know the contents of a mask, the size of a window or the lengths of packed sequences.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...arguments import Call

RATES: dict[str, Any] = json.loads(Path(__file__).with_name("rates.json").read_text())


class Machine(NamedTuple):
    """The machine properties behind an estimate."""

    #: A row of the rates: "sm_90", "gfx942", or the instruction set of a CPU.
    arch: str
    #: Names of the attention kernels of torch and of packages that it has.
    attention_kernels: tuple[str, ...] = ()
    #: Number of CPU threads.
    threads: int = 1
    #: The FlashAttention that replaces torch's own: "FA3", "FA4", or None.
    flash: str | None = None
    #: The measured factors (of launches, of the rest) per :func:`kind` of call.
    scales: tuple[tuple[str, tuple[float, float]], ...] = ()


class Estimate(NamedTuple):
    """The time of a call, and whether it follows from rates measured on this machine."""

    seconds: float
    measured: bool

    def __str__(self) -> str:
        unit, factor = ("ms", 1e3) if self.seconds >= 1e-3 else ("us", 1e6)
        return f"about {self.seconds * factor:.3g} {unit} ({'measured rates' if self.measured else 'modelled'})"


class Pass(NamedTuple):
    """Kernels that run one after another. ``engine`` and ``backward`` name the rate that applies to them.

    ``setup`` are seconds beside the kernels' own time. ``blocks`` is the number of thread blocks if it is not that of
    blocks of 128 queries.
    """

    engine: str
    kernels: float
    flops: float
    bytes: float
    backward: bool = False
    setup: float = 0.0
    blocks: int | None = None


class Sizes(NamedTuple):
    """Sizes of a prefix attention: lengths, bytes (``q`` to ``lse``) and forward operations (``*_flops``).

    ``kv`` are the bytes of keys and values, ``prefix_once`` and ``prefix_each`` those of the prefixes.
    """

    batch: int
    heads: int
    queries: int
    keys: int
    prefix: int
    head_dim: int
    group: int
    q: float
    out: float
    kv: float
    prefix_once: float
    prefix_each: float
    lse: float
    element: int
    seq_flops: float
    full_flops: float
    prefix_flops: float


#: The assumed length of a packed sequence, which a call does not contain.
_PACKED = 512


def sizes_of(call: Call) -> Sizes:
    """The sizes of a prefix attention."""
    batch, heads, queries, head_dim = call.q_shape
    both = head_dim + call.value_dim
    kv_heads, keys, prefix = call.kv_shape[1], call.kv_shape[2], call.prefix_shape[-2]
    bank = call.prefix_shape[0] if len(call.prefix_shape) == 4 else 1
    element, per_pair = call.dtype.itemsize, 2.0 * batch * heads * both
    full, sequences = queries * keys, batch
    if "cu_seqlens" in call.features:
        pairs = queries * min(keys, _PACKED) * (1 if "non-causal" in call.features else 0.5)
        sequences = max(1, queries // _PACKED)
    else:
        pairs = full if "non-causal" in call.features else full - queries * (queries - 1) / 2
    return Sizes(
        batch, heads, queries, keys, prefix, head_dim, heads // max(1, kv_heads),
        q=float(batch * heads * queries * head_dim * element),
        out=float(batch * heads * queries * call.value_dim * element),
        kv=float(batch * kv_heads * keys * both * element),
        prefix_once=float(bank * kv_heads * prefix * both * element),
        prefix_each=float(sequences * kv_heads * prefix * both * element), lse=4.0 * batch * heads * queries,
        element=element, seq_flops=per_pair * pairs, full_flops=per_pair * full,
        prefix_flops=per_pair * queries * prefix,
    )  # fmt: skip


def attention_passes(
    call: Call, engine: str, forward_kernels: int, backward_kernels: int, backward_products: float
) -> list[Pass]:
    """The passes of a fused attention: one over everything forward, one backward if ``call.needs_grad``.

    Args:
        backward_products: the operations of the backward, in forwards.
    """
    x = sizes_of(call)
    flops, once = x.seq_flops + x.prefix_flops, x.kv + x.prefix_once
    passes = [Pass(engine, forward_kernels, flops, x.q + x.out + x.lse + once)]
    if call.needs_grad:
        moved = 4 * x.q + 5 * x.out + 3 * once
        passes.append(Pass(engine, backward_kernels, backward_products * flops, moved, True))
    return passes


def softmax_sums_pass(call: Call, engine: str) -> Pass:
    """The pass of a backward that computes the softmax again instead of reading the rounded out."""
    x = sizes_of(call)
    return Pass(engine, 1, x.seq_flops + x.prefix_flops, x.q + x.out + x.kv + x.prefix_once)


def embedding_passes(call: Call, engine: str, copies: int = 1) -> list[Pass]:
    """The passes of a soft prompt embedding that moves every element ``copies`` times."""
    (batch, seq), width, prefix = call.q_shape, call.kv_shape[-1], call.prefix_shape[-2]
    moved = 2.0 * batch * (seq + prefix) * width * call.dtype.itemsize
    times = copies * (1 + call.needs_grad)
    return [Pass(engine, times, 0.0, times * moved)]


def recomputes_softmax(call: Call) -> bool:
    """Whether a backward may need more of the softmax than the rounded out and lse."""
    return not {"gate", "sinks", "bias", "prefix_bias"}.isdisjoint(call.features)


def kind(call: Call, plan: str) -> str:
    """The kind of a call on the plan of this name: calls of one kind share a measured factor.

    >>> shape = (1, 2, 1, 64)
    >>> kind(Call("prefix_attention", torch.device("cpu"), torch.half, torch.half, shape, shape, shape[1:]), "cpu")
    'cpu prefix_attention float16 decode'
    """
    if call.needs_grad:
        what = "training"
    else:
        what = "decode" if call.op == "prefix_attention" and call.q_shape[2] <= 16 else "forward"
    return f"{plan} {call.op} {str(call.dtype).removeprefix('torch.')} {what}"


def price(passes: list[Pass] | None, call: Call, machine: Machine) -> tuple[float, float] | None:
    """(seconds of launches, seconds of the rest) by the rates of ``rates.json``; None if no rate is known."""
    if passes is None:
        return None
    launches = work = 0.0
    for part in passes:
        times = _time(part, call, machine)
        if times is None:
            return None
        launches, work = launches + times[0], work + times[1]
    return launches, work


def estimate(passes: list[Pass] | None, call: Call, plan: str, machine: Machine) -> Estimate | None:
    """The time of a plan's ``passes``, corrected by the factors measured for this plan and kind of call."""
    times = price(passes, call, machine)
    if times is None:
        return None
    scale = dict(machine.scales).get(kind(call, plan))
    if scale is None:
        return Estimate(sum(times), False)
    return Estimate(scale[0] * times[0] + scale[1] * times[1], True)


def _time(part: Pass, call: Call, machine: Machine) -> tuple[float, float] | None:
    """(seconds of launches, seconds of the rest), or None if no rate is known."""
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
    return part.kernels * launch + part.setup, max(part.bytes / bandwidth, part.flops / flops)


def _flops(part: Pass, call: Call, arch: str) -> float:
    rates = RATES["gpu"][arch]
    queries = call.q_shape[2] if call.op == "prefix_attention" else 1
    blocks = part.blocks or call.q_shape[0] * call.q_shape[1] * -(-queries // 128)
    busy = min(1.0, max(blocks, 1) / rates["processors"])
    if call.dtype.itemsize > 2 or part.engine == "reference":
        fp32 = rates["fp32"]
        return float(fp32.get(part.engine, fp32["triton"]) * 1e12 * (1.0 if part.engine == "reference" else busy))
    engine = RATES["engines"].get(part.engine, {}).get("rates", part.engine)
    engine = engine if engine in rates["flops"] else "triton"
    top, half = rates["flops"][engine]["backward" if part.backward else "forward"]
    if queries <= 16:  # the keys are split, so that all processors work
        return float(top * 1e12 / 4)
    return float(top * 1e12 * queries / (queries + half) * busy)
